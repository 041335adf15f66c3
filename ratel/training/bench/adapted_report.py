"""What `ratel.training.bench.adapted` has measured, as a table and as RunLoRA's files."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.training.bench.published import published
from ratel.units import MIB

Point = dict[str, Any]
COLUMNS = ("model", "batch x seq", "rank", "dropout", "orders", "forward and backward, ms", "MB above weights", "less time, %",
           "RunLoRA's, %", "less memory, %", "RunLoRA's, %")
CSV_COLUMNS = ("model_name_or_config", "criterion", "mean_time_us", "max_mem_overhead_MB", "max_mem_res_overhead_MB",
               "msrs/runs", "max_sequence_length", "n_batch", "lora_r", "lora_alpha", "lora_dropout", "dtype", "target_modules",
               "min_run_time")


def saved(one: Point, peer: Point, what: str) -> float | None:
    """Percent of the peer's."""
    return None if not peer[what] else 100 * (1 - one[what] / peer[what])


def table(points: Sequence[Point]) -> str:
    """Markdown. A batch that had to be made smaller says what it was."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for point in points:
        lines += [f"| {' | '.join(cells)} |" for cells in _rows(point)]
    return "\n".join(lines)


def _rows(point: Point) -> Iterator[list[str]]:
    batch = f"{point['batch']}" if point["batch"] == point["asked_batch"] else f"{point['batch']} (of {point['asked_batch']})"
    work = [point["model"], f"{batch} x {point['seq_len']}", str(point["rank"]), str(point["dropout"])]
    row = published(point["model"], point["rank"])
    known = ("", "") if row is None else (_percent(row.time_saved), _percent(row.memory_saved))
    for one in point["ours"]:
        less = [_percent(saved(one, point["peer"], what)) for what in ("mean_s", "memory_bytes")]
        yield [*work, one["name"], *_amounts(one), less[0], known[0], less[1], known[1]]
    yield [*work, point["peer"]["name"], *_amounts(point["peer"]), "", "", "", ""]


def _amounts(one: Point) -> list[str]:
    return [f"{one['mean_s'] * 1e3:.2f}", _megabytes(one["memory_bytes"])]


def _megabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / MIB:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{round(value, 1) + 0.0:.1f}"  # no -0.0


def write_csv(points: Sequence[Point], out: str) -> Path:
    """OUT.csv, the fastest of each model first."""
    path = Path(f"{out}.csv")
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            for point in points:
                fastest_first = sorted([*point["ours"], point["peer"]], key=lambda one: one["mean_s"])
                writer.writerows(_record(point, one) for one in fastest_first)
    except OSError as error:
        raise RatelError(f"cannot be written: {error.strerror}", field="--out", value=path) from error
    return path


def _record(point: Point, one: Point) -> list[Any]:
    memory = ["" if one[what] is None else one[what] / MIB for what in ("memory_bytes", "reserved_bytes")]
    return [point["model"], one["name"], one["mean_s"] * 1e6, *memory, f"{one['runs']}/1", point["seq_len"], point["batch"],
            point["rank"], point["alpha"], point["dropout"], point["dtype"], " ".join(point["targets"]) or "all-linear",
            point["min_run_s"]]


def write_schemes(points: Sequence[Point], out: str) -> list[Path]:
    """OUT_criterion.scheme: each layer's name and its orders. Where there are several points, their
    models, ranks and dropouts come before the criterion."""
    found = []
    for point in points:
        label = f"_{Path(point['model']).name}_r{point['rank']}_d{point['dropout']}" if len(points) > 1 else ""
        for one in point["ours"]:
            path = Path(f"{out}{label}_{one['name']}.scheme")
            path.write_text("".join(f"{name} {orders}\n" for name, orders in one["scheme"].items()), encoding="utf-8")
            found.append(path)
    return found
