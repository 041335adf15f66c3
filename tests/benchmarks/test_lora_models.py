"""The script that makes RunLoRA's table anew, on one tiny row: rows are written one by one, and the
page shows them."""

import json
from pathlib import Path

import pytest

from benchmarks.speed import lora_models
from benchmarks.tables import evaluation
from ratel.training.bench import adapted, published

pytestmark = pytest.mark.unit
TINY = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 48, "max_position_embeddings": 16}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (published.Row(model="llama-60m", batch=2, rank=2, time_saved=12.5, memory_mb=(3.0, 4.0), seq_len=8),
            published.Row(model="llama-60m", batch=2, rank=3, time_saved=12.5, seq_len=8))
    monkeypatch.setattr(lora_models, "ROWS", rows)
    monkeypatch.setattr(adapted, "MODELS", {"llama-60m": TINY})


def measured(path: Path, *words: str) -> list[dict[str, object]]:
    lora_models.main(["--device", "cpu", "--dtype", "fp32", "--min-run-time", "0.001", "--json", str(path), *words])
    return json.loads(path.read_text())["points"] if path.exists() else []


def test_its_rows_are_on_the_page(tmp_path: Path) -> None:
    path = tmp_path / "m_runlora.json"
    points = measured(path, "--criterions", "auto", "--dropouts", "0", "0.1")
    assert [(point["rank"], point["dropout"]) for point in points] == [(2, 0.0), (3, 0.0), (2, 0.1), (3, 0.1)]
    (more,) = measured(path, "--ranks", "3", "--batch", "1", "--seq-len", "4", "--criterions", "f1+b1")[4:]
    assert (more["batch"], more["seq_len"], more["rank"]) == (1, 4, 3)
    content = json.loads(path.read_text())
    assert content["commit"] and evaluation.kind_of(path) == "runlora"
    lines = evaluation.SECTIONS["runlora"].lines(content)
    assert sum("llama-60m" in line for line in lines) == 10 and any("RunLoRA's, %" in line for line in lines)


def test_the_picture_shows_every_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    path = tmp_path / "m_runlora.json"
    measured(path, "--ranks", "2", "--criterions", "auto", "f1+b1")
    axes = Figure().subplots()
    evaluation.PLOTS["runlora"][1](json.loads(path.read_text()))(axes)
    assert [container.get_label() for container in axes.containers] == ["auto", "f1+b1", "RunLoRA, published"]
    assert [bar.get_height() for bar in axes.containers[2]] != []


def test_no_row_is_begun_after_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measured(tmp_path / "m_runlora.json", "--budget-s", "0") == []
    assert capsys.readouterr().out.count("not begun: llama-60m") == 2
