"""A plan and its prediction as a table that a person understands, and as numbers for programs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ratel.planner.forecast.cost import RESOURCES, Prediction, predict
from ratel.planner.forecast.durability import Saving, saving
from ratel.planner.forecast.wear import Wear
from ratel.planner.machine.hardware import Hardware
from ratel.planner.plan import Plan
from ratel.planner.report.advice import Gain
from ratel.planner.report.plan_text import describe_optimizer, describe_plan, plan_to_json
from ratel.planner.report.state_choices import StateChoice
from ratel.planner.report.streaming import hiding_tokens
from ratel.units import format_bytes, format_seconds

SHOWN_SHARE = 0.03
"""Purposes that take less than this share of a tier are summed up."""

NAMES = {"compute": "GPU computes", "h2d": "link to the GPU", "d2h": "link from the GPU", "cpu optimizer": "CPU optimizer",
         "dram": "DRAM bandwidth", "ssd": "SSDs"}

Row = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    plan: Plan
    prediction: Prediction
    hardware: Hardware
    ssd_budget: int | None
    wear: Wear | None
    """How the SSDs wear; ``None`` without SSDs."""
    gains: tuple[Gain, ...] | None
    """What more of each resource would gain; ``None``: not asked for."""
    states: tuple[StateChoice, ...] = ()
    """What each format of states would bring; empty: not asked for."""
    notes: tuple[str, ...] = ()
    save_every: int = 0

    @property
    def saving(self) -> Saving:
        return saving(self.plan, self.hardware, save_every=self.save_every)

    @property
    def tiers(self) -> dict[str, tuple[dict[str, int], int | None]]:
        """By tier: bytes by purpose, and what is allowed (None: no limit)."""
        limit = self.ssd_budget if self.ssd_budget is not None and self.ssd_budget < 1 << 60 else None
        return {"GPU": (self.plan.gpu_items, self.plan.gpu_budget), "DRAM": (self.plan.host_items, self.plan.dram_budget),
                "SSD": (self.plan.ssd_items, limit)}

    def describe(self) -> str:
        """Fits, where it goes, how long a step takes, what binds, what would help, what it
        writes."""
        sections = [list(self._heading()), self._memory(), self._time(), list(self._durability()), self._states(), list(self._advice()),
                    [f"note: {note}" for note in self.notes]]
        return "\n\n".join("\n".join(section) for section in sections if section)

    def _heading(self) -> Iterator[str]:
        plan, prediction = self.plan, self.prediction
        yield f"{plan.spec.name} fits on {self.hardware.name}"
        yield "\n".join(describe_plan(plan).splitlines()[:1])
        yield (f"{plan.work.rows} x {plan.work.seq_len} tokens a step, micro-batches of {plan.work.micro_rows}, "
               f"{describe_optimizer(plan)}, {plan.formats.compute.name}")
        frozen = plan.spec.num_params - plan.spec.num_trainable_params
        flops = (6.0 * plan.spec.num_params - 2.0 * frozen) * prediction.tokens_per_s
        yield (f"step {format_seconds(prediction.step_s)}: {prediction.tokens_per_s:,.0f} tokens/s, "
               f"{flops / 1e12:,.1f} TFLOP/s counted as 6 per parameter and token{', 4 where it is frozen' if frozen else ''}")
        if plan.early:
            clipped_s = predict(plan.while_clipped, self.hardware).step_s
            yield f"while gradients are clipped, {format_seconds(clipped_s)}: no update is made before their norm is known"
        yield (f"bound by: {NAMES[prediction.bound_by]}, busy for {format_seconds(prediction.bound_s)} "
               f"({prediction.bound_s / prediction.step_s:.0%} of the step)")
        if self.hiding_tokens is not None:
            yield (f"the frozen weights come under computation from {self.hiding_tokens:,} tokens a step on; here are "
                   f"{plan.work.rows * plan.work.seq_len:,}")

    @cached_property
    def hiding_tokens(self) -> int | None:
        return hiding_tokens(self.plan, self.prediction, self.hardware)

    def _memory(self) -> list[str]:
        rows: list[Row] = [("memory", "used", "allowed", "left")]
        for tier, (items, allowed) in self.tiers.items():
            used = sum(items.values())
            if not used:
                continue
            limits = ("no limit", "") if allowed is None else (format_bytes(allowed), format_bytes(allowed - used))
            rows.append((tier, format_bytes(used), *limits))
            rows += [(f"  {name}", format_bytes(num_bytes), "", "") for name, num_bytes in summed(items)]
        return table(rows) + list(self._stripes())

    def _stripes(self) -> Iterator[str]:
        weights = self.hardware.stripe_weights
        if self.plan.ssd_items and len(set(weights)) > 1:
            shares = ", ".join(f"{weight / sum(weights):.0%}" for weight in weights)
            yield f"of what is on the SSDs each holds, by its speed: {shares}"

    def _time(self) -> list[str]:
        prediction = self.prediction
        rows: list[Row] = [("busy", "forward", "backward", "step", "share")]
        for name in RESOURCES:
            both = prediction.busy_s[name]
            rows.append((NAMES[name], *map(format_seconds, (prediction.forward[name], prediction.backward[name], both)),
                         f"{both / prediction.step_s:.0%}"))
        rows.append(("time", *map(format_seconds, (prediction.forward_s, prediction.backward_s, prediction.step_s)), "100%"))
        return table(rows)

    def _durability(self) -> Iterator[str]:
        yield self.saving.describe()
        if self.wear is None or not self.wear.step_bytes:
            return
        worn = self.wear
        yield (f"SSD wear: {format_bytes(worn.step_bytes)} written a step, {worn.day_bytes / 1e12:,.1f} TB in a day of "
               "training"
               + (f", {worn.drive_writes_per_day:.1f} drive writes a day" if worn.drive_writes_per_day is not None else ""))
        if worn.years is not None:
            yield f"  the rated endurance lasts for {worn.years:.1f} years of training, {worn.years * 365.25:,.0f} days"

    def _states(self) -> list[str]:
        if not self.states:
            return []
        rows: list[Row] = [("states", "a parameter", "all", "step", "tokens/s")]
        for choice in self.states:
            fits = choice.step_s is not None
            rows.append((f"{choice.states}{' (planned)' if choice.states == self.plan.formats.name else ''}", f"{choice.param_bytes:g} B",
                         format_bytes(choice.state_bytes), format_seconds(choice.step_s) if fits else "does not fit",
                         f"{choice.tokens_per_s:,.0f}" if fits else ""))
        return table(rows) + [f"  {choice.states}: {choice.effect}" for choice in self.states]

    def _advice(self) -> Iterator[str]:
        if self.gains is None:
            return
        if not self.gains:
            yield "more of any one resource would gain less than 0.5%"
            return
        yield "what would help most:"
        yield from table([(f"  {gain.what}", f"{gain.tokens_per_s:,.0f} tokens/s",
                           f"+{gain.gained / self.prediction.tokens_per_s:.0%}") for gain in self.gains])

    def to_json(self) -> dict[str, Any]:
        prediction = self.prediction
        return {
            "fits": True, "hardware": self.hardware.to_json(), "step_s": prediction.step_s,
            "clipped_step_s": predict(self.plan.while_clipped, self.hardware).step_s,
            "tokens_per_s": prediction.tokens_per_s, "hiding_tokens": self.hiding_tokens, "bound_by": prediction.bound_by, "bound_s": prediction.bound_s,
            "forward_s": prediction.forward_s, "backward_s": prediction.backward_s, "busy_s": prediction.busy_s,
            "forward_busy_s": prediction.forward, "backward_busy_s": prediction.backward,
            "memory": {tier: {"used": sum(items.values()), "allowed": allowed, "by_purpose": items}
                       for tier, (items, allowed) in self.tiers.items()},
            "ssd_stripes": list(self.hardware.stripe_weights), "durable": self.plan.durable, "saving": asdict(self.saving),
            "wear": None if self.wear is None else asdict(self.wear),
            "gains": None if self.gains is None else [asdict(gain) for gain in self.gains],
            "states": [asdict(choice) for choice in self.states], "notes": list(self.notes), "plan": plan_to_json(self.plan),
        }


def summed(items: dict[str, int]) -> list[tuple[str, int]]:
    """Largest first; what is small in one line."""
    least = SHOWN_SHARE * sum(items.values())
    shown = sorted(((name, num) for name, num in items.items() if num >= least), key=lambda pair: -pair[1])
    rest = sum(num for num in items.values() if num < least)
    return shown + ([("other", rest)] if rest else [])


def table(rows: list[Row]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) if number else cell.ljust(width)
                      for number, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
