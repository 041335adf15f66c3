"""Markdown for the results of compare_deepspeed.py, targets.py and startup.py."""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.tables.compare_table import compare_lines, last_line
from ratel.units import GIB, MIB

Content = dict[str, Any]
Point = dict[str, Any]

INTRODUCTIONS = {
    "compare": "Every system has the same model, weights, tokens, learning rate and clipping, and runs in a process of its "
               "own, by turns. All but the rows \"in GPU memory\" are capped in GPU memory; those are the floor, what "
               "computation alone takes. DRAM peak is what the machine's memory in use grew by, taken from outside alike "
               "for all. Losses are relative differences from plain PyTorch's with fp32 masters.",
    "ssd": "\"Bound\" is the bytes that a step moves over what the disk carries: the mean of a plain O_DIRECT loop, "
           "reading and writing at once, just before and after the run, or the cap (`--ssd-bandwidth`) where that is "
           "lower. The files of a RAM disk are in the DRAM peak.",
    "dram47": "States on SSD and in as much DRAM as ZeRO-Infinity took.",
    "curve": "The prediction is the planner's, made with the machine's measured rates before the first step.",
    "shapes": "Other models, tiers and settings. \"Bound\" as above: the busy time of the busiest resource; \"at measured "
              "rates\" what its work takes at the rate that the machine was measured to have. Exposed optimizer: what "
              "computation waited for in the last step because an update was not done.",
    "sustained": "Slope: of a straight line through the seconds of all steps, over the median, per 100 steps. Memory: the "
                 "largest growth after the tenth step.",
    "startup": "From before the process exists to the first line of metrics.jsonl, less that step's own time. The "
               "checkpoint was dropped from the page cache before each run that is not called cached, and read at the "
               "disk's rate for comparison.",
    "change": "Two checkouts in turns on one machine, each figure the median of processes of their own. A start is from the "
              "command to the first line of metrics.jsonl, files in memory.",
    "adapted": "Frozen: forward, and backward to the inputs, with each layer run twice unless said otherwise; nothing is "
               "trained. Plain: adapters by plain PyTorch in the compute type, as peft computes them, and AdamW. Both have "
               "all in GPU memory. Ratel keeps to the limit and has fp32 masters of the adapters.",
    "launches": "Python and launches, forward and backward, of a block so narrow that its kernels take next to no time.",
}


def target_lines(kind: str, content: Content) -> list[str]:
    """The lines of a section, which the script prints, too, when it is done."""
    return LINES[kind](content)


def _table(head: str, rows: list[list[str]]) -> list[str]:
    columns = head.split(" | ")
    return [f"| {head} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]


def _failed(point: Point) -> list[str]:
    name = point["name"] if "batch_size" not in point else f"{point['name']}, batch {point['batch_size']}"
    return [name, f"failed: {last_line(point['error'])}"]


def _compare(content: Content) -> list[str]:
    deepspeed = content.get("deepspeed", {})
    lines = compare_lines(content["points"])
    if deepspeed.get("version"):
        lines += ["", f"DeepSpeed {deepspeed['version']}; its native operators were built beforehand, which took "
                      f"{deepspeed['build_s']:.0f} s."]
    return lines


def disk_bound(point: Point) -> tuple[float, float]:
    """Bytes/s that the disk could have carried, and the seconds of a step's bytes at that rate."""
    measured = [rate for rate in point["disk_bps"] if rate]
    rates = ([statistics.mean(measured)] if measured else []) + ([point["cap_bps"]] if point["cap_bps"] else [])
    rate = min(rates) if rates else float("nan")
    return rate, (point["ssd_read_bytes"] + point["ssd_written_bytes"]) / rate


def _ssd(content: Content) -> list[str]:
    rows = []
    for p in content["points"]:
        if "error" in p:
            rows.append(_failed(p))
            continue
        rate, bound_s = disk_bound(p)
        loop = " and ".join(f"{r / 1e9:.2f}" if r else "not possible" for r in p["disk_bps"])
        rows.append([p["name"], str(p["options"]["dram"]), f"{p['step_s']:.2f}",
                     f"{p['ssd_read_bytes'] / 1e9:.1f} + {p['ssd_written_bytes'] / 1e9:.1f}", loop, f"{rate / 1e9:.2f}",
                     f"{bound_s:.2f}", f"{bound_s / p['step_s']:.0%}", _gib(p["dram_peak_bytes"]),
                     _seconds(p, "predicted_s")])
    return _table("states on | DRAM budget | s/step | GB read + written per step | loop before and after, GB/s | allowed GB/s "
                  "| bound s | of bound | DRAM peak | predicted s", rows)


def _dram47(content: Content) -> list[str]:
    lines = _ssd(content)
    seconds = [p["step_s"] for p in content["points"] if "error" not in p]
    if seconds and content.get("infinity_s"):
        lines += ["", f"ZeRO-Infinity took {content['infinity_s']:.1f} s a step (`{content['infinity_from']}`): "
                      f"{content['infinity_s'] / statistics.median(seconds):.1f} times as long."]
    return lines


def _curve(content: Content) -> list[str]:
    rows = []
    for p in sorted(content["points"], key=lambda p: p["batch_size"]):
        if "error" in p:
            rows.append(_failed(p))
            continue
        predicted = p["batch_size"] * p["seq_len"] / p["predicted_s"] if p.get("predicted_s") else None
        guess = ["", ""] if predicted is None else [f"{predicted:,.0f}", f"{predicted / p['tokens_per_s'] - 1:+.0%}"]
        rows.append([_shape(p), str(p["plan"]["work"]["micro_batches"]), f"{p['step_s']:.3f}", f"{p['tokens_per_s']:,.0f}",
                     *guess, f"{p['tflops_6pn']:.0f}", _of_bound(p)])
    return _table("batch x seq | micro-batches | s/step | tokens/s | predicted tokens/s | error | TFLOP/s | of bound", rows)


def _shapes(content: Content) -> list[str]:
    rows = []
    for p in content["points"]:
        if "error" in p:
            rows.append(_failed(p))
            continue
        traced = p.get("traced", {})
        exposed, at_rate = traced.get("exposed_optimizer_s"), traced.get("fraction_of_bound_at_rate")
        rows.append([p["name"], f"{p['parameters'] / 1e9:.2f} B", _shape(p), f"{p['step_s']:.3f}", f"{p['tokens_per_s']:,.0f}",
                     _of_bound(p), "" if at_rate is None else f"{at_rate:.0%} ({traced['bound_at_rate_by']})",
                     _seconds(p, "predicted_s"), "" if exposed is None else f"{exposed:.3f}",
                     _gib(p["gpu_peak_bytes"] or 0), _gib(p["dram_peak_bytes"]),
                     f"{_gib(p['ssd_read_bytes'])} + {_gib(p['ssd_written_bytes'])}"])
    return _table("what | parameters | batch x seq | s/step | tokens/s | of bound | of bound at measured rates | predicted s "
                  "| exposed optimizer s | GPU peak | DRAM peak | SSD read + written", rows)


def drift(point: Point) -> dict[str, float]:
    """What a long run shows after its warm-up: medians of the first and the last quarter, slope per
    100 steps over the median, growth of memory in bytes since the tenth step."""
    seconds = point["all_steps_s"][point["warmup"] :]
    quarter, middle = max(1, len(seconds) // 4), statistics.median(seconds)
    steps = range(len(seconds))
    slope = statistics.linear_regression(steps, seconds).slope if len(seconds) > 1 else 0.0
    growth = {what: max(point[key][9:], default=0) - (point[key][9:] or [0])[0]
              for what, key in (("rss", "all_rss_bytes"), ("gpu", "all_gpu_reserved_bytes"))}
    return {"first_s": statistics.median(seconds[:quarter]), "last_s": statistics.median(seconds[-quarter:]),
            "median_s": middle, "slope": 100 * slope / middle, "slowest_s": max(seconds), **growth}


def _sustained(content: Content) -> list[str]:
    good = [p for p in content["points"] if "error" not in p]
    rows = [_failed(p) for p in content["points"] if "error" in p]
    for p in good:
        d = drift(p)
        rows.append([p["name"], f"{d['median_s']:.3f}", f"{d['first_s']:.3f}", f"{d['last_s']:.3f}",
                     f"{d['last_s'] / d['first_s'] - 1:+.1%}", f"{d['slope']:+.2%}", f"{d['slowest_s']:.3f}",
                     f"{d['gpu'] / MIB:,.0f} MiB", f"{d['rss'] / MIB:,.0f} MiB",
                     f"{p['losses'][0]:.4f} to {p['losses'][-1]:.4f}"])
    lines = _table("run | median s | first quarter | last quarter | change | slope | slowest | GPU memory grew | resident grew "
                   "| loss", rows)
    if len(good) > 1:
        shared = min(len(p["losses"]) for p in good)
        planned = _gib(sum(good[0]["plan"]["dram_bytes"].values()))
        lines += ["", f"{_agreement([p['losses'][:shared] for p in good])} The arena is reserved once ({planned} of DRAM planned in "
                      "all) and cannot grow."]
    return lines


def _agreement(runs: list[list[float]]) -> str:
    steps = list(zip(*runs))
    apart = [max(losses) / min(losses) - 1 for losses in steps]
    if not any(apart):
        return f"The first {len(steps)} losses of all runs are equal, bit for bit."
    same = next(i for i, difference in enumerate(apart) if difference)
    return (f"The first {same} losses of all runs are equal, bit for bit; those of the next {len(steps) - same} steps differ by "
            f"{max(apart):.1e} at most.")


def _startup(content: Content) -> list[str]:
    rows = []
    for p in content["points"]:
        if "error" in p:
            rows.append(_failed(p))
            continue
        read_s = content.get("read_s")
        rows.append([p["name"], f"{p['first_step_begin_s']:.1f}", f"{p['first_step_end_s']:.1f}",
                     f"{p['first_step_begin_s'] / read_s:.1f}" if read_s else ""])
    lines = _table("run | s to the first step | s to its end | times the reading", rows)
    if content.get("read_s"):
        rate = f"{content['read_bps'] / 1e9:.2f} GB/s"
        lines += ["", f"{_gib(content['checkpoint_bytes'])} at {rate}: {content['read_s']:.1f} s."]
    phases = [p for p in content["points"] if p.get("phases")]
    for p in phases:
        spans = "; ".join(f"{x['name']} {x['begin_s']:.1f} to {x['end_s']:.1f}" for x in p["phases"]["phases"])
        lines += ["", f"{p['name']}, seconds since its own beginning: {spans}."]
    return lines


def _launches(content: Content) -> list[str]:
    """Launches that were measured of a block alone are what plans reckon with."""
    return _table("for each block and micro-batch | ms | launching it alone", [
        _failed(p) if "error" in p else [p["name"], f"{p['visit_s'] * 1e3:.2f}",
                                         f"{sum(p['planned_s']) * 1e3:.2f}" if p.get("planned_s") else ""]
        for p in content["points"]])


def _shape(p: Point) -> str:
    return f"{p['batch_size']} x {p['seq_len']}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _of_bound(p: Point) -> str:
    return f"{p['fraction_of_bound']:.0%} ({p['bound_by']})"


def _seconds(p: Point, key: str) -> str:
    return f"{p[key]:.3f}" if p.get(key) else ""


def _change(content: Content) -> list[str]:
    """The checkouts took turns; each figure is the median of processes of their own."""
    rows = [[case, str(len(row["before_all_s"])), f"{row['before_s']:.3f}", f"{row['after_s']:.3f}", f"{row['ratio']:.3f}"]
            for kind in ("starts", "steps") for case, row in content.get(kind, {}).items()]
    rows += [_failed({**p, "name": f"{p['name']}, {p.get('tree')}"}) for p in content["points"] if "error" in p]
    before, after = ((content.get(key) or "not known")[:10] for key in ("before_commit", "commit"))
    return _table(f"work | processes of each | {before}, s | {after}, s | ratio", rows)


def _adapted(content: Content) -> list[str]:
    def row(p: Point) -> list[str]:
        if "error" in p:
            return _failed(p)
        limit = p.get("gpu_memory") or "none"
        peak = f"{p['gpu_peak_bytes'] / 2**30:.0f}" if p.get("gpu_peak_bytes") else ""
        return [p["name"], limit, f"{p['batch_size']} x {p['seq_len']}", f"{p['step_s']:.3f}", f"{p['tokens_per_s']:,.0f}", peak,
                _of_bound(p) if "fraction_of_bound" in p else ""]

    model = content.get("model") if isinstance(content.get("model"), str) else "a configuration of its own"
    return [f"{model}, rank {content.get('rank')} on all linears, dropout {content.get('dropout')}.", "",
            *_table("system | GPU limit | batch | s/step | tok/s | GPU peak, GiB | of bound", list(map(row, content["points"])))]


LINES: dict[str, Callable[[Content], list[str]]] = {
    "change": _change, "compare": _compare, "ssd": _ssd, "dram47": _dram47, "curve": _curve, "shapes": _shapes, "sustained": _sustained,
    "startup": _startup, "launches": _launches, "adapted": _adapted}
TITLES = {"change": "Before and after a change", "compare": "Beside other systems", "ssd": "States on SSD", "dram47": "With ZeRO-Infinity's DRAM",
          "curve": "Over batch sizes", "shapes": "Other shapes", "sustained": "Many steps", "startup": "Start", "launches": "What the CPU does",
          "adapted": "Adapters beside the frozen model"}
