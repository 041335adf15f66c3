"""Bytes that a step moves, from the plan and its schedule alone: what the engine's counters are held to.

Per trained parameter with everything on SSD (bf16, deep model) this is 14 bytes read and 12 written; units held over
the turn are gathered once and save a read.
"""

from dataclasses import dataclass

from ratel.plan.placement import ELEMENT_BYTES, GPU, SSD, plane_bytes
from ratel.plan.plan import PAGE_BYTES, Plan
from ratel.plan.schedule import gathers
from ratel.plan.shape import UnitSpec
from ratel.units import align_up

NORM_BYTES = 4
"""The norm of a unit's gradient leaves the GPU with the gradient."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes. ``h2d`` and ``d2h`` cross PCIe on a GPU; on a CPU device they are the same copies within DRAM."""

    ssd_read: int = 0
    ssd_written: int = 0
    h2d: int = 0
    d2h: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(ssd_read=self.ssd_read + other.ssd_read, ssd_written=self.ssd_written + other.ssd_written,
                       h2d=self.h2d + other.h2d, d2h=self.d2h + other.d2h)


def step_traffic(plan: Plan, *, after_flush: bool = False) -> Traffic:
    """One training step with its updates, at the plan's batch shape.

    In deferred mode the update's copy of a unit's weights serves the next forward pass too. The first step, and one
    ``after_flush``, has no such copy and reads those weights once more.
    """
    total = _gather_traffic(plan) + _checkpoint_traffic(plan)
    for unit in plan.spec.units:
        if unit.num_trainable and not plan.placement(unit).on_gpu:
            total += _update_traffic(plan, unit)
            if plan.deferred and after_flush:
                total += Traffic(ssd_read=plan.host_weight_bytes(unit))
    return total


def _gather_traffic(plan: Plan) -> Traffic:
    """Weights on their way to the GPU, as often as the schedule says."""
    units = [plan.spec.units[g.unit] for g in gathers(plan, training=True) if not g.is_checkpoint]
    return Traffic(ssd_read=sum(plan.host_weight_bytes(u) for u in units),
                   h2d=sum(u.num_elements * plan.weight_bytes for u in units))


def _update_traffic(plan: Plan, unit: UnitSpec) -> Traffic:
    """The gradient up; optimizer planes from SSD and back; weights back, which a gather has read, or spares reading."""
    ring = {p: plane_bytes(unit, p, fp32=plan.fp32) for p in plan.ring_planes(unit)}
    weights = sum(ELEMENT_BYTES[p] * unit.num_trainable for p in plan.weights_from_ssd(unit))
    # A gradient on SSD is written before the update and read by it; the other planes are read first and written back.
    return Traffic(ssd_read=sum(ring.values()), ssd_written=sum(ring.values()) + weights,
                   d2h=unit.num_trainable * plan.grad_bytes + NORM_BYTES)


def _checkpoint_traffic(plan: Plan) -> Traffic:
    """Each block's input out and back once per micro-batch; on SSD in whole slots, over PCIe the rows there are."""
    work = plan.work
    on_ssd = sum(tier == SSD for tier in plan.checkpoint_tiers)
    off_gpu = sum(tier != GPU for tier in plan.checkpoint_tiers)
    written = on_ssd * work.num_micro * align_up(work.hidden_bytes, PAGE_BYTES)
    crossed = off_gpu * (work.hidden_bytes // work.micro_rows) * work.rows
    return Traffic(ssd_read=written, ssd_written=written, h2d=crossed, d2h=crossed)
