"""What others measured of fine-tuning, explained by the cost model, beside their own explanation."""

from collections.abc import Callable, Iterator
from typing import Any

_INTRODUCTION = (
    "Nothing here was measured by Ratel. The points are those that Xia et al. (IISWC 2024) published with their artifact "
    "(`benchmarks/prediction/xia_points.json`); one run each. Their model is a logarithm of the batch, fitted anew for each data "
    "set and GPU. The other is that of `ratel cost`: a step's overhead, and padded tokens at a rate, the padding following from "
    "the lengths of the data's rows. Both are fitted to the same points by the same measure. \"Left out\": each point is predicted "
    "from the others of its set, if they say what each constant is.")
_SHOWN = ("Mixtral-CS-A40", "Mixtral-MATH-A40")


def xia_lines(result: dict[str, Any]) -> list[str]:
    return [_INTRODUCTION, "", *_fit_lines(result["fits"]), "", *_one_gpu_lines(result["one_gpu"]), "", *_stage_lines(result["stages"]), "",
            *_batch_lines(result["batches"]), "",
            *_cost_lines(result["costs"]), "", *_suspect_lines(result["fits"]), "", *_point_lines(result["fits"]), ""]


def _fit_lines(fits: list[dict[str, Any]]) -> list[str]:
    rows = [[f["set"], str(f["points"]), *(f"{f[key]:.4f}" for key in ("theirs", "ours")), str(f["left_out"]),
             *(f"{f[key]:.4f}" for key in ("theirs_left_out", "ours_left_out")),
             f"{f['theirs_left_out'] / f['ours_left_out']:.1f}", f"{f['constants'][0]:.2f}",
             f"{f['constants'][1] * 1e3:.3f} + {f['constants'][2] * 1e3:.3f} s"] for f in fits]
    return ["Root mean square error, rows/s:", "", *_table(
        ["set", "points", "theirs", "ours", "points left out", "theirs, left out", "ours, left out", "theirs / ours", "overhead, s",
         "ms per padded token, s = share of experts"], rows)]


def _one_gpu_lines(found: dict[str, Any]) -> list[str]:
    constants = "; ".join(f"{name}: {c['overhead_s']:.2f} s and {c['flops'] / 1e12:.1f} TFLOP/s" for name, c in found["constants"].items())
    errors = ", ".join(f"{error:+.1%}" for error in found["math_from_cs"])
    return [f"Two constants, an overhead and the GPU's rate, for all {found['points']} points of Mixtral on the A40, both data sets, with "
            f"2 and 8 experts: error {found['rmse']:.4f} rows/s, {found['relative']:.1%} on average. Fitted to {constants}. "
            f"What is fitted to CS alone misses the points of MATH by {errors}."]


def _stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    rows = [[s["routing"], str(s["batch"]), *(f"{each:.2f}" for each in s["stages_s"]), f"{s['measured_s']:.2f}", f"{s['ours_s']:.2f}",
             f"{s['ours_s'] / s['measured_s'] - 1:+.0%}"] for s in stages]
    return ["Steps whose rows all have 128 tokens (their figure 4, other runs), which no fit has seen, by the two constants. The "
            "larger the batch, the more time the constants say too much; what was published does not say why.", "",
            *_table(["experts", "batch", "forward, s", "backward, s", "optimizer, s", "step, s", "two constants, s", "error"], rows)]


def _batch_lines(batches: list[dict[str, Any]]) -> list[str]:
    rows = [[b["gpu"], b["model"], b["routing"], str(b["data"]), f"{b['row_tokens']:,}", str(b["measured"]), "" if b["run"] is None else str(b["run"]),
             "given" if b["is_given"] else str(b["ours"]), str(b["theirs"])] for b in batches]
    return ["Largest batches. Ours: as many of the longest rows as there are tokens in the largest batch of CS on the A40, on another GPU "
            "by what the weights leave free. Theirs: their formula with their constants and the median row, as their text says.", "",
            *_table(["GPU", "model", "experts", "data or tokens", "longest row", "in their table", "among their points", "ours", "theirs"], rows)]


def _cost_lines(costs: list[dict[str, Any]]) -> list[str]:
    rows = [[c["gpu"], str(c["batch"]), f"{c['rows_per_s']:.3f}", f"{c['dollars_per_hour']:.2f}", f"{c['printed']:.1f}",
             f"{c['measured_rate']:.2f}", f"{c['ours']:.2f}"] for c in costs]
    return ["Their table of costs, which is of 15,000 rows (CS) and 10 epochs: dollars at the rate that they measured, and at the rate that "
            "our fit gives.", "", *_table(["GPU", "batch", "rows/s", "$/h", "$, printed", "$, at their rate", "$, at ours"], rows)]


def _suspect_lines(fits: list[dict[str, Any]]) -> Iterator[str]:
    yield "Points that can hardly be what was measured, though both fits have them:"
    yield ""
    for point in (point for f in fits for point in f["rows_per_s"] if point["suspect"]):
        yield f"- {point['set']}, batch {point['batch']}, {point['sparsity']:.0%} of the experts: {point['suspect']}"


def _point_lines(fits: list[dict[str, Any]]) -> list[str]:
    rows = [[p["set"], f"{p['sparsity']:.0%}", str(p["batch"]), f"{p['rows_per_s']:.3f}{' (suspect)' if p['suspect'] else ''}",
             *(f"{p[key]:.3f} ({p[key] / p['rows_per_s'] - 1:+.0%})" for key in ("theirs", "ours"))] for f in fits for p in f["rows_per_s"]]
    return ["Every point, rows/s (their figures 8 and 15):", "", *_table(["set", "experts", "batch", "measured", "theirs", "ours"], rows)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def xia_curves(result: dict[str, Any]) -> Callable[[Any], None]:
    """Mixtral on the A40: points, our fit, and theirs."""
    found = [f for f in result["fits"] if f["set"] in _SHOWN]

    def paint(axes: Any) -> None:
        for f in found:
            for sparsity in (0.25, 1.0):
                points = sorted((p for p in f["rows_per_s"] if p["sparsity"] == sparsity), key=lambda p: p["batch"])
                batches = [p["batch"] for p in points]
                marks = axes.plot(batches, [p["rows_per_s"] for p in points], "o",
                                  label=f"{f['set'].split('-')[1]}, {'all' if sparsity == 1.0 else '2 of 8'} experts")
                axes.plot(batches, [p["ours"] for p in points], "-", color=marks[0].get_color())
                axes.plot(batches, [p["theirs"] for p in points], "--", color=marks[0].get_color(), alpha=0.6)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows in a batch (line: ours; dashed: theirs)")
        axes.set_ylabel("rows/s")
        axes.legend()

    return paint
