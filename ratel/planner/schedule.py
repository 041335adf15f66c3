"""The order in which a step gathers weights, checkpoints and inner activations, fixed before the
step starts.

A gather may serve two uses: the units around the turn (last in forward, first in backward) stay in
their slots.
"""

from dataclasses import dataclass

from ratel.planner.checkpoints import INPUT
from ratel.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class Gather:
    """Bring one unit's weights, or one group of what was saved (``(block, micro_batch, what)``),
    into a GPU slot; freed after ``uses`` releases."""

    unit: int = -1
    saved: tuple[int, int, str] = (-1, -1, INPUT)
    uses: int = 1
    keep_for_update: bool = False
    """An update follows under backward: the DRAM copy stays until the optimizer has used it."""

    @property
    def is_unit(self) -> bool:
        return self.unit >= 0



def _stage_order(plan: Plan, training: bool) -> list[int]:
    stages = [s.index for s in plan.spec.stages]
    return stages + [s.index for s in plan.spec.backward_stages[1:]] if training else stages


def unit_gathers(plan: Plan, *, training: bool, updates_follow: bool = True) -> list[tuple[int, Gather]]:
    """``(position of first use in the stage order, gather)`` of every streamed unit, in order of
    position."""
    uses: dict[int, list[int]] = {}
    for position, stage in enumerate(_stage_order(plan, training)):
        for unit in plan.spec.stages[stage].units:
            if not plan.placements[unit].on_gpu:
                uses.setdefault(unit, []).append(position)
    held = _held_over_the_turn(plan) if training else set()
    gathers = []
    for index, positions in uses.items():
        unit = plan.spec.units[index]
        update = training and updates_follow and plan.updates_in_backward(unit) and unit.num_trainable > 0
        if unit.kind == "shared" or index in held or len(positions) == 1:
            gathers.append((positions[0], Gather(unit=index, uses=len(positions), keep_for_update=update)))
        else:
            gathers += [(p, Gather(unit=index, keep_for_update=update and p == positions[-1])) for p in positions]
    return sorted(gathers, key=lambda pair: pair[0])


def _held_over_the_turn(plan: Plan) -> set[int]:
    held: set[int] = set()
    for cls in _deep_classes(plan):
        count, blocks = plan.weight_slot_count(cls), [u.index for u in plan.streamed(cls)]
        held.update(blocks[len(blocks) - count :] if count else [])
    return held


def _deep_classes(plan: Plan) -> list[str]:
    return [cls.name for cls in plan.spec.slot_classes if cls.is_deep]


def gathers(plan: Plan, *, training: bool, num_micro: int | None = None, updates_follow: bool = True) -> list[Gather]:
    """All gathers of a step in the order in which they are started. ``num_micro``: of a batch
    smaller than the plan's. ``updates_follow``: updates run under backward, those that the plan has
    there.

    All gathers share one copy stream, so order is priority. A block's weights go before what the
    block that is used before it has saved, as long as the slot they need was freed two uses ago:
    one freed by the use just before would make what is behind it wait for that use's computation.
    """
    weights = unit_gathers(plan, training=training, updates_follow=updates_follow)
    if not training or not plan.groups:
        return [g for _, g in weights]
    ahead = max(min((count for cls in _deep_classes(plan) if (count := plan.weight_slot_count(cls))), default=0) - 2, 0)
    order = _stage_order(plan, training)
    turn = len(plan.spec.stages)
    result: list[Gather] = []
    cursor = 0
    for position in range(turn, len(order)):
        while cursor < len(weights) and weights[cursor][0] <= position + ahead:
            if weights[cursor][0] > position and _waits_for(plan, weights[cursor][1], position, order):
                break
            result.append(weights[cursor][1])
            cursor += 1
        stage = plan.spec.stages[order[position]]
        if stage.kind == "block":
            result += [Gather(saved=(group.block, micro_batch, group.what))
                       for micro_batch in range(num_micro or plan.work.num_micro) for group in plan.groups_of(stage.index - 1)]
    return result + [g for _, g in weights[cursor:]]


def _waits_for(plan: Plan, gather: Gather, position: int, order: list[int]) -> bool:
    """A unit outside the blocks has one slot for its class; it cannot be started before that slot's
    user is done."""
    return not plan.spec.classes[gather.unit].is_deep
