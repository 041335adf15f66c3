"""How well steps were predicted, and what planning is worth."""

from typing import Any

from ratel.units import GIB

REALITY_HEAD = ("| configuration | parameters | batch x seq | micro-batches | measured s | predicted s | error | simulated s | bound by "
                "| GPU peak, of planned | DRAM peak, of planned |")
PAPER_INTRODUCTION = (
    "Nothing here was measured. `python -m benchmarks.prediction.paper --save` configures the cost model of docs/planner.md to do "
    "what the system of the Ratel paper (ICDE 2025) did, on the machines `4090` and `3090` of `ratel/planner/machines`, and compares "
    "with the figures that the paper reports. \"Ratel\" is what this project would do there, with updates under backward (eager) and "
    "with exact clipping (deferred). A figure that others of the same paper contradict is not counted.")


def reality_lines(report: dict[str, Any]) -> list[str]:
    """Predictions beside measurements. Peaks are what PyTorch reserved and what the process had
    resident."""
    return [f"The machine was probed first. {report.get('note', '')}\"of planned\" is the measured peak over the plan's.", "",
            REALITY_HEAD, "|" + "---|" * 11, *map(_reality_row, report["results"])]


def _reality_row(r: dict[str, Any]) -> str:
    if "error_text" in r:
        return f"| {r['name']} | | | | failed: {r['error_text'].split('.')[0]} |"
    cells = [r["name"], f"{r['parameters'] / 1e6:,.0f} M", f"{r['batch']} x {r['seq_len']}", str(r["micro_batches"]),
             f"{r['measured_s']:.3f}", f"{r['predicted_s']:.3f}", f"{r['error']:+.0%}", f"{r['simulated_s']:.3f}", r["bound_by"],
             _of_planned(r["gpu_peak_bytes"], r["gpu_planned_bytes"]), _of_planned(r["dram_peak_bytes"], r["dram_planned_bytes"])]
    return f"| {' | '.join(cells)} |"


def _of_planned(peak: int | None, planned: int) -> str:
    return "" if peak is None else f"{peak / GIB:.2f} GiB, {peak / planned:.0%}"


def pays_lines(report: dict[str, Any]) -> list[str]:
    note = report.get("note", "").lstrip(", ")
    lines = [f"{note[:1].upper()}{note[1:]}:", ""] if note else []
    lines += ["| case | way | s/step | predicted s | micro-batches | block inputs | insides kept |", "|---|---|---|---|---|---|---|"]
    return lines + [_pays_row(case["name"], way, r) for case in report["points"] for way, r in case["ways"].items()]


def _pays_row(case: str, way: str, r: dict[str, Any]) -> str:
    if "error" in r:
        return f"| {case} | {way} | failed: {r['error'].split('.')[0]} |"
    predicted = f"{r['predicted_s']:.2f}" if r["predicted_s"] else ""
    kept = ", ".join(f"{count} in {tier}" for tier, count in r["kept"].items()) or "none"
    return f"| {case} | {way} | {r['step_s']:.2f} | {predicted} | {r['micro_batches']} | {r['checkpoints']} | {kept} of {r['offered']} |"


def paper_lines(result: dict[str, Any]) -> list[str]:
    """Figures of another system as its paper gives them, beside the cost model's for the same
    system and for Ratel."""
    lines = [PAPER_INTRODUCTION, "", f"Mean error {result['mean_error']:.1%}; {result['sizes_met']} of {result['sizes']} model sizes met.",
             "", "| figure | case | unit | paper | model | error | Ratel, eager | Ratel, deferred | not counted because |",
             "|---|---|---|---|---|---|---|---|---|"]
    for p in result["points"]:
        error = "" if p["error"] is None else f"{p['error']:+.0%}"
        cells = [p["figure"], p["case"], p["unit"], p["paper"], p["ours"], error, p["ratel"], p["ratel_clipping"], p["reason"]]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return lines


def _cell(content: float | str | None) -> str:
    return "" if content is None else content if isinstance(content, str) else f"{content:,.1f}"
