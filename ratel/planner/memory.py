"""How many bytes a plan takes on each tier, by purpose."""

from math import prod
from typing import TYPE_CHECKING

from ratel.planner.placement import DRAM, GPU, SSD
from ratel.planner.shape import StageSpec, UnitSpec
from ratel.planner.slot_layout import PAGE_BYTES
from ratel.units import align_up

if TYPE_CHECKING:
    from ratel.planner.plan import Plan


def gpu_items(plan: "Plan") -> dict[str, int]:
    """Bytes on the GPU by purpose."""
    work = plan.work
    items = {"resident planes": _resident_bytes(plan, GPU)}
    for cls in (found.name for found in plan.spec.slot_classes):
        items[f"weight slots ({cls})"] = plan.weight_slot_count(cls) * plan.max_bytes(cls, "weights")
        items[f"gradient slots ({cls})"] = plan.grad_slot_count(cls) * plan.max_bytes(cls, "grads")
        if cls in plan.accumulators:
            items[f"fp32 accumulator ({cls})"] = plan.max_bytes(cls, "acc")
    if plan.formats.merges:
        items["merge staging"] = max((u.num_elements * 4 for u, _ in plan.alike), default=0)
    if plan.formats.merges or plan.spec.has_fp32_units:
        items["merged resident weights"] = max((_merged_bytes(plan, stage) for stage in plan.spec.stages), default=0)
    items["checkpoints kept"] = _activation_bytes(plan, GPU, inner=False)
    items["hidden states and their gradients"] = 3 * work.num_micro * work.hidden_bytes
    items["checkpoint slots"] = prod(plan.return_slots(inner=False))
    items["inner activations kept"] = _activation_bytes(plan, GPU, inner=True)
    items["inner activation slots"] = prod(plan.return_slots(inner=True))
    items["inner activations on their way out"] = plan.buffers.inner_slots * plan.keeping.largest_inner_of_a_block
    items["workspace"] = plan.workspace_bytes
    return {name: num_bytes for name, num_bytes in items.items() if num_bytes}


def dram_items(plan: "Plan") -> dict[str, int]:
    """Bytes of the arena by purpose, each part rounded to pages as the arena does."""
    items = {"resident planes": _resident_bytes(plan, DRAM),
             "second planes of early updates": sum(number * paged(plan.formats.num_bytes(u, p))
                                                   for u, number in plan.alike for p in plan.second_planes(u))}
    for cls in (found.name for found in plan.spec.slot_classes):
        items[f"weight slots ({cls})"] = plan.host_weight_slot_count(cls) * paged(plan.host_weight_slot_bytes(cls))
        items[f"gradient slots ({cls})"] = plan.host_grad_slot_count(cls) * paged(plan.max_bytes(cls, "grads"))
    items["gradient norms"] = plan.norm_bytes
    items["optimizer ring"] = plan.buffers.ring_slots * paged(plan.ring_slot_bytes)
    for name, inner in (("checkpoint", False), ("inner activation", True)):
        items[f"{name}s"] = _activation_bytes(plan, DRAM, inner=inner)
        count, num_bytes = plan.staging_slots(inner)
        items[f"{name} slots"] = 2 * count * paged(num_bytes)
    items["saved tensors of a block"] = paged(plan.spill.region_bytes) if plan.spill else 0
    items["buffers for saving"] = plan.save_pieces * plan.save_piece_bytes
    return {name: num_bytes for name, num_bytes in items.items() if num_bytes}


def ssd_items(plan: "Plan") -> dict[str, int]:
    """Bytes of the volumes by purpose."""
    items = {"planes": plan.num_slots * plan.slot_layout.num_bytes, "frozen planes": plan.frozen_layout.num_bytes,
             "gradients": sum(number * paged(plan.formats.num_bytes(u, "g")) for u, number in plan.alike
                              if plan.deferred and plan.placement(u).g == SSD)}
    items["checkpoints"] = _activation_bytes(plan, SSD, inner=False)
    items["inner activations"] = _activation_bytes(plan, SSD, inner=True)
    return {name: num_bytes for name, num_bytes in items.items() if num_bytes}


def ring_bytes(plan: "Plan", unit: UnitSpec) -> int:
    planes = plan.ring_planes(unit)
    chunk = plan.chunk_of(unit) if planes else 0
    return sum(paged(plan.formats.of(unit).encoding(p).num_bytes(chunk)) for p in planes)


def _merged_bytes(plan: "Plan", stage: StageSpec) -> int:
    """The fp32 compute copies, made while the stage runs, of units whose halves are on the
    GPU."""
    units = [plan.spec.units[index] for index in stage.units]
    return sum(u.num_elements * 4 for u in units if plan.placement(u).on_gpu and plan.formats.of(u).merges)


def _resident_bytes(plan: "Plan", tier: str) -> int:
    planes = (*plan.formats.planes, "g") if plan.deferred or tier == GPU else plan.formats.planes
    return sum(number * paged(plan.formats.num_bytes(u, p)) for u, number in plan.alike for p in planes
               if plan.placement(u).tier(p) == tier)


def _activation_bytes(plan: "Plan", tier: str, *, inner: bool) -> int:
    """Bytes that all micro-batches keep in a tier; in DRAM and on SSD in whole pages."""
    return plan.work.num_micro * plan.keeping.num_bytes(tier, inner=inner)


def paged(num_bytes: int) -> int:
    """As the arena and the volumes round each part."""
    return align_up(num_bytes, PAGE_BYTES)
