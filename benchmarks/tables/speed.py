"""What a step takes: tables of single steps (`speed.step`) and of what saving adds.
target_tables.py has the other measurements of speed."""

from typing import Any

from ratel.units import GIB

HEAD = ("| model | batch x seq | micro-batches | options | s/step | tokens/s | TFLOP/s | bound by | of bound | GPU peak | DRAM (RSS) "
        "| SSD read + written |")


def step_lines(results: list[dict[str, Any]]) -> list[str]:
    lines = [] if all("command" in r for r in results) else ["`python benchmarks/step.py` with the options in the table.", ""]
    return [*lines, HEAD, "|" + "---|" * 12, *map(_step_row, results)]


def _step_row(r: dict[str, Any]) -> str:
    shape = f"{r['batch_size']} x {r['seq_len']}"
    if "error" in r:
        return f"| | {shape} | | failed: {r['error'][:80]} |"
    options = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in r["options"].items())
    peak = f"{r['gpu_peak_bytes'] / GIB:.1f} GiB" if r["gpu_peak_bytes"] else ""
    moved = f"{r['ssd_read_bytes'] / GIB:.1f} + {r['ssd_written_bytes'] / GIB:.1f} GiB"
    cells = [f"{r['model']} {r['parameters'] / 1e9:.2f} B", shape, str(r["plan"]["work"]["micro_batches"]), options, f"{r['step_s']:.3f}",
             f"{r['tokens_per_s']:,.0f}", f"{r['tflops_6pn']:.0f}", r["bound_by"], f"{r['fraction_of_bound']:.0%}", peak,
             f"{r['rss_bytes'] / GIB:.1f} GiB", moved]
    return f"| {' | '.join(cells)} |"
