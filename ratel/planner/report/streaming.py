"""From how many tokens a step on a frozen base comes to the GPU unseen."""

from math import ceil

from ratel.planner.forecast.cost import Prediction
from ratel.planner.machine.hardware import Hardware
from ratel.planner.machine.pipes import ssd_rates
from ratel.planner.plan import Plan
from ratel.planner.schedule import gathers
from ratel.planner.traffic import Traffic, gather_traffic


def hiding_tokens(plan: Plan, prediction: Prediction, hardware: Hardware) -> int | None:
    """Weights that nothing changes cost a step the same bytes whatever its batch, and computation
    grows with it. None where some streamed unit is trained, whose gradients and updates move, too,
    or where nothing streams. ``prediction``: of the plan on this hardware."""
    streamed = [gather.unit for gather in gathers(plan, training=True) if gather.is_unit]
    if not streamed or any(plan.spec.units[unit].num_trainable for unit in streamed):
        return None
    moved = sum((gather_traffic(plan, unit) for unit in streamed), Traffic())
    seconds, drives = moved.h2d / hardware.h2d_bps, ssd_rates(hardware)
    if moved.ssd_read and drives is not None:
        seconds = max(seconds, drives.seconds(moved.ssd_read, 0))
    tokens = plan.work.rows * plan.work.seq_len
    return ceil(tokens * seconds / prediction.busy_s["compute"])
