"""Tries the blocks out: what their second run can leave out, and the memory that activations take,
measured on the spot for blocks and one loss chunk, forward and backward.

On a GPU the allocator says what the peak was. On a CPU device activations are ordinary memory of
this process, and Linux says it: the peak of the resident set, started anew before each trial. That
includes the scratch buffers of math libraries, and is taken over what the process held before,
which the plan counts by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ratel import native
from ratel.errors import RatelError
from ratel.hardware.block_rates import attached, initialised
from ratel.hardware.host import worker_cores
from ratel.memory.anonymous import region_bytes
from ratel.memory.arena import Arena
from ratel.memory.lanes import Lanes
from ratel.memory.resident import peak_bytes, reset_peak, resident_bytes, trim
from ratel.models import Parts
from ratel.models.structure.inputs import BlockInputs
from ratel.planner.activation_policy import ActivationChoice, Kept, kept_by_choice
from ratel.planner.block_profile import BlockProfile
from ratel.planner.checkpoints import Spill
from ratel.planner.shape import StageSpec, UnitSpec
from ratel.runtime.blocks.batch import Batch
from ratel.runtime.blocks.loss import run_tail
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.blocks.spiller import WITHOUT_END, Spiller
from ratel.runtime.planning.block_timing import loss_seconds, with_timings
from ratel.runtime.streams.step import seed_generators
from ratel.startup import arena_ahead
from ratel.units import MIB, format_bytes

SLACK = 1.10
"""The caching allocator's own fragmentation, over what was measured."""
SLACK_BYTES = 128 * MIB


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was learned about the blocks, and the memory that they take."""

    profiles: tuple[BlockProfile, ...]
    workspace_bytes: int
    """GPU memory that one micro-batch takes beyond planes, slots and what is kept."""
    spill: Spill | None
    """How second runs were done where what they save went to DRAM."""
    loss_s: float | None
    """As in the plan."""


def try_out(blocks: BlockRuns, batches: list[Batch], device: torch.device, activations: ActivationChoice, *,
            timed: bool = False, region_limit: int | None = None) -> Trial:
    """``batches``: one micro-batch of each size that a step has, the largest first. ``timed``:
    measure how long they take. ``region_limit``: second runs spill what they save, and may take so
    many bytes of DRAM for it; None: they do not.

    Raises torch.OutOfMemoryError if it does not fit on the GPU at all, RatelError if it takes more
    than the limit.
    """
    cuda = device.type == "cuda"
    meter = _GpuMeter(device) if cuda else _HostMeter()
    with torch.random.fork_rng(devices=[device] if cuda else []):  # dropout draws, and leaves no trace
        profiles, loss_s = _learn(blocks, batches, device), None
        kept = kept_by_choice(profiles, activations)
        blocks.keep(_kept_bytes(profiles, kept, batches[0].rows))
        with _spilling(blocks, batches[0], device, region_limit) as spill:
            on_host = spill.region_bytes if spill and not cuda else 0  # it has a place of its own in the plan
            peak = max(_measure(blocks.parts, units, run, device, meter)
                       for run, units in _trials(blocks, batches[0], profiles, kept)) - on_host
            if timed:
                blocks.keep([{} for _ in profiles])
                profiles = with_timings(blocks, batches[0], profiles)
                loss_s = loss_seconds(blocks.parts, batches[0])
    meter.close()
    return Trial(profiles=profiles, workspace_bytes=int(max(peak, 0) * SLACK) + meter.slack_bytes,
                 spill=spill, loss_s=loss_s)


@contextmanager
def _spilling(blocks: BlockRuns, batch: Batch, device: torch.device, limit: int | None) -> Iterator[Spill | None]:
    """Second runs spill to memory of the trial's own, as much as they need; not without a limit."""
    if limit is None:
        yield None
        return
    spill = _needed_spill(blocks, batch, device)
    if spill.region_bytes > limit:
        raise RatelError(f"what backward needs of one block takes {format_bytes(spill.region_bytes)} of DRAM on its way, "
                         f"and there are {format_bytes(limit)}", field="dram",
                         remedy="Give a larger --dram, or a smaller --seq-len")
    pool = native.op_ds.Pool(worker_cores())
    # What is mapped for the session's own arena already: both at once could be more than the
    # budget.
    arena = Arena(spill.region_bytes, pin=device.type == "cuda", pool=pool,
                  memory=arena_ahead.take(region_bytes(spill.region_bytes)))
    try:
        region = arena.take(spill.region_bytes)
        arena.settle()
        blocks.spill_to(Spiller(Lanes(device), region, spill))
        yield spill
    finally:
        blocks.spill_to(None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        arena.close()
        pool.close()


def _needed_spill(blocks: BlockRuns, batch: Batch, device: torch.device) -> Spill:
    """Found out by running one block of each kind. What is saved goes to memory that is not there,
    so it is lost."""
    parts, used = blocks.parts, 0
    with torch.no_grad():
        hidden, inputs = parts.head(batch.content)
    spill = Spill.of(hidden.nbytes, WITHOUT_END)
    counter = Spiller(Lanes(device), torch.empty(WITHOUT_END, dtype=torch.uint8, device="meta"), spill)
    blocks.spill_to(counter)
    try:
        for block in blocks.first_of_each_kind:
            with attached(parts, block, device, initialised), torch.enable_grad():
                blocks.second(block, 0, torch.randn_like(hidden).requires_grad_(), inputs.with_leaves(), {}, lambda: None)
            used = max(used, counter.used_bytes)
            counter.finish()
    finally:
        blocks.spill_to(None)
    return replace(spill, region_bytes=used)


def _learn(blocks: BlockRuns, batches: list[Batch], device: torch.device) -> tuple[BlockProfile, ...]:
    """Profiles of all blocks, at the size of the first batch. Each kind is tried once per batch, on
    random weights: with zeros all experts would look alike to a router."""
    parts, profiles = blocks.parts, {}
    with torch.no_grad():
        heads = [parts.head(batch.content) for batch in batches]
    for block in blocks.first_of_each_kind:
        with attached(parts, block, device, initialised):
            for hidden, inputs in heads:
                blocks.learn(block, hidden, inputs, lambda: seed_generators(device, 0))
            profiles[block] = blocks.profile(block, *heads[0], batches[0].rows)
    return tuple(profiles[blocks.first_alike(block)] for block in range(parts.num_blocks))


def _kept_bytes(profiles: tuple[BlockProfile, ...], kept: Kept, rows: int) -> list[dict[str, int]]:
    """By block, what is kept and the most bytes it may take, as `BlockRuns.keep` wants it."""
    row_bytes = [{inner.name: inner.row_bytes for inner in profile.inner} for profile in profiles]
    return [{name: sizes[name] * rows for name, _ in names} for sizes, names in zip(row_bytes, kept)]


def _measure(parts: Parts, units: list[UnitSpec], run: Callable[[], int], device: torch.device,
             meter: "_GpuMeter | _HostMeter") -> int:
    meter.reset()
    planes = sum(_attach(parts, unit, device) for unit in units)
    try:
        elsewhere = run()
        _measure_norms(parts, units)
        return meter.peak_growth() - planes - elsewhere
    finally:  # after a run for which there was no room, too: another one may follow
        _detach(parts, units)


class _GpuMeter:
    slack_bytes = SLACK_BYTES

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of cuBLAS, which a step needs: it must count for every size of micro-batches, not for the
        # first that is tried.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self._held = torch.cuda.memory_allocated(device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_growth(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._held

    def close(self) -> None:
        torch.cuda.empty_cache()


class _HostMeter:
    slack_bytes = 0  # the plan's margin for the process covers the heap's own

    def __init__(self) -> None:
        trim()
        self._held = resident_bytes()

    def reset(self) -> None:
        trim()
        reset_peak()

    def peak_growth(self) -> int:
        return peak_bytes() - self._held

    def close(self) -> None:
        return None


def _measure_norms(parts: Parts, units: list[UnitSpec]) -> None:
    """As at the end of a unit's backward: on a CPU, norms in fp32 of bf16 gradients make an fp32
    copy."""
    names = {p.name for unit in units for p in unit.params if p.trainable}
    grads = [p.grad for name, p in parts.module.named_parameters() if name in names and p.grad is not None]
    if grads:
        torch._foreach_norm(grads, 2, dtype=torch.float32)


def _trials(blocks: BlockRuns, batch: Batch, profiles: tuple[BlockProfile, ...],
            kept: Kept) -> Iterator[tuple[Callable[[], None], list[UnitSpec]]]:
    """The largest block of each kind that keeps other things, and the tail; each with the units
    that it uses."""
    parts = blocks.parts
    with torch.no_grad():
        hidden, inputs = parts.head(batch.content)
    largest: dict[tuple, int] = {}
    sizes = [sum(u.num_elements for u in _units(parts, s)) for s in parts.spec.stages if s.kind == "block"]
    for block, size in enumerate(sizes):
        alike = (blocks.first_alike(block), kept[block])
        if size > sizes[largest.setdefault(alike, block)]:
            largest[alike] = block
    for block in largest.values():
        yield _block_trial(blocks, block, hidden, inputs), _units(parts, parts.spec.stages[block + 1])
    yield _tail_trial(parts, batch, hidden), _units(parts, parts.spec.stages[-1])


def _block_trial(blocks: BlockRuns, block: int, hidden: Tensor, inputs: BlockInputs) -> Callable[[], int]:
    """Both runs of the block, and backward. What it keeps has a place of its own in the plan: the
    run returns its bytes."""
    def run() -> int:
        saved: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            blocks.first(block, 0, hidden, inputs, saved.__setitem__)
        num_bytes = sum(t.nbytes for tensors in saved.values() for t in tensors)
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = blocks.second(block, 0, leaf, inputs.with_leaves(), saved, lambda: None)
        saved.clear()
        output.backward(torch.zeros_like(output))
        blocks.finish()
        return num_bytes

    return run


def _tail_trial(parts: Parts, batch: Batch, hidden: Tensor) -> Callable[[], int]:
    def run() -> int:
        run_tail(parts, batch.content, hidden)
        return 0

    return run


def _units(parts: Parts, stage: StageSpec) -> list[UnitSpec]:
    return [parts.spec.units[u] for u in stage.units]


def _detach(parts: Parts, units: list[UnitSpec]) -> None:
    for unit in units:
        parts.parameters.attach(unit.index, None)
        parts.parameters.take_grads(unit.index)


def _attach(parts: Parts, unit: UnitSpec, device: torch.device) -> int:
    """Zeros in place of the real weights; returns their bytes."""
    flat = torch.zeros(unit.num_elements, dtype=parts.parameters.dtype_of(unit), device=device)
    parts.parameters.attach(unit.index, flat)
    return flat.numel() * flat.element_size()
