"""The picture of a plan: memory by tier, and time by resource."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratel.config import check_can_write
from ratel.errors import RatelError
from ratel.units import GIB

if TYPE_CHECKING:
    from ratel.planner.report.report import Report

SIZE_INCHES = (11.0, 6.5)
CHARACTERS = 150
"""How many characters of the small print fit across the whole width of a bar."""


def check_can_draw(path: Path) -> None:
    """Before planning, which takes longer. Raises RatelError without matplotlib, too."""
    check_can_write(path, "--plot")
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure  # noqa: F401 - what `draw` needs
    except ImportError as error:
        raise RatelError("drawing needs matplotlib", field="--plot", value=path,
                         remedy="Run `pip install matplotlib`") from error
    if path.suffix.lower().removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        raise RatelError("is of no format that can be drawn", field="--plot", value=path,
                         remedy="Give a file that ends in .png, .svg or .pdf")


def draw(report: "Report", path: Path) -> None:
    """Write the picture; the suffix of ``path`` decides about its format. `check_can_draw` has been
    asked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    memory, time = figure.subplots(2, 1)
    _draw_memory(memory, report)
    _draw_time(time, report)
    figure.suptitle(f"{report.plan.spec.name} on {report.hardware.name}", fontsize=11)
    figure.savefig(path)


def _draw_memory(axes: Any, report: "Report") -> None:
    """One bar per tier, each as a share of what it may use: tiers differ by orders of magnitude."""
    from ratel.planner.report.report import summed

    tiers = [(tier, items, allowed) for tier, (items, allowed) in report.tiers.items() if items]
    colors: dict[str, str] = {}
    for row, (tier, items, allowed) in enumerate(tiers):
        used, begin = sum(items.values()), 0.0
        for name, num_bytes in summed(items):
            share = num_bytes / (allowed or used)
            color = colors.setdefault(name, f"C{len(colors) % 10}")
            axes.barh(row, share, left=begin, color=color, edgecolor="white")
            if share * CHARACTERS > len(name):
                axes.text(begin + share / 2, row, f"{name}\n{num_bytes / GIB:,.1f}", ha="center", va="center", fontsize=7)
            begin += share
    labels = [f"{tier}\n{sum(items.values()) / GIB:,.0f} of {allowed / GIB:,.0f} GiB" if allowed
              else f"{tier}\n{sum(items.values()) / GIB:,.0f} GiB" for tier, items, allowed in tiers]
    axes.set_yticks(range(len(tiers)), labels)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of what may be used (GiB by purpose)")
    axes.invert_yaxis()


def _draw_time(axes: Any, report: "Report") -> None:
    from ratel.planner.forecast.cost import RESOURCES
    from ratel.planner.report.report import NAMES

    prediction = report.prediction
    for row, name in enumerate(RESOURCES):
        forward, backward = prediction.forward[name], prediction.backward[name]
        label = {"forward": "forward", "backward": "backward"} if row == 0 else {"forward": None, "backward": None}
        axes.barh(row, forward, color="C0", label=label["forward"])
        axes.barh(row, backward, left=forward, color="C1", label=label["backward"])
    axes.axvline(prediction.step_s, color="black", linewidth=1, label=f"step {prediction.step_s:,.3g} s")
    axes.set_yticks(range(len(RESOURCES)), [NAMES[name] for name in RESOURCES])
    axes.set_xlabel(f"seconds busy in a step ({prediction.tokens_per_s:,.0f} tokens/s)")
    axes.invert_yaxis()
    axes.legend(loc="lower right", fontsize=8)
