"""What each resource attained in a step, beside what the machine was measured to give."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ratel.planner.formats import EXACT, StateFormats
from ratel.planner.machine.hardware import Hardware
from ratel.planner.machine.pipes import link, ssd_rates
from ratel.trace.bubbles import Bubbles, find_bubbles
from ratel.trace.timeline import Span, Timeline
from ratel.units import format_bytes

_SSD, _READ, _WRITE = "ssd", "ssd read", "ssd write"
_OF_SSD = (_READ, _WRITE)
"""Parts of one resource: neither binds by itself, since both directions share what a device
gives."""


@dataclass(frozen=True, kw_only=True)
class Attained:
    """One resource in one step. ``busy_s`` is None for DRAM, which nothing watches; ``num_bytes``
    for the GPU's computation; ``at_rate_s``, the time that its work takes at the measured rates,
    where the machine was not measured."""

    busy_s: float | None
    num_bytes: int | None
    at_rate_s: float | None

    def fraction(self, step_s: float) -> float | None:
        """The share of its measured rate that the resource attained while it was busy; DRAM during
        the whole step."""
        time_s = step_s if self.busy_s is None else self.busy_s
        return None if self.at_rate_s is None or not time_s else self.at_rate_s / time_s


@dataclass(frozen=True, kw_only=True)
class StepReport:
    step_s: float
    resources: dict[str, Attained]
    bubbles: Bubbles

    def bound(self, what: str) -> tuple[str, float] | None:
        """The resource with the largest ``busy_s`` or ``at_rate_s``, and that; None where it is not
        known."""
        times = {name: getattr(r, what) for name, r in self.resources.items()
                 if name not in _OF_SSD and getattr(r, what) is not None}
        return max(times.items(), key=lambda item: item[1]) if times else None

    def to_json(self) -> dict[str, Any]:
        bounds = {}
        for key, what in (("busy", "busy_s"), ("at_rate", "at_rate_s")):
            by, seconds = self.bound(what) or (None, None)
            bounds |= {f"bound_{key}_by": by, f"bound_{key}_s": seconds,
                       f"fraction_of_bound_{key}": None if seconds is None else seconds / self.step_s}
        resources = {name: {**asdict(r), "fraction_of_rate": r.fraction(self.step_s)} for name, r in self.resources.items()}
        exposed_s = self.bubbles.exposed_optimizer_s
        return {"step_s": self.step_s, "resources": resources, **bounds, "compute_busy_s": self.bubbles.busy_s,
                "bubbles_s": self.bubbles.idle_s, "exposed_optimizer_s": exposed_s,
                "exposed_optimizer_fraction": exposed_s / self.step_s}


def describe(report: dict[str, Any]) -> str:
    """`StepReport.to_json` as a table and a list."""
    step_s = report["step_s"]
    lines = [_row("resource", "busy s", "of step", "moved", "rate/s", "s at measured rate", "of it")]
    lines += [_line(name, resource, step_s) for name, resource in report["resources"].items()]
    for key, text in (("busy", "as it was busy"), ("at_rate", "at its measured rate")):
        if report[f"bound_{key}_by"] is not None:
            lines.append(f"bound {text}: {report[f'bound_{key}_by']}, {report[f'bound_{key}_s']:.3f} s, "
                         f"{report[f'fraction_of_bound_{key}']:.1%} of the step's {step_s:.3f} s")
    bubbles = report["bubbles_s"]
    lines.append(f"compute was idle for {sum(bubbles.values()):.3f} s:")
    lines += [f"  {cause:<24} {seconds:8.3f} s {seconds / step_s:7.1%}" for cause, seconds in bubbles.items()]
    return "\n".join([*lines, f"exposed optimizer: {report['exposed_optimizer_s']:.3f} s, "
                              f"{report['exposed_optimizer_fraction']:.1%} of the step"])


def _line(name: str, resource: dict[str, Any], step_s: float) -> str:
    busy_s, num_bytes = resource["busy_s"], resource["num_bytes"]
    time_s = step_s if busy_s is None else busy_s
    cells = ("" if busy_s is None else f"{busy_s:.3f}", "" if busy_s is None else f"{busy_s / step_s:.1%}",
             "" if num_bytes is None else format_bytes(num_bytes),
             "" if num_bytes is None or not time_s else format_bytes(num_bytes / time_s),
             "" if resource["at_rate_s"] is None else f"{resource['at_rate_s']:.3f}",
             "" if resource["fraction_of_rate"] is None else f"{resource['fraction_of_rate']:.0%}")
    return _row(name, *cells)


def _row(name: str, *cells: str) -> str:
    return " ".join([f"{name:<14}", *(f"{cell:>{width}}" for cell, width in zip(cells, (8, 8, 11, 11, 19, 6)))]).rstrip()


def report_step(timeline: Timeline, hardware: Hardware | None, compute_s: float | None,
                formats: StateFormats = EXACT["bf16"]) -> StepReport:
    """``compute_s``: of the step's computation at the machine's measured rate
    (`ratel.planner.forecast.cost.predict`); ``formats``: of the states that were updated."""
    lanes: dict[str, list[Span]] = {}
    for span in timeline.spans:
        lanes.setdefault(span.lane, []).append(span)
    moved = {name: sum(_bytes_within(span, timeline.step_s) for lane, spans in lanes.items() for span in spans
                       if lane.startswith(name)) for name in ("h2d", "d2h", *_OF_SSD, "cpu optimizer")}
    busy = {name: busy_seconds(lanes.get(name, ()), timeline.step_s) for name in ("compute", "h2d", "d2h", "cpu optimizer")}
    busy |= {name: _busiest_directory(lanes, names, timeline.step_s) for name, names in
             ((_READ, (_READ,)), (_WRITE, (_WRITE,)), (_SSD, _OF_SSD))}
    moved[_SSD] = moved[_READ] + moved[_WRITE]
    dram = sum(moved[name] for name in ("h2d", "d2h", _SSD, "cpu optimizer"))
    rates = _seconds_at_rate(hardware, moved, dram, formats) if hardware is not None else {}
    resources = {name: Attained(busy_s=busy[name], num_bytes=moved.get(name), at_rate_s=rates.get(name))
                 for name in ("compute", "h2d", "d2h", _READ, _WRITE, _SSD, "cpu optimizer")}
    resources["compute"] = Attained(busy_s=busy["compute"], num_bytes=None, at_rate_s=compute_s)
    resources["dram"] = Attained(busy_s=None, num_bytes=dram, at_rate_s=rates.get("dram"))
    return StepReport(step_s=timeline.step_s, resources=resources, bubbles=find_bubbles(timeline))


def _seconds_at_rate(hardware: Hardware, moved: dict[str, int], dram: int, formats: StateFormats) -> dict[str, float]:
    """Both directions of a pipe share it, as in `ratel.planner.forecast.cost`."""
    h2d_s, d2h_s = link(hardware).seconds(moved["h2d"], moved["d2h"])
    params = moved["cpu optimizer"] / formats.update_bytes
    seconds = {"h2d": h2d_s, "d2h": d2h_s, "dram": dram / hardware.dram_bps,
               "cpu optimizer": params / (formats.update_speed * hardware.adam_params_per_s)}
    ssd = ssd_rates(hardware)
    if ssd is None:
        return seconds
    return seconds | {_READ: moved[_READ] / ssd.read_bps, _WRITE: moved[_WRITE] / ssd.write_bps,
                      _SSD: ssd.seconds(moved[_READ], moved[_WRITE])}


def busy_seconds(spans: Iterable[Span], step_s: float) -> float:
    """Seconds of the step in which any of the spans goes on."""
    total_s = until_s = 0.0
    for span in sorted(spans, key=lambda s: s.begin_s):
        begin_s, end_s = max(span.begin_s, until_s), min(span.end_s, step_s)
        total_s += max(end_s - begin_s, 0.0)
        until_s = max(until_s, end_s)
    return total_s


def _busiest_directory(lanes: dict[str, list[Span]], names: tuple[str, ...], step_s: float) -> float:
    by_directory: dict[str, list[Span]] = {}
    for lane, spans in lanes.items():
        for name in names:
            if lane.startswith(f"{name} "):
                by_directory.setdefault(lane.removeprefix(f"{name} "), []).extend(spans)
    return max((busy_seconds(spans, step_s) for spans in by_directory.values()), default=0.0)


def _bytes_within(span: Span, step_s: float) -> int:
    """The bytes of a span; of one that crosses the step's begin or end, the share within."""
    if span.end_s <= span.begin_s:
        return span.num_bytes
    inside_s = min(span.end_s, step_s) - max(span.begin_s, 0.0)
    return round(span.num_bytes * max(inside_s, 0.0) / (span.end_s - span.begin_s))
