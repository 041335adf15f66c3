"""Optimizer states from Ratel to PyTorch and back: a run that is split in the middle ends as if it
were not."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ratel
from ratel import cli
from ratel.optimizer_state import load_adamw_state, save_adamw_state
from ratel.runtime.states import export
from ratel.runtime.states import moments
from ratel.runtime.states.saved_state import SavedState
from tests.support.families import ROWS, batches, build
from tests.optimizer_state.states import DECAY, HALF, LR, Plain, everything, freeze, open_decaying
from tests.support.resume import make_model, make_text, model_files, train

pytestmark = pytest.mark.e2e
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "state_format.md"


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


CASES = [("llama", ROWS, None), ("llama", 1, None), ("llama", ROWS, "mlp"), ("llama-tied", ROWS, None),
         ("gpt2", ROWS, None), ("mixtral", 2, None), ("patches", ROWS, None), ("llama", ROWS, "embed_tokens")]


@cache
def whole(family: str, micro_rows: int, frozen: str | None) -> dict[str, Tensor]:
    """What the run that nobody splits ends with."""
    return Plain(family, micro_rows=micro_rows, frozen=frozen).run(family, 0, 2 * HALF).everything()


@pytest.mark.parametrize(("family", "micro_rows", "frozen"), CASES)
def test_torch_then_ratel(family: str, micro_rows: int, frozen: str | None, ssd_dir: Path, tmp_path: Path) -> None:
    half = Plain(family, micro_rows=micro_rows, frozen=frozen).run(family, 0, HALF)
    save_adamw_state(tmp_path / "half", half.model, half.optimizer)
    with open_decaying(half.model, family, ssd_dir, micro_batch=micro_rows,
                      optimizer_state=tmp_path / "half") as session:
        for batch in batches(family, 2 * HALF)[HALF:]:
            session.step(batch)
        assert_equal(everything(session), whole(family, micro_rows, frozen))


@pytest.mark.parametrize(("family", "micro_rows", "frozen"), CASES)
def test_ratel_then_torch(family: str, micro_rows: int, frozen: str | None, ssd_dir: Path, tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Through an export in shards."""
    monkeypatch.setattr(export, "SHARD_BYTES", 0)
    monkeypatch.setattr(moments, "SHARD_BYTES", 0)
    model = build(family)
    freeze(model, frozen)
    with open_decaying(model, family, ssd_dir, micro_batch=micro_rows) as session:
        for batch in batches(family, HALF):
            session.step(batch)
        session.export(tmp_path / "half", dtype="fp32", optimizer=True)
    rest = Plain(family, micro_rows=micro_rows, frozen=frozen)
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    if hasattr(rest.model, "config"):  # which may store experts one by one
        stored = type(rest.model).from_pretrained(tmp_path / "half").state_dict()
    else:
        stored = {name: value for path in (tmp_path / "half").glob("model-*.safetensors") for name, value in load_file(path).items()}
    rest.model.load_state_dict(stored)
    assert len(list((tmp_path / "half").glob("optimizer-*.safetensors"))) > 1
    load_adamw_state(tmp_path / "half", rest.model, rest.optimizer)
    assert_equal(rest.run(family, HALF, 2 * HALF).everything(), whole(family, micro_rows, frozen))


@pytest.mark.parametrize("options", [dict(tier="dram"), dict(tier="gpu"), dict(optimizer="eager", max_grad_norm=0),
                                     dict(dtype="bf16", micro_batch=2)])
def test_ratel_then_ratel(options: dict[str, Any], ssd_dir: Path, tmp_path: Path) -> None:
    """In any tier and mode, and in bf16, whose masters are fp32."""
    with open_decaying(build("llama"), "llama", ssd_dir, **options) as session:
        for batch in batches("llama", 2 * HALF):
            session.step(batch)
        expected = everything(session)
    with open_decaying(build("llama"), "llama", ssd_dir, **options) as session:
        for batch in batches("llama", HALF):
            session.step(batch)
        session.export(tmp_path / "half", dtype="fp32", optimizer=True)
    with open_decaying(tmp_path / "half", "llama", ssd_dir, optimizer_state=tmp_path / "half", **options) as session:
        for batch in batches("llama", 2 * HALF)[HALF:]:
            session.step(batch)
        assert_equal(everything(session), expected)


def test_without_the_moments_the_run_differs(ssd_dir: Path, tmp_path: Path) -> None:
    expected = whole("llama", ROWS, None)
    half = Plain("llama").run("llama", 0, HALF)
    with open_decaying(half.model, "llama", ssd_dir) as session:
        for batch in batches("llama", 2 * HALF)[HALF:]:
            session.step(batch)
        found = everything(session)
    assert not torch.equal(found["model.norm.weight"], expected["model.norm.weight"])


# --- the command line -----------------------------------------------------------------------------------------------

OPTIONS = dict(device="cpu", dtype="fp32", lr=LR, schedule="constant", warmup_steps=0, weight_decay=DECAY, quiet=True,
               batch_size=ROWS, micro_batch=ROWS, seq_len=16, dram="4GiB")


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status = cli.main([str(argument) for argument in arguments])
    shown, err = capsys.readouterr()
    assert status == 0, err
    return shown


def test_a_run_split_by_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, export, and train from the export; then resume that without the files of the
    moments."""
    build("llama").save_pretrained(tmp_path / "model")
    made = batches("llama", 2 * HALF)
    ratel.train(tmp_path / "model", made, out=tmp_path / "whole", steps=2 * HALF, **OPTIONS)
    ratel.train(tmp_path / "model", made, out=tmp_path / "first", steps=HALF, save_every=HALF, **OPTIONS)
    command(capsys, "export", "--state", tmp_path / "first", "--out", tmp_path / "half", "--dtype", "fp32",
            "--optimizer")
    rest = dict(out=tmp_path / "rest", **OPTIONS)
    ratel.train(tmp_path / "half", made[HALF:], optimizer_state=tmp_path / "half", steps=HALF - 1, save_every=1, **rest)
    (tmp_path / "half" / "optimizer.safetensors").unlink()
    ratel.train(tmp_path / "half", made[HALF:], steps=HALF, resume=True, **rest)
    assert model_files(tmp_path / "rest")["model.safetensors"] == model_files(tmp_path / "whole")["model.safetensors"]
    training = SavedState(tmp_path / "rest" / "state" / f"step-{HALF:08d}").training
    assert (training["steps"], training["updates"]) == (HALF, 2 * HALF)


def test_the_option_on_the_command_line_and_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    train(model, text, tmp_path / "first", steps=3, save_every=3)
    half = tmp_path / "half"
    command(capsys, "export", "--state", tmp_path / "first", "--out", half, "--optimizer")
    start = ["train", "--model", half, "--data", text, "--steps", 2, "--batch-size", 2, "--seq-len", 16,
             "--device", "cpu", "--dram", "4GiB", "--quiet", "--save-every", 2]
    (tmp_path / "run.toml").write_text(f'optimizer-state = "{half}"\n')
    for number, extra in enumerate((["--optimizer-state", half / "optimizer.safetensors"],
                                    ["--config", tmp_path / "run.toml"])):
        out = tmp_path / f"out-{number}"
        command(capsys, *start, "--out", out, *extra)
        assert SavedState(out / "state" / "step-00000002").training["updates"] == 3 + 2
        assert json.loads((out / "config.json").read_text())["optimizer_state"].startswith(str(half))
    arguments = [*start, "--out", tmp_path / "new", "--optimizer-state", tmp_path]
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert "optimizer_state: there is no optimizer.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_examples_in_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """The section's blocks in their order, commands through the command line, on a small run in
    runs/long."""
    monkeypatch.chdir(tmp_path)
    ratel.train("demo", make_text(tmp_path / "text.jsonl"), out="runs/long", steps=1, save_every=1,
                **{**OPTIONS, "batch_size": 1, "micro_batch": 1})
    section = DOCUMENT.read_text().partition("## Optimizer states for PyTorch")[2]
    names: dict[str, Any] = {}
    for language, block in re.findall(r"```(python|console)\n(.*?)```", section, flags=re.DOTALL):
        if language == "python":
            exec(block, names)
        elif block.startswith("$ ratel train"):
            short = ["--steps", "1", "--batch-size", "1", "--seq-len", "16", "--dtype", "fp32", "--device", "cpu",
                     "--data", "text.jsonl", "--save-every", "1", "--quiet", "--dram", "4GiB"]
            command(capsys, *block.split()[2:], *short)
        else:
            command(capsys, *block.split()[2:])
    assert SavedState(tmp_path / "runs" / "end" / "state" / "step-00000001").training["updates"] == 2
