"""Writes evaluation_data.md from the JSON files in benchmarks/results: no figure in it was typed by hand.

    python -m benchmarks.tables            rewrite evaluation_data.md and draw its pictures (needs matplotlib)
    python -m benchmarks.tables --check    exit 1 if it is not up to date
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.report import RESULTS, ROOT
from benchmarks.tables import plots
from benchmarks.tables.target_tables import LINES, target_section

TARGET = ROOT / "evaluation_data.md"
GIB = 1 << 30

HEAD = """# Evaluation data

Made by `python -m benchmarks.tables` from `benchmarks/results/*.json`; each section names the command that measured it.
Rates of other systems are repeated only where a section says so, to compare a prediction with: everything else is what
commands of this repository measured.
TFLOP/s count 6 x parameters x tokens. "Bound" is the busy time of the step's busiest resource; "of bound" is that over
the step's own time, 100% being a step that costs its slowest resource and nothing more.
"""


def step_section(name: str, results: list[dict]) -> list[str]:
    good = [r for r in results if "error" not in r]
    lines = [f"## Steps: {name}", ""]
    if good:
        hardware = good[0]["hardware"]
        lines += [f"{hardware['gpu'] or 'CPU'}, torch {hardware['torch']}, `python -m benchmarks.speed.step ...` with the options "
                  "in the table.", ""]
    lines += ["| model | batch x seq | micro-batches | options | s/step | tokens/s | TFLOP/s | bound by | of bound | GPU peak | DRAM (RSS) "
              "| SSD read + written |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for r in results:
        shape = f"{r['batch_size']} x {r['seq_len']}"
        if "error" in r:
            lines.append(f"| | {shape} | | failed: {r['error'][:80]} |")
            continue
        options = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in r["options"].items())
        peak = f"{r['gpu_peak_bytes'] / GIB:.1f} GiB" if r["gpu_peak_bytes"] else ""
        moved = f"{r['ssd_read_bytes'] / GIB:.1f} + {r['ssd_written_bytes'] / GIB:.1f} GiB"
        lines.append(f"| {r['model']} {r['parameters'] / 1e9:.2f} B | {shape} | {r['plan']['work']['micro_batches']} | {options} | {r['step_s']:.3f} | "
                     f"{r['tokens_per_s']:,.0f} | {r['tflops_6pn']:.0f} | {r['bound_by']} | {r['fraction_of_bound']:.0%} | "
                     f"{peak} | {r['rss_bytes'] / GIB:.1f} GiB | {moved} |")
    return [*lines, ""]


def adam_section(name: str, reports: list[dict]) -> list[str]:
    lines = [f"## CPU optimizer: {name}", ""]
    for report in reports:
        settings, machine = report["settings"], report["machine"]
        lines += [f"{machine['cpu']}, {settings['num_threads']} threads, {settings['isa']}, "
                  f"{settings['num_params'] / 1e6:.0f} M parameters (`python -m benchmarks.parts.adam`):", "",
                  "| | G param/s, median | best | GB/s | % of measured bandwidth |", "|---|---|---|---|---|"]
        lines += [f"| {key} | {r['elements_per_s'] / 1e9:.2f} | {r['best_elements_per_s'] / 1e9:.2f} | "
                  f"{r['bandwidth_bps'] / 1e9:.0f} | {r['percent_of_bandwidth']:.0f} |"
                  for key, r in report["results"].items()]
        lines.append("")
    return lines


def io_section(name: str, result: dict) -> list[str]:
    lines = [f"## I/O: {name}", "", "`python -m benchmarks.parts.io`:", "", "```"]
    from nvme_ds import bench

    return [*lines, *bench.table(result).splitlines(), "```", ""]


def durable_section(name: str, result: dict) -> list[str]:
    settings = result["settings"]
    shape = ", ".join(f"{key} {settings[key]}" for key in ("layers", "hidden", "batch", "seq_len", "tier", "optimizer"))
    lines = [f"## Durability: {name}", "", f"`{result['command']}` ({shape}; {settings['steps']} steps a round, "
             f"{settings['rounds']} round{'s' if settings['rounds'] > 1 else ''}):", "",
             "| | s/step | against nothing | written by a save | waited at the end |", "|---|---|---|---|---|"]
    for way, found in result["ways"].items():
        last = found["runs"][-1]
        lines.append(f"| {way} | {found['step_s']:.2f} | {found['ratio']:.2f} | {last['saved_bytes'] / GIB:.1f} GiB | "
                     f"{last['waited_at_the_end_s']:.1f} s |")
    return [*lines, ""]


def paper_section(name: str, result: dict) -> list[str]:
    """Figures of another system as its paper gives them, beside the cost model's for the same system and for Ratel."""
    lines = [f"## Predicted: {name}", "",
             "Nothing here was measured. `python -m benchmarks.prediction.paper --save` configures the cost model of docs/planner.md to "
             "do what the system of the Ratel paper (ICDE 2025) did, on the machines `4090` and `3090` of "
             "`ratel/planner/machines`, and compares with the figures that the paper reports. \"Ratel\" is what this "
             "project would do there, with updates under backward (eager) and with exact clipping (deferred). A figure "
             "that others of the same paper contradict is not counted.", "",
             f"Mean error {result['mean_error']:.1%}; {result['sizes_met']} of {result['sizes']} model sizes met.", "",
             "| figure | case | unit | paper | model | error | Ratel, eager | Ratel, deferred | not counted because |",
             "|---|---|---|---|---|---|---|---|---|"]
    for p in result["points"]:
        error = "" if p["error"] is None else f"{p['error']:+.0%}"
        cells = [p["figure"], p["case"], p["unit"], p["paper"], p["ours"], error, p["ratel"], p["ratel_clipping"],
                 p["reason"]]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return [*lines, ""]


def _cell(content: float | str | None) -> str:
    return "" if content is None else content if isinstance(content, str) else f"{content:,.1f}"


def ordeal_section(name: str, kind: str, report: dict) -> list[str]:
    """Runs that are killed, or whose drives fail, and how often what went otherwise than it should."""
    results, script = report["results"], {"kills": "kill_run.py", "faults": "fault_run.py"}[kind]
    seeds = ", ".join(map(str, report["settings"]["seeds"]))
    lines = [f"## {kind.capitalize()}: {name}", "", f"{report['machine']['cpu']['model']}, `python tests/{script} DIRECTORY "
             f"SEED {results[kind]} --json FILE`, seeds {seeds}.", "", "| | |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {value} |" for key, value in results.items() if not isinstance(value, dict)]
    for key, counts in results.items():
        if isinstance(counts, dict):
            parts = "; ".join(f"{what}: {count}" for what, count in counts.items())
            lines.append(f"| {key.replace('_', ' ')} | {parts} |")
    return [*lines, ""]


def reality_section(name: str, report: dict) -> list[str]:
    """Predictions beside measurements. Peaks are what PyTorch reserved and what the process had resident."""
    lines = [f"## Predicted and measured: {name}", "",
             f"{report['hardware']['name']}, torch {report['torch']}; `{report['command']}`. The machine was probed first. "
             f"{report.get('note', '')}\"of planned\" is the measured peak over the plan's.", "",
             "| configuration | parameters | batch x seq | micro-batches | measured s | predicted s | error | simulated s | bound by "
             "| GPU peak, of planned | DRAM peak, of planned |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for r in report["results"]:
        if "error_text" in r:
            lines.append(f"| {r['name']} | | | | failed: {r['error_text'].split('.')[0]} |")
            continue
        gpu = _of_planned(r["gpu_peak_bytes"], r["gpu_planned_bytes"])
        lines.append(f"| {r['name']} | {r['parameters'] / 1e6:,.0f} M | {r['batch']} x {r['seq_len']} | {r['micro_batches']} | "
                     f"{r['measured_s']:.3f} | {r['predicted_s']:.3f} | {r['error']:+.0%} | {r['simulated_s']:.3f} | "
                     f"{r['bound_by']} | {gpu} | {_of_planned(r['dram_peak_bytes'], r['dram_planned_bytes'])} |")
    return [*lines, ""]


def _of_planned(peak: int | None, planned: int) -> str:
    return "" if peak is None else f"{peak / GIB:.2f} GiB, {peak / planned:.0%}"


def pays_section(name: str, report: dict) -> list[str]:
    lines = [f"## What planning is worth: {name}", "",
             f"{report['gpu'] or report['host']['cpu']['model']}, torch {report['torch']}; `{report['command']}`"
             f"{report.get('note', '')}:", "",
             "| case | way | s/step | predicted s | micro-batches | block inputs | insides kept |", "|---|---|---|---|---|---|---|"]
    for case in report["points"]:
        for way, r in case["ways"].items():
            if "error" in r:
                lines.append(f"| {case['name']} | {way} | failed: {r['error'].split('.')[0]} |")
                continue
            predicted = f"{r['predicted_s']:.2f}" if r["predicted_s"] else ""
            kept = ", ".join(f"{count} in {tier}" for tier, count in r["kept"].items()) or "none"
            lines.append(f"| {case['name']} | {way} | {r['step_s']:.2f} | {predicted} | {r['micro_batches']} | "
                         f"{r['checkpoints']} | {kept} of {r['offered']} |")
    return [*lines, ""]


def largest_section(name: str, r: dict) -> list[str]:
    losses = ", ".join(f"{loss:.3f}" for loss in r["losses"])
    return [f"## Large: {name}", "", f"{r['hardware']['gpu'] or 'CPU'}, torch {r['hardware']['torch']}; `{r['command']}`: "
            f"{r['preset']}, {r['parameters'] / 1e9:.1f} B parameters with fp32 AdamW states, {r['batch_size']} x {r['seq_len']} "
            f"tokens a step, {r['plan']['optimizer']} optimizer. {r['step_s']:.1f} s a step ({r['fraction_of_bound']:.0%} of "
            f"the bound, {r['bound_by']}), losses {losses}; GPU peak {r['gpu_peak_bytes'] / GIB:.1f} GiB, DRAM peak "
            f"{r['dram_peak_bytes'] / GIB:.1f} GiB.", ""]


def reproducible_section(name: str, report: dict) -> list[str]:
    lines = [f"## The same bits again: {name}", "", f"{report['gpu'] or report['host']['cpu']['model']}, torch {report['torch']}; "
             f"`{report['command']}`. Each piece of work was repeated on the same inputs; a repetition differs if any bit of its "
             "results does. The largest shares of elements are named.", "", "| work | repetitions that differ | in |", "|---|---|---|"]
    for p in report["points"]:
        if "error" in p:
            lines.append(f"| {p['name']} | not possible: {p['error'].split('.')[0]} | |")
            continue
        ranked = sorted(p["tensors"].items(), key=lambda item: -(item[1]["elements"] or 0) / (item[1]["of"] or 1))
        found = [tensor if one["elements"] is None else
                 f"{tensor} ({one['elements']:,} of {one['of']:,}, up to {one['largest']:.1e})" for tensor, one in ranked[:3]]
        more = f" and {len(ranked) - 3} more" if len(ranked) > 3 else ""
        chosen = f" ({p['chosen']})" if p.get("chosen") else ""
        lines.append(f"| {p['name']}{chosen} | {p['different']} of {p['repetitions']} | {'; '.join(found)}{more} |".replace("|  |", "| |"))
    return [*lines, ""]


def updates_section(name: str, report: dict) -> list[str]:
    columns = ("fresh, before", "in steps", "same planes", "one unit", "fresh, after")
    lines = [f"## The CPU optimizer in steps and alone: {name}", "", f"{report['gpu'] or report['host']['cpu']['model']}, torch "
             f"{report['torch']}; `{report['command']}`, G parameters per second: on a few GB of new memory, in "
             "steps of a session, of that session's planes when nothing else runs (all after each other; one unit again and "
             "again), and on new memory once more.", "", f"| model | batch | {' | '.join(columns)} | memory in huge pages |",
             "|---|---|" + "---|" * (len(columns) + 1)]
    for p in report["points"]:
        rates = (p["before"]["fresh"], p["in steps"]["params_per_s"], p["alone"]["same planes"], p["alone"]["one unit"],
                 p["after"]["fresh"])
        lines.append(f"| {p['name']} | {p['batch_size']} | {' | '.join(f'{rate / 1e9:.2f}' for rate in rates)} | {p['huge_pages']:.0%} |")
    return [*lines, ""]


def max_section(name: str, results: list[dict]) -> list[str]:
    from ratel.training.bench.largest import table

    what = "max-model" if "layers" in results[0] else "max-batch"
    of = next(r for r in results if "hardware" in r)
    hardware, commit = of["hardware"], f", commit {of['commit'][:7]}" if "commit" in of else ""
    return [f"## Largest that fits: {name}", "", f"{hardware['gpu'] or 'CPU'}, torch {hardware['torch']}{commit}; `ratel bench {what}`. "
            "Each maximum was found by planning and then trained:", "", "```", *table(results).splitlines(), "```", ""]


def _clipping(settings: dict[str, Any]) -> str:
    limit = settings.get("max_grad_norm", 1.0)
    return f"clipping at {limit:g}" if limit else "no clipping"


def trainer_section(name: str, report: dict) -> list[str]:
    model, versions, settings = report["model"], report["versions"], report["settings"]
    lines = [f"## Beside transformers' Trainer: {name}", "",
             f"{report['host']['cpu']['model']}, torch {versions['torch']}, transformers {versions['transformers']}, commit "
             f"{report['commit'][:7]}; `{report['command']}`: {model['model_type']} with {model['num_hidden_layers']} layers of width "
             f"{model['hidden_size']}, fp32, AdamW, {_clipping(settings)}, {settings['rows']} rows of {settings['seq_len']} tokens, the same "
             "batches for both. Errors are the largest of any step, relative; norms are those of Trainer's gradients in fp64, from which "
             "the norm that it logs, a sum in fp32, differs by the last column. Trainer itself was run again with the rows of each batch in "
             "another order.", "",
             "| data | steps | target tokens | first loss | last loss | losses differ by | norms differ by | Trainer from itself: losses | norms | generation | "
             "Trainer's logged norm |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| {p['kind']} | {p['steps']} | {p['targets']:,} | {p['first_loss']:.4f} | {p['last_loss']:.4f} | {p['loss_error']:.1e} | "
              f"{p['norm_error']:.1e} | {p['own_loss_error']:.1e} | {p['own_norm_error']:.1e} | {'the same' if p['generates_the_same'] else 'differs'} | {'' if p['logged_norm_error'] is None else format(p['logged_norm_error'], '.1e')} |" for p in report["points"]]
    return [*lines, ""]


SECTIONS = {"step": step_section, "io": io_section, "durable": durable_section, "paper": paper_section,
            "reality": reality_section, "pays": pays_section, "largest": largest_section, "max": max_section,
            "reproducible": reproducible_section, "updates": updates_section, "trainer": trainer_section,
            "adam": lambda name, content: adam_section(name, content if isinstance(content, list) else [content]),
            "kills": lambda name, content: ordeal_section(name, "kills", content),
            "faults": lambda name, content: ordeal_section(name, "faults", content),
            **{kind: partial(target_section, kind) for kind in LINES}}

PLOTS: dict[str, tuple[str, Callable[[Any], Callable[[Any], None]]]] = {
    "curve": ("Tokens per second over batch sizes", plots.curve), "max": ("The largest that fits", plots.largest)}
"""Beside the results that they show, under the same name."""


def picture(path: Path, kind: str) -> list[str]:
    if kind not in PLOTS:
        return []
    title, _ = PLOTS[kind]
    return [f"![{title}: {path.stem}]({path.with_suffix('.svg').relative_to(ROOT)})", ""]


def draw_pictures() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        kind = kind_of(path)
        if kind in PLOTS:
            title, paint = PLOTS[kind]
            content = json.loads(path.read_text(encoding="utf-8"))
            plots.draw(path.with_suffix(".svg"), f"{title}: {path.stem}", paint(content))


def kind_of(path: Path) -> str:
    kind = path.stem.split("_")[1]
    if kind not in SECTIONS:
        raise SystemExit(f"{path.name}: name results MACHINE_KIND_DETAIL.json, KIND being one of {', '.join(SECTIONS)}")
    return kind


def document() -> str:
    parts = [HEAD]
    for path in sorted(RESULTS.glob("*.json")):
        kind = kind_of(path)
        parts += SECTIONS[kind](path.stem, json.loads(path.read_text(encoding="utf-8"))) + picture(path, kind)
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    text = document()
    if parser.parse_args().check:
        sys.exit(0 if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text else "evaluation_data.md is stale")
    TARGET.write_text(text, encoding="utf-8")
    draw_pictures()


if __name__ == "__main__":
    main()
