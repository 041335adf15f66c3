"""Which order an adapted linear is computed in.

``auto`` is ``fused`` for every shape: it makes the fewest passes over X and Y, and what it does
depends on shapes alone, so that two runs are equal bit for bit. The other criteria take the best of
the orders of ``graphs`` for a shape. None of them takes one that merges W + s B A, unless it is
asked to by name or by ``-merged``: in bf16 small updates are rounded away (docs/lora_compute.md).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ratel import probe_cache
from ratel.errors import RatelError
from ratel.hardware.probe import processors_key
from ratel.hardware.timing import median_seconds
from ratel.lora.compute import graphs, ops
from ratel.lora.compute.graphs import BACKWARD, FORWARD, Given, Size
from ratel.lora.compute.masks import Dropout, mask_key

FUSED = "fused"
MERGED = "-merged"
CRITERIA = ("flops", "bytes", "time")
LIMIT_S = 0.05
"""For each order."""
ROWS_STEP = 256
"""Rows are rounded up to a multiple before timing: micro-batches of nearly one size need one
measurement."""

Choice = tuple[str, str]


def choose(graph: str, size: Size, device: torch.device, dtype: torch.dtype) -> Choice:
    """The forward and the backward order for ``auto``, ``flops``, ``bytes``, ``time``, one of the
    latter with ``-merged``, ``fused``, or an order by its names, such as ``f1+b2``."""
    check(graph)
    if graph in ("auto", FUSED):
        return FUSED, FUSED
    criterion = graph.removesuffix(MERGED)
    if criterion in CRITERIA:
        return _best(criterion, size, graph.endswith(MERGED), device, dtype)
    forward, _, backward = graph.partition("+")
    return forward, backward


def check(graph: str) -> None:
    """Raises RatelError for what is no order and no way to choose one."""
    forward, _, backward = graph.partition("+")
    is_named = forward in FORWARD and backward in BACKWARD
    if not is_named and graph not in ("auto", FUSED) and graph.removesuffix(MERGED) not in CRITERIA:
        raise RatelError("is not an order for adapters", field="lora_graph", value=graph,
                         remedy=f"Use auto, {', '.join(CRITERIA)} (also with {MERGED}), {FUSED}, or {', '.join(FORWARD)} "
                                f"with one of {', '.join(BACKWARD)}, such as f1+b1")


def candidates(merged: bool) -> tuple[list[str], list[str]]:
    return [name for name in FORWARD if merged or not graphs.merges(name)], \
        [name for name in BACKWARD if merged or not graphs.merges(name)]


@functools.lru_cache(maxsize=4096)
def _best(criterion: str, size: Size, merged: bool, device: torch.device, dtype: torch.dtype) -> Choice:
    forwards, backwards = candidates(merged)
    if criterion != "time":
        cost = graphs.flops if criterion == "flops" else graphs.traffic_bytes
        return min(forwards, key=lambda name: cost(name, size)), min(backwards, key=lambda name: cost(name, size))
    times = measured(size, device, dtype)
    forward, backward = min(forwards, key=times.__getitem__), min(backwards, key=times.__getitem__)
    return (forward, backward) if times[forward] + times[backward] < times[FUSED] else (FUSED, FUSED)


def measured(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of every order and of ``fused`` (both ways together), from this machine's cache or
    measured now."""
    rounded = Size(**{**vars(size), "rows": -(-size.rows // ROWS_STEP) * ROWS_STEP})
    key = {**processors_key(device), "what": "orders of adapted linears", "dtype": str(dtype),
           "kernels": ops.kernels_serve(device), "size": vars(rounded)}
    found = probe_cache.load(key, _read)
    if found is None:
        found = _measure(rounded, device, dtype)
        probe_cache.store(key, found)
    return found


def _read(result: dict[str, Any]) -> dict[str, float]:
    return {name: float(result[name]) for name in (*FORWARD, *BACKWARD, FUSED)}


def _measure(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """On random values: zeros are multiplied faster, and in the type that is trained in."""
    from ratel.lora.compute.function import Adapter, Frozen, adapted_linear

    m, i, j, r = size.rows, size.inputs, size.outputs, size.rank
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x, w, a, b, dy = random(m, i), random(j, i), random(r, i), random(j, r), random(m, j)
    dropout = Dropout.of(0.1, [mask_key(0, 0, 0, 0)]) if size.drops else None
    mask = None if dropout is None else functools.partial(ops.dropped, draw=dropout.draw, p=dropout.p, index=0)
    given = Given(x=x, w=w, bias=None, a=a, b=b, scale=1.0, mask=mask)
    leaves = [tensor.requires_grad_() for tensor in (x.clone(), a.clone(), b.clone())]

    def both() -> None:
        y = adapted_linear(leaves[0], Frozen(weight=w), Adapter(a=leaves[1], b=leaves[2], scale=1.0), dropout, FUSED)
        torch.autograd.grad(y, leaves, dy)

    with torch.no_grad():
        found = {name: _seconds(lambda run=run: run(given), device) for name, run in FORWARD.items()}
        found |= {name: _seconds(lambda run=run.run: run(given, dy), device) for name, run in BACKWARD.items()}
    return {**found, FUSED: _seconds(both, device)}


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return median_seconds(run, limit_s=LIMIT_S, settle=settle)
