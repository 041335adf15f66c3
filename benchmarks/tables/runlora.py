"""RunLoRA's table and its picture, made anew: time and memory that our adapters save beside
peft's."""

from collections.abc import Callable
from typing import Any

from ratel.training.bench import adapted_report
from ratel.training.bench.published import published

Content = dict[str, Any]
INTRODUCTION = (
    "Forward and backward of whole models in GPU memory, in RunLoRA's batches and ranks, beside peft on the same machine: the "
    "mean of ten runs or more, after warm-up. Weights and tokens are random, adapters and weights have one type on both sides, "
    "nothing is run twice. Memory is the peak above weights and adapters. \"RunLoRA's\" is what its authors published of their "
    "own code, on a GPU of 80 GB; all else is measured here.")
PUBLISHED = "RunLoRA, published"


def lines(content: Content) -> list[str]:
    return [INTRODUCTION, "", *adapted_report.table(content["points"]).splitlines()]


def savings(content: Content) -> Callable[[Any], None]:
    """Bars for each row: less time than the peer, by orders, and what RunLoRA has published."""
    points = content["points"]
    names = list(dict.fromkeys(one["name"] for point in points for one in point["ours"]))
    labels = [f"{p['model']}\nr {p['rank']}" + (f"\ndropout {p['dropout']}" if p["dropout"] else "") for p in points]
    heights: dict[str, list[float]] = {name: [_less_time(point, name) for point in points] for name in names}
    rows = [published(point["model"], point["rank"]) for point in points]
    heights[PUBLISHED] = [row.time_saved if row else 0.0 for row in rows]

    def paint(axes: Any) -> None:
        width = 0.8 / len(heights)
        for index, (name, values) in enumerate(heights.items()):
            begin = (index - (len(heights) - 1) / 2) * width
            axes.bar([place + begin for place in range(len(points))], values, width, label=name)
        axes.set_xticks(range(len(points)), labels, fontsize=6)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("less time than peft, %")
        axes.legend(fontsize=8)

    return paint


def _less_time(point: dict[str, Any], name: str) -> float:
    one = next((one for one in point["ours"] if one["name"] == name), None)
    return 0.0 if one is None else adapted_report.saved(one, point["peer"], "mean_s") or 0.0
