"""A plan as numbers for programs, and as a few lines that a person understands."""

from dataclasses import asdict
from typing import Any

from ratel.planner.placement import DRAM, GPU, SSD
from ratel.planner.plan import Plan
from ratel.planner.traffic import step_traffic
from ratel.units import format_bytes


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """All of it, with the bytes that it takes and moves."""
    units = [{"name": u.name, "parameters": u.num_params, "trained": u.num_trainable_params,
              "planes": asdict(plan.placement(u))} for u in plan.spec.units]
    return {"model": plan.spec.name, "parameters": plan.spec.num_params, "dtype": plan.formats.compute.name,
            "optimizer": plan.optimizer,
            "early_updates": [plan.spec.units[unit].name for unit in sorted(plan.early)],
            "work": {**asdict(plan.work), "micro_batches": plan.work.num_micro},
            "buffers": asdict(plan.buffers), "checkpoints": list(plan.checkpoint_tiers),
            "activations": [dict(kept) for kept in plan.kept],
            "spill": asdict(plan.spill) if plan.spill else None, "units": units,
            "gpu_bytes": plan.gpu_items, "dram_bytes": plan.host_items, "ssd_bytes": plan.ssd_items,
            "step_traffic_bytes": asdict(step_traffic(plan)),
            "gpu_budget": plan.gpu_budget, "dram_budget": plan.dram_budget}


def describe_optimizer(plan: Plan) -> str:
    """Its mode, and how many units are updated early."""
    early = f", {len(plan.early)} units early" if plan.early else ""
    return f"{plan.optimizer} optimizer{early}"


def describe_plan(plan: Plan) -> str:
    """A few lines a person understands."""
    by_tier = {GPU: 0, DRAM: 0, SSD: 0}
    for unit in plan.spec.units:
        for plane in plan.formats.planes:
            by_tier[plan.placement(unit).tier(plane)] += plan.formats.num_bytes(unit, plane)
    states = ", ".join(f"{format_bytes(b)} on {t.upper()}" for t, b in by_tier.items() if b)
    work = plan.work
    return (f"{plan.spec.name}: {plan.spec.num_params / 1e6:,.1f} M parameters; states {states}\n"
            f"{work.rows} x {work.seq_len} tokens a step in {work.num_micro} micro-batch"
            f"{'es' if work.num_micro > 1 else ''}; {describe_optimizer(plan)}; "
            f"GPU {format_bytes(plan.gpu_bytes)}, DRAM {format_bytes(plan.dram_bytes)}, "
            f"SSD {format_bytes(plan.ssd_bytes)}")
