"""Whole models with adapters beside peft, tiny and on the CPU: what is timed is one work, dropout is
on, and RunLoRA's options and files."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ratel.errors import RatelError
from ratel.training.bench import adapted, adapted_report, published
from ratel.training.bench.adapted import AdaptedWork

pytestmark = pytest.mark.numerics
TINY = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 16}
OPT = {"model_type": "opt", "vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64,
       "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 16, "do_layer_norm_before": False,
       "dropout": 0.0}
MODELS = {"tiny": TINY, "tiny-opt": OPT}
TOKENS = torch.arange(24).reshape(2, 12) * 5 % 64
Work = Callable[..., AdaptedWork]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(adapted, "MODELS", MODELS)
    monkeypatch.setattr(published, "MODELS", MODELS)
    tiny = AdaptedWork(model="tiny", batch=2, seq_len=12, rank=3, alpha=6, dtype="fp32", device=torch.device("cpu"),
                       min_run_s=1e-6)
    return lambda **changes: replace(tiny, **changes)


def gradients(work: AdaptedWork, criterion: str | None, steps: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and gradients by the layer's name and A or B, whatever the parameters are called."""
    model = adapted.build(work)
    layers = adapted.adapted_layers(work, model)
    draws = None if criterion is None else adapted.put_ours(work, model, layers, criterion)
    whole = adapted.put_peer(work, model, layers)[1] if criterion is None else model
    losses = []
    for step in range(steps):
        if draws is not None:
            draws.begin(step)
        loss = whole(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, {f"{layer.name}.{part}": grad_of(getattr(model.get_submodule(layer.name), part))
                    for layer in layers for part in ("lora_A", "lora_B")}


def grad_of(part: Any) -> torch.Tensor:
    if isinstance(part, nn.ModuleDict):
        part = part["default"]
    return (part.weight if isinstance(part, nn.Module) else part).grad


@pytest.mark.parametrize("criterion", ["auto", "flops", "f2+b5", None])
@pytest.mark.parametrize("model", ["tiny", "tiny-opt"])
def test_losses_and_gradients_are_those_of_peft(model: str, criterion: str | None, work: Work) -> None:
    """None: plain PyTorch in peft's place."""
    tiny = work(model=model)
    expected, grads = gradients(replace(tiny, peft="on"), None)
    losses, found = gradients(replace(tiny, peft="off"), criterion)
    assert losses == pytest.approx(expected, rel=1e-6) and found.keys() == grads.keys()
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("criterion", "peft"), [("auto", "auto"), ("f1+b1", "auto"), (None, "on"), (None, "off")])
def test_dropout_is_on_in_all_of_them(criterion: str | None, peft: str, work: Work) -> None:
    """Two runs lose different elements, and without dropout they do not."""
    tiny = work(peft=peft, alpha=600)
    still, dropped = (gradients(replace(tiny, dropout=p), criterion, steps=2)[0] for p in (0.0, 0.5))
    assert still[0] == still[1] and len({*still, *dropped}) == 3


def test_a_measurement_has_ten_warm_runs_of_each(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(adapted.Draws, "begin", lambda self, step, first_row=0: begun.append(step))
    said: list[str] = []
    point = adapted.measure(work(criteria=("auto", "f1+b1"), has_scheme=True), progress=said.append)
    each = adapted.LEAST_RUNS + adapted.WARM_RUNS + 1
    assert begun == [*range(1, each + 1)] * 2 and len(said) == 3
    assert [one["runs"] for one in (*point["ours"], point["peer"])] == [adapted.LEAST_RUNS] * 3
    assert point["peer"]["name"].startswith("peft ") and point["peer"]["mean_s"] > 0 and point["peer"]["memory_bytes"] is None
    losses = [one["loss"] for one in (*point["ours"], point["peer"])]
    norms = [one["gradient_norm"] for one in (*point["ours"], point["peer"])]
    assert max(losses) - min(losses) < 1e-5 and max(norms) - min(norms) < 1e-5 * max(norms) and min(norms) > 0
    assert {one["trained_parameters"] for one in (*point["ours"], point["peer"])} == {point["peer"]["trained_parameters"]}
    assert [set(one["scheme"].values()) for one in point["ours"]] == [{"fused"}, {"f1+b1"}]
    assert len(point["ours"][0]["scheme"]) == 14


def test_a_batch_that_does_not_fit_is_made_smaller_for_all(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, str | None]] = []
    fits = 5

    def measured(of: AdaptedWork, criterion: str | None) -> dict[str, Any]:
        tried.append((of.batch, criterion))
        if criterion is None and of.batch > fits:
            raise torch.OutOfMemoryError
        return {"name": criterion or "peer", "mean_s": 1.0}

    monkeypatch.setattr(adapted, "_measured", measured)
    point = adapted.measure(work(batch=8))
    assert tried == [(8, "auto"), (8, None), (6, "auto"), (6, None), (4, "auto"), (4, None)]
    assert point["batch"] == 4 and point["asked_batch"] == 8
    fits = 0
    with pytest.raises(RatelError, match="single sequence.*--sequence_length"):
        adapted.measure(work(batch=2))


def test_models_have_the_sizes_that_their_names_say() -> None:
    from transformers import AutoModelForCausalLM

    for name in published.MODELS:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(adapted.config_of(name))
        size = name.partition("-")[2]
        said = float(size[:-1]) * (1e9 if size.endswith("b") else 1e6)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(said, rel=0.06), name
        of_rows = [row for row in published.ROWS if row.model == name]
        layers = adapted.adapted_layers(AdaptedWork.of(of_rows[0], device=torch.device("cpu")), model)
        assert len(layers) == len(of_rows[0].targets) * model.config.num_hidden_layers


def test_the_published_savings_are_of_the_published_figures() -> None:
    row = published.published("llama-350m", 256)
    assert row is not None and row.memory_saved == pytest.approx(100 * 3861.98 / 71604.64, abs=1e-3)
    assert published.published("llama-350m", 8) is None and len(published.ROWS) == 11
    assert all(10 < row.time_saved < 29 for row in published.ROWS)


def test_the_table_has_both_savings_beside_the_published_ones() -> None:
    def one(name: str, mean_s: float, memory_bytes: int) -> dict[str, Any]:
        return {"name": name, "mean_s": mean_s, "memory_bytes": memory_bytes}

    point = {"model": "llama-60m", "batch": 48, "asked_batch": 64, "seq_len": 1024, "rank": 8, "dropout": 0.0,
             "ours": [one("auto", 0.08, 3 << 20), one("f1+b1", 0.11, 4 << 20)], "peer": one("peft 1", 0.1, 4 << 20)}
    lines = adapted_report.table([point]).splitlines()[2:]
    assert lines[0] == "| llama-60m | 48 (of 64) x 1024 | 8 | 0.0 | auto | 80.00 | 3 | 20.0 | 13.6 | 25.0 | 0.2 |"
    assert "| f1+b1 | 110.00 | 4 | -10.0 | 13.6 | 0.0 | 0.2 |" in lines[1]
    assert lines[2].endswith("| peft 1 | 100.00 | 4 |  |  |  |  |")


def run(*words: str) -> None:
    from ratel.cli import build_parser

    args = build_parser().parse_args(["bench", "lora", "--device", "cpu", *words])
    args.run(args)


def test_the_command_takes_runlora_s_options_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    out = str(tmp_path / "out")
    run("-m", str(tmp_path / "tiny.json"), "--target_modules", "q_proj", "down_proj", "--criterions", "flops", "f1+b1",
        "--n_batch", "1", "--min_run_time", "0.001", "-r", "2", "-a", "4", "-d", "0.1", "--dtype", "fp32", "-o", out,
        "--scheme", "--json")
    (point,) = json.loads(capsys.readouterr().out)["points"]
    assert (point["batch"], point["seq_len"], point["rank"], point["alpha"], point["dropout"]) == (1, 16, 2, 4, 0.1)
    with open(f"{out}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["criterion"] for row in rows) == ["f1+b1", "flops", point["peer"]["name"]]
    assert {"mean_time_us", "max_mem_overhead_MB", "max_mem_res_overhead_MB", "msrs/runs"} < set(rows[0])
    assert rows[0]["msrs/runs"].partition("/")[2] == "1" and rows[0]["target_modules"] == "q_proj down_proj"
    scheme = (tmp_path / "out_f1+b1.scheme").read_text().splitlines()
    assert len(scheme) == 4 and scheme[0] == "model.layers.0.self_attn.q_proj f1+b1"
    assert (tmp_path / "out_flops.scheme").exists()


def test_all_measures_every_row(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    made = (published.Row(model="tiny", batch=1, rank=2, time_saved=12.5, memory_mb=(3.0, 4.0), seq_len=8),
            published.Row(model="tiny-opt", batch=2, rank=3, time_saved=28.3, seq_len=6))
    monkeypatch.setattr(published, "ROWS", made)
    run("--all", "--dtype", "fp32", "--min_run_time", "0.001", "-o", str(tmp_path / "o"), "--scheme")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| tiny"] * 2 + ["| tiny-opt"] * 2
    assert "| tiny | 1 x 8 | 2 |" in lines[2] and "| 12.5 |  | 25.0 |" in lines[2] and "| 28.3 |" in lines[4]
    assert {path.name for path in tmp_path.glob("*.scheme")} == {"o_tiny-opt_r3_d0.0_auto.scheme", "o_tiny_r2_d0.0_auto.scheme"}


@pytest.mark.parametrize(("words", "expected"), [
    (("-m", "tiny", "--criterions", "f9"), "lora_graph"),
    (("-m", "tiny", "--sequence_length", "17"), "--sequence_length.*16.*17"),
    (("-m", "tiny", "--shapes", "8x8"), "--shapes"), (("--level", "linear", "--n_batch", "2"), "--n_batch"),
    (("--level", "layer", "-m", "tiny"), "-m"), (("--level", "model",), "--model.*--all"), (("--all", "-r", "8"), "-r"),
    (("-m", "tiny", "--scheme"), "--scheme.*-o PREFIX"), (("-m", "tiny", "-o", "/nowhere/at/all"), "--out"),
    (("-m", "tiny", "--target_modules", "embed_tokens"), "--target_modules.*embed_tokens"), (("-m", "tinny"), "model"),
    (("-m", "tiny", "--min_run_time", "0"), "--min_run_time")])
def test_mistakes_are_named(words: tuple[str, ...], expected: str, work: Work) -> None:
    with pytest.raises(RatelError, match=expected):
        run(*words)


@pytest.mark.parametrize(("text", "expected"), [("{", "is not JSON"), ('{"model_type": "none"}', "model_type"),
                                                ("[]", "model_type")])
def test_files_that_are_no_configuration_are_named(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RatelError, match=f"--model.*{expected}.*config.json"):
        run("-m", str(tmp_path / "config.json"))


def test_peft_that_is_not_there_is_said(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted, "find_spec", lambda name: None)
    with pytest.raises(RatelError, match="--peft.*pip install peft"):
        adapted.measure(work(peft="on"))
    assert adapted.measure(work())["peer"]["name"] == "plain PyTorch"
