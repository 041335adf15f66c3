"""Single parts: the CPU optimizer and the I/O engine."""

from typing import Any

UPDATE_COLUMNS = ("fresh, before", "in steps", "same planes", "one unit", "fresh, after")


def adam_lines(reports: list[dict[str, Any]]) -> list[str]:
    lines = []
    for report in reports:
        settings = report["settings"]
        lines += [f"{settings['num_threads']} threads, {settings['isa']}, {settings['num_params'] / 1e6:.0f} M parameters "
                  "(`python benchmarks/adam.py`):", "", "| | G param/s, median | best | GB/s | % of measured bandwidth |",
                  "|---|---|---|---|---|"]
        lines += [f"| {key} | {r['elements_per_s'] / 1e9:.2f} | {r['best_elements_per_s'] / 1e9:.2f} | "
                  f"{r['bandwidth_bps'] / 1e9:.0f} | {r['percent_of_bandwidth']:.0f} |" for key, r in report["results"].items()]
        lines.append("")
    return lines[:-1]


def io_lines(result: dict[str, Any]) -> list[str]:
    from nvme_ds import bench

    return ["`python benchmarks/io.py DIR`:", "", "```", *bench.table(result).splitlines(), "```"]


def updates_lines(report: dict[str, Any]) -> list[str]:
    lines = ["G parameters per second: on a few GB of new memory, in steps of a session, of that session's planes when nothing else "
             "runs (all after each other; one unit again and again), and on new memory once more.", "",
             f"| model | batch | {' | '.join(UPDATE_COLUMNS)} | memory in huge pages |", "|---|---|" + "---|" * (len(UPDATE_COLUMNS) + 1)]
    for p in report["points"]:
        rates = (p["before"]["fresh"], p["in steps"]["params_per_s"], p["alone"]["same planes"], p["alone"]["one unit"],
                 p["after"]["fresh"])
        cells = " | ".join(f"{rate / 1e9:.2f}" for rate in rates)
        lines.append(f"| {p['name']} | {p['batch_size']} | {cells} | {p['huge_pages']:.0%} |")
    return lines


def lora_lines(report: dict[str, Any]) -> list[str]:
    """Single linears and whole layers have tables of their own."""
    from ratel.lora.compute import bench

    lines = ["What adapters cost, as multiples of the frozen linears: the device's time, and the clock's in brackets.", ""]
    for is_linear in (True, False):
        points = [point for point in report["points"] if ("inputs" in point) == is_linear]
        lines += [*bench.table(points).splitlines(), ""] if points else []
    return lines[:-1]
