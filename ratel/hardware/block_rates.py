"""How fast the device runs transformer blocks: seconds by rows of a micro-batch, and the curve
through them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ratel.hardware.timing import median_seconds
from ratel.models import Parts
from ratel.planner.shape import UnitSpec

BlockSeconds = tuple[tuple[int, float, float], ...]
"""The form of ``BlockProfile.seconds``: ``(rows, forward, backward with everything recomputed)``,
by rows."""

WEIGHT_SCALE = 0.02
"""The scale at which models are initialised. Zeros would draw less power, and so run at a higher
clock than training does."""


def measure_block(parts: Parts, batches: Sequence[tuple[int, Any]], device: torch.device, *, block: int | None = None,
                  limit_s: float = 1.0) -> BlockSeconds:
    """Seconds of one block at several numbers of rows: forward alone, and backward with the block
    run once more.

    ``batches`` are ``(rows, batch on the device)`` with growing rows; ``block`` is by default the
    largest one. Weights are random. ``limit_s`` is what each of the two may take for one batch.
    Sizes that do not fit are left out, as long as one does; else torch.OutOfMemoryError.
    """
    block = largest_block(parts) if block is None else block
    points: list[tuple[int, float, float]] = []
    with _generators_restored(device), attached(parts, block, device, initialised):
        for rows, batch in batches:
            try:
                points.append((rows, *_time_both(parts, batch, block, device, limit_s)))
            except torch.OutOfMemoryError:
                if not points:
                    raise
                break
    return tuple(points)


def forward_flops(parts: Parts, batch: Any, device: torch.device, block: int | None = None) -> float:
    """FLOPs of the block's forward pass on the whole batch; a multiply and an add count as two."""
    block = largest_block(parts) if block is None else block
    with attached(parts, block, device, torch.zeros), _generators_restored(device), torch.no_grad():
        hidden, inputs = parts.head(batch)
        with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_ATTENTION, _attention_flops)) as counter:
            parts.block(block, torch.randn_like(hidden), inputs)
    return float(counter.get_total_flops())


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """QK' and PV. PyTorch's own formula refuses query heads that share keys and values; a causal
    mask is not taken off."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


_ATTENTION = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}") for kind in (
    "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")]


def largest_block(parts: Parts) -> int:
    sizes = [sum(unit.num_params for unit in _units(parts, block)) for block in range(parts.num_blocks)]
    return sizes.index(max(sizes))


def fit_saturation(points: Sequence[tuple[float, float]], flops_per_token: float) -> tuple[float, float]:
    """FLOP/s that many tokens attain, and the tokens that attain half of it, from ``(tokens,
    seconds)``.

    The line ``seconds = a (tokens + half)`` with the least relative errors, so that small
    micro-batches count as much as large ones. A fit with less than no time for no tokens is noise,
    and becomes a line through the origin.
    """
    xx, x, n, xy, y = (sum(f(t, s) / s**2 for t, s in points) for f in (
        lambda t, s: t * t, lambda t, s: t, lambda t, s: 1.0, lambda t, s: t * s, lambda t, s: s))
    determinant = xx * n - x * x
    slope, start = ((xy * n - x * y) / determinant, (xx * y - x * xy) / determinant) if len(points) > 1 else (0.0, 0.0)
    if start <= 0 or slope <= 0:
        slope, start = xy / xx, 0.0
    return flops_per_token / slope, start / slope


def _time_both(parts: Parts, batch: Any, block: int, device: torch.device, limit_s: float) -> tuple[float, float]:
    with torch.no_grad():
        hidden, inputs = parts.head(batch)
    hidden = torch.randn_like(hidden)
    grad = torch.randn_like(hidden)
    settle: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def forward() -> None:
        with torch.no_grad():
            parts.block(block, hidden, inputs)

    def backward() -> None:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = parts.block(block, leaf, inputs.with_leaves())
        output.backward(grad)
        for unit in _units(parts, block):
            parts.parameters.take_grads(unit.index)

    return tuple(median_seconds(run, limit_s=limit_s, settle=settle) for run in (forward, backward))


def _units(parts: Parts, block: int) -> list[UnitSpec]:
    return [parts.spec.units[index] for index in parts.spec.stages[1 + block].units]


def initialised(num_elements: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random weights that stand for real ones."""
    return torch.randn(num_elements, dtype=dtype, device=device).mul_(WEIGHT_SCALE)


def attached(parts: Parts, block: int, device: torch.device,
             make: Callable[..., torch.Tensor]) -> AbstractContextManager[list[UnitSpec]]:
    """The block's units, with weights of which ``make`` makes each unit's."""
    return attached_units(parts, _units(parts, block), device, make)


@contextmanager
def attached_units(parts: Parts, units: list[UnitSpec], device: torch.device,
                   make: Callable[..., torch.Tensor]) -> Iterator[list[UnitSpec]]:
    for unit in units:
        parts.parameters.attach(unit.index, make(unit.num_elements, dtype=parts.parameters.dtype_of(unit), device=device))
    try:
        yield units
    finally:
        for unit in units:
            parts.parameters.attach(unit.index, None)
            parts.parameters.take_grads(unit.index)


def _generators_restored(device: torch.device) -> Any:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
