"""The way from the trace of one run of a block to its profile: which results could be kept, and
what that would save."""

from ratel.planner.block_profile import BlockProfile, Inner
from ratel.runtime.blocks.op_flops import is_attention, is_expensive, num_stored
from ratel.runtime.blocks.op_trace import Op, OpTrace
from ratel.runtime.blocks.packing import packed_bytes

def inner_numbers(trace: OpTrace) -> dict[str, int]:
    """Operations worth keeping the result of, by name: expensive, needed, and with something left
    to save when all others of them are kept."""
    numbers = [n for n, op in enumerate(trace.ops) if is_expensive(op.func) and _can_be_kept(op)]
    needed = frozenset(numbers) - trace.skippable()
    for number in sorted(needed):
        if _saved_flops(trace, number, needed) == 0:
            needed -= {number}
    names: dict[str, int] = {}
    for number in sorted(needed):
        names[_fresh(_name(trace.ops[number]), names)] = number
    return names


def profile_of(trace: OpTrace, rows: int) -> BlockProfile:
    """The profile that follows from a trace of a micro-batch of ``rows`` rows."""
    numbers = inner_numbers(trace)
    everything = frozenset(numbers.values())
    inner = tuple(Inner(name=name, row_bytes=-(-kept_bytes(trace.ops[number]) // rows),
                        row_flops=_saved_flops(trace, number, everything) / rows) for name, number in numbers.items())
    return BlockProfile(forward_flops=forward_flops(trace, rows), recompute_flops=trace.flops_without() / rows,
                        gradient_flops=gradient_flops(trace, rows), inner=inner)


def plain_profile(trace: OpTrace, rows: int) -> BlockProfile:
    """The profile of a block that is always run again in full."""
    flops = forward_flops(trace, rows)
    return BlockProfile(forward_flops=flops, recompute_flops=flops, gradient_flops=gradient_flops(trace, rows))


def guessed_profile(num_parameters: int, positions: int) -> BlockProfile:
    """The profile of a block that could not be traced, on the guess that every parameter is
    multiplied with every position once."""
    flops = 2.0 * num_parameters * positions
    return BlockProfile(forward_flops=flops, recompute_flops=flops)


def forward_flops(trace: OpTrace, rows: int) -> float:
    return sum(op.flops for op in trace.ops) / rows


def gradient_flops(trace: OpTrace, rows: int) -> float:
    return sum(op.gradient_flops for op in trace.ops) / rows


def kept_bytes(op: Op) -> int:
    return packed_bytes([x.num_bytes for x in op.outputs[: num_stored(op.func)]])


def _can_be_kept(op: Op) -> bool:
    stored = op.outputs[: num_stored(op.func)]
    return not op.must_run and op.flops > 0 and all(x.is_dense and x.num_bytes for x in stored)


def _saved_flops(trace: OpTrace, number: int, kept: frozenset[int]) -> float:
    """The FLOPs that a second run is spared when this operation is kept, too."""
    return trace.flops_without(kept - {number}) - trace.flops_without(kept)


def _name(op: Op) -> str:
    """The submodule, where it is one linear layer; else what is computed in it."""
    if is_attention(op.func):
        return "sdpa"
    return op.path or op.func._schema.name.partition("::")[2]


def _fresh(name: str, taken: dict[str, int]) -> str:
    if name not in taken:
        return name
    return next(f"{name}.{count}" for count in range(2, len(taken) + 3) if f"{name}.{count}" not in taken)
