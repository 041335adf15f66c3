"""Writes evaluation_data.md from the JSON files in benchmarks/results: no figure in it was typed by
hand.

    python -m benchmarks.tables            rewrite evaluation_data.md, its pictures (needs matplotlib) and README's tables
    python -m benchmarks.tables --check    exit 1 if one of the pages is not up to date
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.report import RESULTS, ROOT
from benchmarks.tables import durability, exactness, parts, plots, prediction, runlora, size, speed, tuning_costs
from benchmarks.tables.source import source
from benchmarks.tables.target_tables import INTRODUCTIONS, LINES, TITLES

TARGET = ROOT / "evaluation_data.md"

HEAD = """# Evaluation data

`python -m benchmarks.tables` makes this page from `benchmarks/results/*.json`, in the order of the questions that people ask.
Under each title stand the machine, the commit and the command that measured. A command is given as it was at that commit;
[docs/benchmarks.md](docs/benchmarks.md) has the scripts by the names that they have now.
Rates of other systems are repeated only where a section says so, to compare a prediction with: everything else is what
commands of this repository measured.
TFLOP/s count 6 x parameters x tokens. "Bound" is the busy time of the step's busiest resource; "of bound" is that over
the step's own time, 100% being a step that costs its slowest resource and nothing more.
"""


@dataclass(frozen=True)
class Section:
    title: str
    lines: Callable[[Any], list[str]]
    """What stands under the title and the line that names the source."""


def _target(kind: str) -> Section:
    return Section(TITLES[kind], lambda content: [INTRODUCTIONS[kind], "", *LINES[kind](content)])


QUESTIONS: dict[str, dict[str, Section]] = {
    "How fast is a step?": {
        "compare": _target("compare"), "step": Section("Steps", speed.step_lines),
        **{kind: _target(kind) for kind in ("ssd", "dram47", "curve", "shapes", "sustained", "startup", "adapted", "change")}},
    "How large can it be?": {
        "largest": Section("Large", size.largest_lines), "max": Section("Largest that fits", size.max_lines)},
    "How well is it predicted?": {
        "reality": Section("Predicted and measured", prediction.reality_lines),
        "pays": Section("What planning is worth", prediction.pays_lines), "paper": Section("Predicted", prediction.paper_lines),
        "xia": Section("What fine-tuning costs", tuning_costs.xia_lines)},
    "How durable is it?": {
        "durable": Section("Durability", durability.durable_lines),
        "kills": Section("Kills", partial(durability.ordeal_lines, "kills")),
        "faults": Section("Faults", partial(durability.ordeal_lines, "faults")),
        "proofs": Section("Long proofs", durability.proof_lines)},
    "How exact is it?": {
        "reproducible": Section("The same bits again", exactness.reproducible_lines),
        "trainer": Section("Beside transformers' Trainer", exactness.trainer_lines),
        "states": Section("States in fewer bytes", exactness.states_lines),
        "moments": Section("Which 8 bits", exactness.moments_lines)},
    "What do single parts do?": {
        "adam": Section("CPU optimizer", lambda content: parts.adam_lines(content if isinstance(content, list) else [content])),
        "updates": Section("The CPU optimizer in steps and alone", parts.updates_lines), "io": Section("I/O", parts.io_lines),
        "launches": _target("launches"), "lora": Section("Adapters", parts.lora_lines),
        "runlora": Section("Adapters in RunLoRA's models", runlora.lines)}}
SECTIONS = {kind: section for kinds in QUESTIONS.values() for kind, section in kinds.items()}

PLOTS: dict[str, tuple[str, Callable[[Any], Callable[[Any], None]]]] = {
    "curve": ("Tokens per second over batch sizes", plots.curve), "max": ("The largest that fits", plots.largest),
    "xia": ("Rows per second over batches, Mixtral on an A40", tuning_costs.xia_curves),
    "states": ("Evaluation loss", plots.states), "runlora": ("Forward and backward beside peft", runlora.savings)}
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
            plots.draw(path.with_suffix(".svg"), f"{title}: {path.stem}", paint(read(path)))


def kind_of(path: Path) -> str:
    kind = path.stem.split("_")[1]
    if kind not in SECTIONS:
        raise SystemExit(f"{path.name}: name results MACHINE_KIND_DETAIL.json, KIND being one of {', '.join(SECTIONS)}")
    return kind


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def document() -> str:
    """Raises SystemExit for a file whose name has no kind, or whose content has no commit."""
    found = [(kind_of(path), path) for path in sorted(RESULTS.glob("*.json"))]
    lines = [HEAD]
    for question, kinds in QUESTIONS.items():
        of_question = [(kind, path) for kind in kinds for other, path in found if other == kind]
        lines += [f"## {question}", ""] if of_question else []
        for kind, path in of_question:
            lines += section(kind, path)
    return "\n".join(lines).rstrip() + "\n"


def section(kind: str, path: Path) -> list[str]:
    content, of_kind = read(path), SECTIONS[kind]
    return [f"### {of_kind.title}: {path.stem}", "", source(path.name, content), "", *of_kind.lines(content), "", *picture(path, kind)]
