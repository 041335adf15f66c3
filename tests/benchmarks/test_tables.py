"""The pages that are made of results and plans: they are up to date, and a figure without an origin
does not get in."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.report import RESULTS, Report
from benchmarks.tables import evaluation, readme
from benchmarks.tables.source import NoCommit, source

pytestmark = pytest.mark.unit
STEP = {"model": "m", "batch_size": 1, "seq_len": 8, "error": "full", "hardware": {"gpu": "a GPU", "torch": "2"}}


def test_the_page_of_results_is_what_the_results_give() -> None:
    assert evaluation.TARGET.read_text(encoding="utf-8") == evaluation.document(), "run python -m benchmarks.tables"


@pytest.mark.timeout(300)
def test_readme_shows_what_its_plan_lines_and_the_results_say() -> None:
    assert readme.TARGET.read_text(encoding="utf-8") == readme.document(), "run python -m benchmarks.tables"


def test_the_rows_of_readme_follow_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan is asked for again with less memory: its row is another, so the row is not a
    constant."""
    less = readme.PLANS[0].replace("--batch-size 8", "--batch-size 4")
    monkeypatch.setattr(readme, "PLANS", (less,))
    (row,) = (line for line in readme.fits_lines() if line.startswith("| llama"))
    assert "| 4 x 1024 |" in row and row not in readme.TARGET.read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [{"host": {"cpu": {"model": "a processor"}}, "commit": None, "points": []}, [STEP],
                                     [{**STEP, "commit": "c" * 40}, STEP]])
def test_a_result_without_a_commit_is_refused(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "step" if isinstance(content, list) else "curve"
    (tmp_path / f"m_{kind}.json").write_text(json.dumps(content))
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    with pytest.raises(NoCommit, match=f"m_{kind}.json: no commit"):
        evaluation.document()


def test_a_new_result_has_a_commit(tmp_path: Path) -> None:
    path = tmp_path / "m_curve.json"
    Report(str(path), gpu="a GPU", torch="2").add({"name": "a"})
    content = json.loads(path.read_text())
    assert f"commit {content['commit'][:10]}" in source(path.name, content)


def test_only_results_from_before_commits_were_noted_have_none() -> None:
    """They say which commit stored them. Nothing that is measured today may join them."""
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    entries = {stem: content if isinstance(content, list) else [content] for stem, content in contents.items()}
    without = [stem for stem, found in entries.items() if not all(entry.get("commit") for entry in found)]
    assert len(contents) > 40 and len(without) <= 19, without


def test_no_history_is_kept_beside_the_results() -> None:
    """What a result was before stands in git; docs/log.md names the commit."""
    assert [path.name for path in RESULTS.iterdir() if path.stem.endswith(("_before", "_small_probe", "_short_timings"))] == []


def test_adapters_have_a_table_of_linears_and_one_of_layers() -> None:
    point = {"rank": 8, "dropout": 0.0, "frozen_ms": 1.0, "floor": 1.02, "ratios": {"fused": {"device": 1.25, "clock": 1.5}}}
    lines = evaluation.SECTIONS["lora"].lines({"points": [{**point, "inputs": 64, "outputs": 32}, {**point, "layer": "llama-3b"}]})
    assert [line.split(" | ")[0] for line in lines if " | 8 | " in line] == ["| 64 -> 32", "| llama-3b"]
    assert sum(line.endswith("| 1.25 (1.50) |") for line in lines) == 2
