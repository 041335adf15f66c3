"""Pictures for evaluation_data.md, drawn from the results that its tables are made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ratel.units import GIB

SIZE_INCHES = (7.0, 4.0)


def draw(path: Path, title: str, paint: Callable[[Any], None]) -> None:
    """Write an SVG. The same results give the same file: no date, and no random names in it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "ratel", "svg.fonttype": "none"}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.subplots()
        paint(axes)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def curve(content: dict[str, Any]) -> Callable[[Any], None]:
    """Tokens/s over sequences in a step: measured and predicted."""
    points = sorted((p for p in content["points"] if "error" not in p), key=lambda p: p["batch_size"])
    sizes = [p["batch_size"] for p in points]

    def paint(axes: Any) -> None:
        axes.plot(sizes, [p["tokens_per_s"] for p in points], "o-", label="measured")
        predicted = [p for p in points if p.get("predicted_s")]
        rates = [p["batch_size"] * p["seq_len"] / p["predicted_s"] for p in predicted]
        axes.plot([p["batch_size"] for p in predicted], rates, "s--", label="predicted")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"sequences of {points[0]['seq_len'] if points else ''} tokens in a step")
        axes.set_ylabel("tokens/s")
        axes.legend()

    return paint


def largest(results: list[dict[str, Any]]) -> Callable[[Any], None]:
    """What fits over limits on DRAM, and what a step of it takes."""
    what, label = ("layers", "parameters, M") if "layers" in results[0] else ("batch_size", "sequences in a step")
    found = sorted((r for r in results if r.get(what)), key=lambda r: r["dram_limit_bytes"])
    heights = [r["parameters"] / 1e6 if what == "layers" else r["batch_size"] for r in found]

    def paint(axes: Any) -> None:
        limits = [r["dram_limit_bytes"] / GIB for r in found]
        axes.plot(limits, heights, "o-")
        for r, place in zip(found, zip(limits, heights)):
            axes.annotate(f"{r['step_s']:.3g} s/step", place, textcoords="offset points", xytext=(6, -12), fontsize=8)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.15)  # for the text beside the last point
        axes.set_xlabel("limit on DRAM, GiB")
        axes.set_ylabel(label)

    return paint


def states(content: dict[str, Any]) -> Callable[[Any], None]:
    """Evaluation losses over steps: one colour for each format, one line for each seed."""
    names = list(dict.fromkeys(p["states"] for p in content["points"]))

    def paint(axes: Any) -> None:
        for p in content["points"]:
            number = names.index(p["states"])
            steps, losses = zip(*p["eval_losses"])
            label = p["states"] if p["seed"] == content["summary"]["seeds"][0] else None
            axes.plot(steps, losses, "-", color=f"C{number}", alpha=0.7, label=label)
        axes.set_xlabel("steps")
        axes.set_ylabel("evaluation loss")
        axes.legend()

    return paint
