"""Writes docs/families.md out of what benchmarks/exactness/families.py found."""

from pathlib import Path
from typing import Any

Found = dict[str, Any]
COLUMNS = (("gradients", "fp32"), ("own loss", "own loss"), ("bf16", "bf16"), ("packed", "documents"), ("causal", "causal"))
ALWAYS = ("step", "resume", "export", "loading")
TITLES = {"next-token": "Causal language models", "classify": "Sequence classification", "tokens": "Token classification",
          "masked-lm": "Masked language models"}
SHORT = {"to rounding": "rounding", "one document a row": "one a row", "": "yes"}


def write_table(content: Found, path: Path) -> None:
    path.write_text("\n".join(_lines(content)) + "\n", encoding="utf-8")


def is_right(verdict: Found) -> bool:
    return not verdict["refused"] and not _failed(verdict)


def _failed(verdict: Found) -> list[Found]:
    return [finding for finding in verdict["findings"] if finding["outcome"] in ("failed", "broke")]


def counts(content: Found) -> dict[str, int]:
    """``trained`` and ``refused`` classes, and ``wrong`` ones."""
    verdicts = content["verdicts"]
    trained = sum(map(is_right, verdicts))
    refused = sum(1 for v in verdicts if v["refused"])
    return {"classes": len(verdicts), "trained": trained, "refused": refused, "wrong": len(verdicts) - trained - refused}


def _lines(content: Found) -> list[str]:
    total, versions = counts(content), content["versions"]
    missing = content["registered"] - total["classes"]
    lines = [
        "# Families", "",
        f"`python -m benchmarks.exactness.families` made this page with transformers {versions['transformers']} and",
        f"torch {versions['torch']}.",
        f"Of the {total['classes']} classes in the registries for text (causal, sequence and token classification, masked)",
        f"**{total['trained']} are trained and equal** to plain PyTorch, {total['refused']} are refused with a reason"
        + (f", **{total['wrong']} are wrong**." if total["wrong"] else "."),
        *([f"{missing} more have not been checked yet: `python -m benchmarks.exactness.families` checks them."] if missing else []), "",
        *_INTRODUCTION, ""]
    for task, title in TITLES.items():
        mine = [v for v in content["verdicts"] if v["task"] == task]
        lines += [f"## {title}", "", *_trained(mine, task), "", *_others(mine)]
    return lines


_INTRODUCTION = """\
Each class is made small with the kinds of layers that its configuration has, gets random parameters
and buffers, is saved by transformers and trained from that directory. In every row below these
hold: a step moves what has a gradient and nothing else; a run that is saved and resumed ends with
the same bits; transformers reads the export back and all of `state_dict()` is as it was trained;
the loaded state is that of `from_pretrained`. The columns:

| column | what |
|---|---|
| fp32, own loss | loss and every gradient beside autograd, from the directory and as an object with a plain `loss_fn`. *Bitwise*, or to *rounding*: not further from fp64 than twice plain PyTorch is, plus 2^-18. A part of the model ran in another shape then (the head sees tokens, not rows) |
| bf16 | bitwise, or at most twice plain PyTorch's bf16 error against fp32, plus a rounding |
| documents | two documents in a row, longer than any window, against the documents apart: loss and every gradient. *One a row*: documents of this model cannot share a row, so none do |
| causal | a token sees nothing that comes after it |""".splitlines()


def _trained(verdicts: list[Found], task: str) -> list[str]:
    columns = COLUMNS if task == "next-token" else COLUMNS[:3]
    rows = [f"| {v['name']} | " + " | ".join(_cell(v, about) for about, _ in columns) + " |" for v in verdicts if is_right(v)]
    head = "| class | " + " | ".join(title for _, title in columns) + " |"
    return [f"{len(rows)} trained and equal.", "", head, "|---" * (len(columns) + 1) + "|", *rows] if rows else ["None is trained."]


def _cell(verdict: Found, about: str) -> str:
    found = next((f for f in verdict["findings"] if f["about"] == about), None)
    if found is None:
        return ""
    return SHORT.get(found["detail"], found["detail"].replace("|", "\\|"))


def _others(verdicts: list[Found]) -> list[str]:
    lines: list[str] = []
    refused = [v for v in verdicts if v["refused"]]
    if refused:
        lines += ["| not trained | why |", "|---|---|", *(f"| {v['name']} | {_escaped(v['refused'])} |" for v in refused), ""]
    wrong = [v for v in verdicts if not v["refused"] and not is_right(v)]
    if wrong:
        lines += ["| wrong | what |", "|---|---|",
                  *(f"| {v['name']} | {_escaped(_failed(v)[0]['about'] + ': ' + _failed(v)[0]['detail'])} |" for v in wrong), ""]
    return lines


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")

