"""Bytes that a step moves, from the plan and its schedule alone: what the engine's counters are
held to.

Per trained parameter with everything on SSD (bf16, deep model) this is 14 bytes read and 12
written; units held over the turn are gathered once and save a read.
"""

from collections import Counter
from dataclasses import dataclass

from ratel.planner.block_profile import Inner
from ratel.planner.placement import SSD, closed_first
from ratel.planner.plan import Plan
from ratel.planner.schedule import unit_gathers
from ratel.planner.shape import UnitSpec
from ratel.planner.slot_layout import PAGE_BYTES
from ratel.units import align_up

NORM_BYTES = 4
"""The norm of a unit's gradient leaves the GPU with the gradient."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes. ``h2d`` and ``d2h`` cross PCIe on a GPU; on a CPU device they are the same copies
    within DRAM."""

    ssd_read: int = 0
    ssd_written: int = 0
    h2d: int = 0
    d2h: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(ssd_read=self.ssd_read + other.ssd_read, ssd_written=self.ssd_written + other.ssd_written,
                       h2d=self.h2d + other.h2d, d2h=self.d2h + other.d2h)

    def __mul__(self, count: int) -> "Traffic":
        return Traffic(ssd_read=self.ssd_read * count, ssd_written=self.ssd_written * count, h2d=self.h2d * count,
                       d2h=self.d2h * count)

    @property
    def ssd_bytes(self) -> int:
        return self.ssd_read + self.ssd_written

    @property
    def dram_bytes(self) -> int:
        """Each byte that comes to DRAM or leaves it is written or read there once."""
        return self.ssd_bytes + self.h2d + self.d2h


@dataclass(frozen=True, kw_only=True)
class PassTraffic:
    """A step's traffic by the pass that moves it. The turn (loss) belongs to the backward pass.

    Updates run under backward (eager, early) or under the next forward pass (deferred), and are
    therefore apart.
    """

    forward: Traffic
    backward: Traffic
    forward_updates: Traffic
    backward_updates: Traffic
    first_weights: tuple[int, int]
    """Bytes, of forward and backward, that come down before anything of their pass can go up."""
    first_gradient: int
    last_gradient: int
    """Bytes. Nothing is updated before the first has come up; what comes down after the last waits
    for its update."""

    @property
    def updates(self) -> Traffic:
        return self.forward_updates + self.backward_updates


def pass_traffic(plan: Plan) -> PassTraffic:
    """One training step in steady state, at the plan's batch shape."""
    turn = len(plan.spec.stages) - 1
    weights = unit_gathers(plan, training=True)
    out, back = _activation_traffic(plan)
    units = closed_first(plan.spec, plan.placements)
    zero = Traffic()
    gathered = [[gather_traffic(plan, g.unit).h2d for p, g in weights if (p >= turn) == late] for late in (False, True)]
    gradients = [gradient_traffic(plan, u).d2h for u in units] or [0]
    return PassTraffic(
        first_weights=(sum(gathered[0][:1]), sum(gathered[1][:1])), first_gradient=gradients[0],
        last_gradient=gradients[-1],
        forward=sum((gather_traffic(plan, g.unit) for p, g in weights if p < turn), zero) + out,
        backward=sum((gather_traffic(plan, g.unit) for p, g in weights if p >= turn), zero) + back
        + sum((gradient_traffic(plan, u) for u in units), zero)
        + sum((spill_traffic(plan, rows) * len(plan.checkpoint_tiers) for rows in micro_rows(plan)), zero),
        forward_updates=sum((update_traffic(plan, u) for u in units if not plan.updates_in_backward(u)), zero),
        backward_updates=sum((update_traffic(plan, u) for u in units if plan.updates_in_backward(u)), zero))


def step_traffic(plan: Plan, *, after_flush: bool = False) -> Traffic:
    """One training step with its updates, at the plan's batch shape.

    In deferred mode the update's copy of a unit's weights serves the next forward pass too. The
    first step, and one ``after_flush``, has no such copy and reads those weights once more. Early
    updates are taken to be right.
    """
    passes = pass_traffic(plan)
    total = passes.forward + passes.backward + passes.updates
    if plan.deferred and after_flush:
        updated = closed_first(plan.spec, plan.placements)
        total += Traffic(ssd_read=sum(plan.host_weight_bytes(u) for u in updated if not plan.updates_in_backward(u)))
    return total


def gather_traffic(plan: Plan, index: int) -> Traffic:
    """One unit's weights on their way to the GPU."""
    unit = plan.spec.units[index]
    return Traffic(ssd_read=plan.host_weight_bytes(unit), h2d=unit.num_elements * plan.weight_bytes)


def gradient_traffic(plan: Plan, unit: UnitSpec) -> Traffic:
    """The unit's gradient up to DRAM, and on to SSD where it waits there for its (deferred)
    update."""
    spilled = plan.formats.num_bytes(unit, "g") if "g" in plan.ring_planes(unit) else 0
    return Traffic(ssd_written=spilled, d2h=unit.num_trainable * plan.grad_bytes + NORM_BYTES)


def update_traffic(plan: Plan, unit: UnitSpec) -> Traffic:
    """Optimizer planes from SSD and back; weights back, which a gather has read, or spares
    reading."""
    ring = {p: align_up(plan.formats.num_bytes(unit, p), PAGE_BYTES) for p in plan.ring_planes(unit)}
    weights = sum(plan.formats.encoding(p).num_bytes(unit.num_trainable) for p in plan.weights_from_ssd(unit))
    # The gradient is read and then forgotten; the other planes are read and written back.
    return Traffic(ssd_read=sum(ring.values()), ssd_written=sum(ring.values()) - ring.get("g", 0) + weights)


def activation_traffic(plan: Plan, block: int, rows: int) -> Traffic:
    """What leaves the GPU in one micro-batch's forward pass through a block: its input, and what is
    kept of its inside.

    The same bytes come back in backward. SSD moves whole slots of a full micro-batch, PCIe the rows
    there are.
    """
    groups = plan.groups_of(block)
    return Traffic(d2h=sum(saved.num_bytes // plan.work.micro_rows * rows for group in groups for saved in group.members),
                   ssd_written=sum(align_up(group.num_bytes, PAGE_BYTES) for group in groups if group.tier == SSD))


def spill_traffic(plan: Plan, rows: int) -> Traffic:
    """What the backward pass of one block and micro-batch saves out of the GPU and fetches back. As
    if nothing were asked for while it is still there."""
    num_bytes = plan.spill.region_bytes * rows // plan.work.micro_rows if plan.spill else 0
    return Traffic(h2d=num_bytes, d2h=num_bytes)


def kept_inner(plan: Plan, block: int) -> list[tuple[Inner, str]]:
    """The inner activations of a block that are kept, with their tiers."""
    if not plan.kept:
        return []
    inner = {i.name: i for i in plan.profiles[block].inner}
    return [(inner[name], tier) for name, tier in plan.kept[block]]


def _activation_traffic(plan: Plan) -> tuple[Traffic, Traffic]:
    """All activations on their way out, and on their way back."""
    sizes = Counter(micro_rows(plan)).items()
    out = sum((activation_traffic(plan, block, rows) * count for block in range(len(plan.checkpoint_tiers))
               for rows, count in sizes), Traffic())
    return out, returning(out)


def returning(out: Traffic) -> Traffic:
    return Traffic(ssd_read=out.ssd_written, h2d=out.d2h)


def micro_rows(plan: Plan) -> list[int]:
    """Rows of each micro-batch; the last one may be short."""
    work = plan.work
    return [min(work.micro_rows, work.rows - begin) for begin in range(0, work.rows, work.micro_rows)]
