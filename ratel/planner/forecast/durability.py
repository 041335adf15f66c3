"""What making states last costs: bytes and seconds of each save, and per step."""

from dataclasses import dataclass, replace

from ratel.planner.machine.hardware import Hardware
from ratel.planner.machine.pipes import ssd_rates
from ratel.planner.placement import SSD
from ratel.planner.plan import Plan
from ratel.units import format_bytes, format_seconds


@dataclass(frozen=True, kw_only=True)
class Saving:
    """``save_every`` 0: saves are the user's own business. Seconds are those of the SSDs, copies
    taken to be on as fast ones; None where their rate is not known. Training goes on meanwhile."""

    mode: str
    save_every: int
    read_bytes: int
    written_bytes: int
    commit_space_bytes: int
    """On the SSDs, with two versions of everything."""
    seconds: float | None

    @property
    def step_s(self) -> float | None:
        """Per step, if nothing of it were hidden."""
        return None if self.seconds is None or not self.save_every else self.seconds / self.save_every

    def describe(self) -> str:
        how = {"step": "by commits in place on the SSDs", "checkpoint": "by copies in OUT/state",
               "off": "by explicit copies only"}[self.mode]
        often = f" every {self.save_every} steps" if self.save_every > 1 else " every step" if self.save_every else ""
        cost = f"writes {format_bytes(self.written_bytes)}"
        if self.read_bytes:
            cost = f"reads {format_bytes(self.read_bytes)} and {cost}"
        if self.mode == "step":
            cost += " besides what training writes anyway"
        if self.seconds is not None:
            cost += f": {format_seconds(self.seconds)} of the SSDs' time"
        if self.step_s is not None and self.save_every > 1:
            cost += f", {format_seconds(self.step_s)} a step"
        space = format_bytes(self.commit_space_bytes)
        instead = "" if self.mode == "step" else f"\n  (commits in place would take {space} of SSD space)"
        return f"states last {how}{often}; a save {cost}{instead}"


def saving(plan: Plan, hardware: Hardware | None, *, save_every: int = 0) -> Saving:
    on_ssd = sum(plan.formats.changing_bytes(u, p) for u in plan.spec.units for p in plan.formats.planes
                 if plan.placement(u).tier(p) == SSD)
    read = 0 if plan.commits else on_ssd
    rates = None if hardware is None else ssd_rates(hardware)
    return Saving(mode=plan.durable, save_every=save_every, read_bytes=read, written_bytes=plan.save_bytes,
                  commit_space_bytes=replace(plan, durable="step").ssd_bytes,
                  seconds=None if rates is None else rates.seconds(read, plan.save_bytes))
