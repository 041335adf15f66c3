"""The largest of something that still fits, and models of any depth."""

from collections.abc import Callable
from dataclasses import replace

from ratel.planner.search.request import Request
from ratel.planner.search.search import FEWEST, candidates
from ratel.planner.shape import ModelSpec, StageSpec
from ratel.planner.work import Buffers

MOST = 1 << 24
"""Beyond it nothing is asked: tokens, rows or layers that no machine holds."""


def fits_somewhere(request: Request) -> bool:
    """Whether any candidate fits, with the fewest buffers and everything recomputed; nothing is
    predicted."""
    if request.buffers == Buffers():
        request = replace(request, buffers=FEWEST)
    if not request.kept:
        request = replace(request, kept=((),) * len(request.profiles))
    return next(candidates(request), None) is not None


def largest_count(fits: Callable[[int], bool], *, least: int = 1, most: int = MOST, near: int = 0) -> int:
    """The largest count from ``least`` to ``most`` that fits, by growing steps and bisection; 0 if
    not even the least does.

    What is below a count that fits is taken to fit. ``near``: where it probably is, so that few
    counts are asked for.
    """
    good, bad = least - 1, most + 1
    count, step = min(max(near, least), most), 1
    while bad - good > 1:
        if fits(count):
            good = count
        else:
            bad = count
        if good >= least and bad <= most:
            count = (good + bad) // 2
        else:
            count = max(bad - step, least) if good < least else min(good + step, most)
        step *= 2
    return good if good >= least else 0


def with_depth(spec: ModelSpec, depth: int) -> ModelSpec:
    """The model with ``depth`` blocks: its last one again and again, or its last ones left out."""
    blocks = [stage for stage in spec.stages if stage.kind == "block"]
    shown = [blocks[min(number, len(blocks) - 1)] for number in range(depth)]
    units, stages = [], []
    index_of: dict[tuple[str, int], int] = {}

    def unit_index(name: str, original: int) -> int:
        if (name, original) not in index_of:
            index_of[name, original] = len(units)
            units.append(replace(spec.units[original], index=len(units), name=name))
        return index_of[name, original]

    def add(stage: StageSpec, name: str) -> None:
        # A shared unit is one; a block's own unit is a new one in every copy.
        used = tuple(unit_index(name + spec.units[u].name.removeprefix(stage.name) if spec.units[u].kind == "block"
                                else spec.units[u].name, u) for u in stage.units)
        stages.append(StageSpec(index=len(stages), name=name, kind=stage.kind, units=used))

    for stage in spec.stages:
        if stage.kind != "block":
            add(stage, stage.name)
        elif stage is blocks[0]:
            for number, block in enumerate(shown):
                add(block, f"block.{number}")
    return replace(spec, units=tuple(units), stages=tuple(stages))
