"""How long the two runs of a block and the loss take on this device, and how long it takes to give
it a block's work."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ratel import probe_cache
from ratel.hardware.block_rates import attached, attached_units, initialised
from ratel.hardware.probe import processors_key
from ratel.hardware.timing import launch_seconds, median_seconds
from ratel.models import Parts
from ratel.models.structure.inputs import BlockInputs
from ratel.planner.block_profile import BlockProfile
from ratel.planner.shape import UnitSpec
from ratel.runtime.blocks.batch import Batch
from ratel.runtime.blocks.loss import run_tail
from ratel.runtime.blocks.runs import BlockRuns
from ratel.units import MIB

TIMING_S, GPU_TIMING_S = 0.1, 0.5
"""Seconds that each measurement of each kind of block goes on, where a plan is to be predicted: on
a CPU, on a GPU. In 0.1 s a GPU does not come to its power limit."""

EVICTED_BYTES = 64 * MIB

TIMING_METHOD = 3
"""Raised when what is timed, or how, changes: earlier results are then not used."""

Timing = dict[str, list[float] | None]
"""``pass_s`` and ``launch_s``, each of forward and of backward."""


def with_timings(blocks: BlockRuns, batch: Batch, profiles: tuple[BlockProfile, ...]) -> tuple[BlockProfile, ...]:
    """With the seconds of both passes of each kind of block, nothing kept and everything kept, and
    on a GPU of launching them.

    What was measured once counts from then on: plans that followed every measurement would differ
    from run to run, and with the size of micro-batches the rounding of sums.
    """
    parts, found, rows = blocks.parts, {}, batch.rows
    with torch.no_grad():
        hidden, inputs = parts.head(batch.content)
    for block in blocks.first_of_each_kind:
        key = {**processors_key(hidden.device), "block": blocks.fingerprint(block, hidden, inputs), "method": TIMING_METHOD}
        found[block] = probe_cache.load(key, lambda content: content["timings"])
        if found[block] is None:
            offered = {inner.name: inner.row_bytes * rows for inner in profiles[block].inner}
            with attached(parts, block, hidden.device, initialised) as units:
                found[block] = [_time_passes(blocks, block, torch.randn_like(hidden), inputs, units, kept)
                                for kept in (({}, offered) if offered else ({},))]
            probe_cache.store(key, {"timings": found[block]})
    return tuple(_with_seconds(profile, rows, *found[blocks.first_alike(block)]) for block, profile in enumerate(profiles))


def loss_seconds(parts: Parts, batch: Batch) -> float | None:
    """Seconds that everything after the blocks takes, forward and backward, for one micro-batch.
    None where there is no room for it."""
    units = [parts.spec.units[index] for index in parts.spec.stages[-1].units]
    with torch.no_grad():
        hidden, _ = parts.head(batch.content)
    facts = (parts.name, [(p.name, p.shape) for unit in units for p in unit.params], hidden.shape, hidden.dtype,
             torch.are_deterministic_algorithms_enabled())
    key = {**processors_key(hidden.device), "loss": hashlib.sha256(repr(facts).encode()).hexdigest(), "method": TIMING_METHOD}
    seconds = probe_cache.load(key, lambda content: float(content["seconds"]))
    if seconds is None:
        try:
            seconds = _time_loss(parts, batch, torch.randn_like(hidden), units)
        except torch.OutOfMemoryError:  # random weights and second gradients take more than a step does
            return None
        probe_cache.store(key, {"seconds": seconds})
    return seconds


def _time_loss(parts: Parts, batch: Batch, hidden: Tensor, units: list[UnitSpec]) -> float:
    def run() -> None:
        run_tail(parts, batch.content, hidden, lambda: _take_over(parts, units))

    with attached_units(parts, units, hidden.device, initialised):
        return _seconds_on(hidden)(run)


def _with_seconds(profile: BlockProfile, rows: int, bare: Timing, keeping: Timing | None = None) -> BlockProfile:
    def both(what: str) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(timing[what]) for timing in (bare, keeping or bare) if timing[what] is not None)

    return replace(profile, seconds=((rows, *bare["pass_s"]),), launch_s=both("launch_s"),
                   keeping_seconds=((rows, *keeping["pass_s"]),) if keeping else ())


def _time_passes(blocks: BlockRuns, block: int, hidden: Tensor, inputs: BlockInputs, units: list[UnitSpec],
                 kept: dict[str, int]) -> Timing | None:
    """None where there is no room for what is to be kept."""
    leaf = hidden.requires_grad_()

    def forward() -> dict[str, list[Tensor]]:
        saved: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            blocks.first(block, 0, leaf, inputs, saved.__setitem__)
        return saved

    def both() -> None:
        _backward(blocks, block, leaf, inputs, units, forward())

    def apart(seconds: Callable[[Callable[[], object]], float]) -> list[float]:
        forward_s = seconds(forward)
        return [forward_s, seconds(both) - forward_s]

    blocks.keep([kept] * blocks.parts.num_blocks)
    try:
        return {"pass_s": apart(_seconds_on(hidden)),
                "launch_s": apart(partial(launch_seconds, settle=torch.cuda.synchronize)) if hidden.is_cuda else None}
    except torch.OutOfMemoryError:
        if not kept:
            raise
        return None
    finally:
        blocks.keep([{}] * blocks.parts.num_blocks)


def _backward(blocks: BlockRuns, block: int, leaf: Tensor, inputs: BlockInputs, units: list[UnitSpec],
              saved: dict[str, list[Tensor]]) -> None:
    with torch.enable_grad():
        output = blocks.second(block, 0, leaf, inputs.with_leaves(), saved, lambda: None)
    saved.clear()
    output.backward(torch.ones_like(output))
    blocks.finish()
    _take_over(blocks.parts, units)


def _take_over(parts: Parts, units: list[UnitSpec]) -> None:
    """Gradients, which a step reads and writes once more."""
    for unit in units:
        for grad in parts.parameters.take_grads(unit.index):
            if grad is not None:
                grad.clone()


def _seconds_on(hidden: Tensor) -> Callable[[Callable[[], object]], float]:
    """On the device of ``hidden``."""
    if hidden.is_cuda:
        return partial(median_seconds, limit_s=GPU_TIMING_S, settle=torch.cuda.synchronize)
    # In a step a block finds the other blocks' weights in a processor's caches; a GPU's are too
    # small for one block's.
    return partial(median_seconds, limit_s=TIMING_S, between=torch.zeros(EVICTED_BYTES, dtype=torch.uint8).bitwise_not_)
