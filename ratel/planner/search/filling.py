"""Filling a plan's tiers to their budgets: units on the GPU, then planes in DRAM, the rest on
SSD."""

from collections.abc import Callable
from typing import TypeVar

from ratel.planner.placement import DRAM, GPU, SSD, UnitPlacement, closed_first, with_fp32_on_gpu, with_planes
from ratel.planner.plan import FEWEST_SAVE_PIECES, Plan
from ratel.planner.search.request import Request
from ratel.planner.shape import UnitSpec, forward_order

HEAT = ("hi", "g", "lo", "m", "v")
"""By SSD traffic saved per byte of DRAM held: `hi` is read twice and written once, the others once
each."""

Placements = tuple[UnitPlacement, ...]
Item = TypeVar("Item")
Take = Callable[[list[Item], Callable[[list[Item]], bool]], list[Item]]
"""Takes, of items in the order of their worth, those that are put there, by whether all of some
fit: `as_far_as_fits`, or `whatever_fits`."""


def with_placements(request: Request, placements: Placements, checkpoints: tuple[str, ...]) -> Plan:
    placements = with_fp32_on_gpu(request.spec, placements)
    return Plan(spec=request.spec, formats=request.formats, optimizer=request.optimizer, placements=placements,
                early_units=request.early_units, checkpoint_tiers=checkpoints, work=request.work, buffers=request.buffers,
                workspace_bytes=request.workspace_bytes, accumulators=request.accumulators,
                gpu_budget=request.gpu_budget, dram_budget=request.dram_budget, process_bytes=request.process_bytes,
                import_element_bytes=request.import_element_bytes, on_host=request.on_host,
                save_pieces=FEWEST_SAVE_PIECES, profiles=request.profiles, loss_s=request.loss_s, kept=request.kept,
                spill=request.spill)


def fits_gpu(request: Request, plan: Plan) -> bool:
    """A CPU device has DRAM in two names; with SSD to go to, what is on the device must leave room
    for the rest."""
    spare_dram = not request.on_host or request.ssd_budget is None or plan.dram_bytes <= request.dram_budget
    return (request.gpu_budget is None or plan.gpu_bytes <= request.gpu_budget) and spare_dram


def off_gpu(request: Request) -> UnitPlacement:
    return UnitPlacement.all_on(DRAM if request.ssd_budget is None else SSD)


def placed_on_gpu(request: Request, units: list[UnitSpec]) -> Placements:
    """These units, whole; a unit is on the GPU with all its planes or with none."""
    chosen, on, rest = {unit.index for unit in units}, UnitPlacement.all_on(GPU), off_gpu(request)
    return tuple(on if unit.index in chosen else rest for unit in request.spec.units)


def fill_gpu(request: Request, checkpoints: tuple[str, ...], take: Take) -> Placements:
    """Units that forward needs first: their updates are the ones that nothing else can hide."""
    if request.gpu_budget is None:
        return placed_on_gpu(request, [])
    return placed_on_gpu(request, take(forward_order(request.spec.units), lambda units: fits_gpu(
        request, with_placements(request, placed_on_gpu(request, units), checkpoints))))


def fill_dram(request: Request, checkpoints: tuple[str, ...], placements: Placements, take: Take) -> Plan:
    """One kind of plane after the other, hottest first, in forward order; before all the gradients
    of early units."""
    if request.ssd_budget is None:
        return with_placements(request, placements, checkpoints)
    early = [("g", unit.index) for unit in closed_first(request.spec, placements, request.early_units)]
    order = early + [(plane, unit.index) for plane in HEAT for unit in request.spec.units
                     if not placements[unit.index].on_gpu and (plane, unit.index) not in early]

    def plan_with(planes: list[tuple[str, int]]) -> Plan:
        by_unit: dict[int, tuple[str, ...]] = {}
        for plane, unit in planes:
            by_unit[unit] = (*by_unit.get(unit, ()), plane)
        moved = list(placements)
        for unit, names in by_unit.items():
            moved[unit] = with_planes(moved[unit], names, DRAM)
        return with_placements(request, tuple(moved), checkpoints)

    return plan_with(take(order, lambda planes: plan_with(planes).dram_bytes <= request.dram_budget))


def as_far_as_fits(items: list[Item], fits: Callable[[list[Item]], bool]) -> list[Item]:
    """The first of them up to the one with which they do not fit."""
    return items[:largest(len(items), lambda count: fits(items[:count]))]


def whatever_fits(items: list[Item], fits: Callable[[list[Item]], bool],
                  ends_at: Callable[[Item], bool] = lambda item: False) -> list[Item]:
    """Each that fits beside those taken before it, up to one that does not and is like all that
    follow (``ends_at``)."""
    taken: list[Item] = []
    for item in items:
        if fits([*taken, item]):
            taken.append(item)
        elif ends_at(item):
            break
    return taken


def largest(most: int, is_possible: Callable[[int], bool]) -> int:
    """The largest count up to ``most`` that is possible, of counts that are possible from 0 on; 0
    if none is."""
    if is_possible(most):
        return most
    if not is_possible(0):
        return 0
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_possible(middle) else (low, middle)
    return low
