"""What the runs of compare_deepspeed.py say: medians over rounds, ratios to the floor of the same
rounds, equal losses."""

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.harness.jobs import NOT_BEGUN
from ratel.units import GIB

REFERENCE, FLOOR = "in GPU memory, fp32 states", "in GPU memory"
FIRST_WITHIN, LATER_WITHIN = 2.0**-12, 2.0**-10
"""The relative differences that losses may have. The first loss is a mean over thousands of tokens
whose logits are rounded to bf16 (2^-9 of values up to 4), so that equal weights give it to 2^-16; a
sixteenth of the rounding unit would show weights or tokens that differ. Later ones come after
updates in which AdamW turns gradients near zero, whose rounding depends on the order of sums, into
steps of full size."""

Point = dict[str, Any]


def loss_checks(points: Iterable[Point]) -> list[dict[str, Any]]:
    """Each run against the reference of the same batch size and clipping, as far as both went;
    states in bf16 only at the first."""
    points = [point for point in points if "losses" in point]
    references = {_work(point): point["losses"] for point in points if point["name"] == REFERENCE}
    checks = []
    for point in points:
        expected = references.get(_work(point))
        if expected is None or point["name"] == REFERENCE:
            continue
        errors = [abs(found / known - 1) for found, known in zip(point["losses"], expected)]
        later = [] if point["name"].startswith(FLOOR) else errors[1:]
        equal = errors[0] <= FIRST_WITHIN and max(later, default=0.0) <= LATER_WITHIN
        checks.append({**{key: point[key] for key in ("name", "round", "batch_size", "clip")}, "first": errors[0],
                       "later": max(later, default=None), "fall": expected[0] - min(expected), "equal": equal})
    return checks


def compare_lines(points: list[Point]) -> list[str]:
    """A table in Markdown. A system that failed in every round has its error in the place of
    numbers; what a time budget left no room for is left out."""
    points = [point for point in points if point.get("error") != NOT_BEGUN]
    lines = ["| batch | clipping | system | s/step | range | tokens/s | TFLOP/s | to the floor | of its bound | GPU peak "
             "| DRAM peak | SSD read + written per step | start s | losses |", "|" + "---|" * 14]
    checks = loss_checks(points)
    for (_, name, batch, clip), runs in sorted(_grouped(points).items(), key=lambda item: _rank(item[0])):
        good = [run for run in runs if "error" not in run]
        head = f"| {batch} | {'always' if clip < 1 else 'never'} | {name} "
        if not good:
            lines.append(f"{head}| failed: {last_line(runs[-1]['error'])} |")
            continue
        floor = floor_s(points, batch)
        seconds = [run["step_s"] for run in good]
        step_s = statistics.median(seconds)
        mine = [check for check in checks if (check["name"], check["batch_size"], check["clip"]) == (name, batch, clip)]
        cells = [f"{step_s:.3f}", f"{min(seconds):.3f} to {max(seconds):.3f}", f"{_median(good, 'tokens_per_s'):,.0f}",
                 f"{_median(good, 'tflops_6pn'):.1f}", f"{step_s / floor:.2f}" if floor else "",
                 _of_bound(good), _gib(good, "gpu_peak_bytes"), _gib(good, "dram_peak_bytes"),
                 f"{_gib(good, 'ssd_read_bytes')} + {_gib(good, 'ssd_written_bytes')}",
                 f"{_median(good, 'start_s'):.0f}", _losses(name, mine)]
        lines.append(f"{head}| {' | '.join(cells)} |")
    return lines


def _grouped(points: list[Point]) -> dict[tuple[str, str, int, float], list[Point]]:
    groups: dict[tuple[str, str, int, float], list[Point]] = {}
    for point in points:
        groups.setdefault((point["group"], point["name"], point["batch_size"], point["clip"]), []).append(point)
    return groups


def _rank(key: tuple[str, str, int, float]) -> tuple[Any, ...]:
    group, name, batch, clip = key
    return group, batch, not name.startswith(FLOOR), not name.startswith("Ratel"), name, -clip


def floor_s(points: list[Point], batch: int) -> float | None:
    """The faster of the in-memory rows: what the computation alone takes."""
    medians = [statistics.median(run["step_s"] for run in runs if "step_s" in run)
               for (_, name, of_batch, _), runs in _grouped(points).items()
               if name.startswith(FLOOR) and of_batch == batch and any("step_s" in run for run in runs)]
    return min(medians, default=None)


def _work(point: Point) -> tuple[int, int, float]:
    return point["batch_size"], point["seq_len"], point["clip"]


def _median(runs: list[Point], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _of_bound(runs: list[Point]) -> str:
    fractions = [run["fraction_of_bound"] for run in runs if "fraction_of_bound" in run]
    return f"{statistics.median(fractions):.0%} ({runs[0]['bound_by']})" if fractions else ""


def _gib(runs: list[Point], key: str) -> str:
    values = [run[key] for run in runs if run.get(key) is not None]
    return f"{max(values) / GIB:.1f} GiB" if values else ""


def _losses(name: str, checks: list[dict[str, Any]]) -> str:
    if name == REFERENCE:
        return "reference"
    if not checks:
        return "not compared"
    later = [check["later"] for check in checks if check["later"] is not None]
    after = f", later {max(later):.0e}" if later else ""
    verdict = "equal" if all(check["equal"] for check in checks) else "NOT EQUAL"
    return f"{verdict}: first {max(check['first'] for check in checks):.0e}{after}"


def last_line(text: str) -> str:
    """What an error ends with, fit for a cell of a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return lines[-1][:160].replace("|", "/")
