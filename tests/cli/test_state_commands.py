"""`ratel check` and `ratel export` on the states of small runs."""

import json
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ratel import cli
from ratel.runtime.states.saved_state import SavedState
from ratel.training.output import RunDirectory
from tests.support.commands import start
from tests.support.families import batches, build
from tests.support.patience import patience
from tests.support.resume import make_model, make_text, model_files, train
from tests.support.sessions import flip

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    train(model, make_text(directory / "text.jsonl"), directory / "out", steps=3, save_every=2, keep=2)
    return directory / "out"


def ratel(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(("below", "step"), [("", 3), ("state", 3), ("state/step-00000002", 2)])
def test_check_finds_the_state_that_is_meant(below: str, step: int, out: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, err = ratel(capsys, "check", out / below)
    assert status == 0 and err == ""
    assert shown.startswith(f"{out}/state/step-{step:08d}: whole; 4 units, ") and "/s)" in shown


def test_check_reports_as_json(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, _ = ratel(capsys, "check", out, "--json")
    report = json.loads(shown)
    assert status == 0 and report["ok"] and report["units"] == 4 and report["bytes_per_s"] > 0
    assert report["num_bytes"] == SavedState(out / "state" / "step-00000003").verify()


def test_check_names_the_damage(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = out / "state" / "step-00000002"
    file = state / "planes.0"
    position = SavedState(state).manifest["planes"][2]["v"]["offset"] + 9
    flip(file, position)
    try:
        status, shown, err = ratel(capsys, "check", state)
        assert status == 2 and shown == "" and err.count("\n") == 1
        assert "unit block.1, plane v, chunk 0" in err and str(file) in err
        status, shown, _ = ratel(capsys, "check", state, "--json")
        assert status == 2 and not json.loads(shown)["ok"] and "plane v, chunk 0" in json.loads(shown)["problem"]
    finally:
        flip(file, position)


def test_check_shows_a_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from ratel.cli.check import _ProgressLine

    screen, terminal = pty.openpty()
    with open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with _ProgressLine(4 << 20, 0.0) as line:
            line.advance(1 << 20)
            line.advance(1 << 20)
    assert "1.00 MiB of 4.00 MiB" in os.read(screen, 4096).decode()


@pytest.mark.parametrize(("arguments", "message"), [
    (["check", "{tmp}"], "ratel: DIR: holds no complete state"),
    (["check", "{tmp}/none"], "ratel: DIR: is not a directory"),
    (["check", "{tmp}/step-00000001"], "ratel: state: is not a complete state: No such file"),
    (["export", "--state", "{tmp}", "--out", "{tmp}/new"], "ratel: --state: holds no complete state"),
    (["export", "--state", "{out}", "--out", "{out}"], "ratel: --out: is not an empty directory"),
    (["export", "--state", "{out}", "--out", "{tmp}/new", "--model", "demo"], "ratel: state: it has 4 units"),
    (["export", "--state", "{out}", "--out", "{tmp}/new", "--dtype", "fp16"], "ratel: argument --dtype: invalid"),
])
def test_mistakes_are_one_line(arguments: list[str], message: str, out: Path, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, err = ratel(capsys, *(argument.format(tmp=tmp_path, out=out) for argument in arguments))
    assert status == 2 and shown == "" and err.startswith(message) and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_export_equals_the_runs_own(out: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user does it, from where the run was."""
    command = start("export", "--state", out, "--out", tmp_path / "model")
    _, err = command.communicate(timeout=patience(90))
    assert command.returncode == 0, err
    assert model_files(tmp_path) == model_files(out)


def test_export_in_fp32_keeps_every_bit(out: Path, model: Path, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """Read back by transformers and compared with a session that has the same state."""
    from transformers import AutoModelForCausalLM

    from ratel.runtime.session.session import Session

    assert ratel(capsys, "export", "--state", out, "--out", tmp_path / "model", "--dtype", "fp32")[0] == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert found.dtype == torch.float32
    with Session(model, device="cpu", dtype="bf16") as session:
        session.load(out / "state" / "step-00000003")
        session.prepare(2, 16)
        expected = session.state_dict()
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert any(bool((value.view(torch.int32) & 0xFFFF).any()) for value in expected.values()), "nothing beyond bf16"


@pytest.mark.parametrize("options", [dict(dtype="fp32"), dict(data="batches"), dict(chat=True)])
def test_export_of_other_runs(options: dict[str, Any], model: Path, tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:
    """fp32 runs, batches without a tokenizer, and a conversation that gave the tokenizer a
    template."""
    data: Any = make_text(tmp_path / "text.jsonl")
    if options.pop("chat", False):
        turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two, " * 8}]
        data.write_text((json.dumps({"messages": turns}) + "\n") * 20)
        options["tokenizer"] = tokenizer_without_template(tmp_path / "tokenizer")
    if options.pop("data", None):
        data, options["batch_size"] = batches("llama", 3), 4
    train(model, data, tmp_path / "out", **{"steps": 2, "save_every": 2, **options})
    assert ratel(capsys, "export", "--state", tmp_path / "out", "--out", tmp_path / "again" / "model")[0] == 0
    assert model_files(tmp_path / "again") == model_files(tmp_path / "out")


def tokenizer_without_template(path: Path) -> Path:
    from ratel.data import load_tokenizer

    tokenizer = load_tokenizer(None)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path


def test_frozen_parameters_have_no_lower_half(tmp_path: Path) -> None:
    from ratel.runtime.session.session import Session
    from ratel.training.export_state import merged

    model = build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    with Session(model, device="cpu", dtype="bf16", lr=1e-3) as session:
        session.step(batches("llama", 1)[0])
        saved = SavedState(session.save(tmp_path / "state"))
        for unit in session.plan.spec.units:
            assert torch.equal(merged(saved, unit, session.parts), session.read_master(unit)), unit.name


def test_export_of_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("demo", make_text(tmp_path / "text.jsonl"), tmp_path / "out", steps=1, warmup_steps=0, save_every=1, seed=3)
    assert ratel(capsys, "export", "--state", tmp_path / "out" / "state", "--out", tmp_path / "again" / "model")[0] == 0
    assert model_files(tmp_path / "again") == model_files(tmp_path / "out")


def test_export_names_what_an_object_has_not_left(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                  model: Path) -> None:
    from transformers import AutoModelForCausalLM

    train(AutoModelForCausalLM.from_pretrained(model), batches("llama", 2), tmp_path / "out", steps=1, warmup_steps=0,
          save_every=1, batch_size=4)
    export = ("export", "--state", tmp_path / "out", "--out", tmp_path / "new")
    status, _, err = ratel(capsys, *export)
    assert status == 2 and "--model: the run's model (LlamaForCausalLM) is neither a directory here nor a preset" in err
    assert ratel(capsys, *export, "--model", model)[0] == 0


@pytest.mark.parametrize("command", ["check", "export"])
def test_a_state_that_its_run_is_writing_over_is_not_called_damaged(command: str, out: Path, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Commits in place go on while somebody reads."""
    state = out / "state" / "step-00000003"
    position = SavedState(state).manifest["planes"][2]["hi"]["offset"] + 9
    arguments = ("check", out) if command == "check" else ("export", "--state", out, "--out", tmp_path / "model")
    flip(state / "planes.0", position)
    try:
        assert "is damaged" in ratel(capsys, *arguments)[2]
        with RunDirectory(out) as run:
            run.open(keep_results=True)
            status, _, err = ratel(capsys, *(a if a != tmp_path / "model" else tmp_path / "again" for a in arguments))
            assert status == 2 and "was written over by its run, which goes on" in err
    finally:
        flip(state / "planes.0", position)
