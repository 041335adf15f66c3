"""After every refusal of --resume there is a way on, which the message names: typed as it says, it
works."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import nvme_ds
import ratel
from ratel.cli import main
from ratel.data import byte_level_tokenizer
from ratel.hardware import host
from tests.support.resume import make_model, make_text

pytestmark = pytest.mark.e2e
OPTIONS = ("--batch-size 2 --seq-len 16 --device cpu --dtype fp32 --eval-sequences 2 --micro-batch 2 --dram 4GiB --quiet").split()
START = ["train", "--model", "base", "--data", "text.jsonl", *OPTIONS, "--steps", "4"]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, a text, and the run ``copies`` with states after steps 2 and 4."""
    home = tmp_path_factory.mktemp("ready")
    make_model(home / "base")
    byte_level_tokenizer().save_pretrained(home / "base")
    make_text(home / "text.jsonl")
    here = os.getcwd()
    os.chdir(home)
    try:
        assert main([*START, "--out", "copies", "--save-every", "2", "--keep", "2"]) == 0
    finally:
        os.chdir(here)
    return home


@pytest.fixture
def home(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    shutil.copytree(ready, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def resume(out: str = "copies", *options: str) -> int:
    return main(["train", "--out", out, "--resume", "--steps", "6", *options])


def message(capsys: pytest.CaptureFixture[str], status: int, wanted: int = 2) -> str:
    said = capsys.readouterr().err
    assert status == wanted and said.startswith("ratel: ") and said.count("\n") == 1
    return said


NEWEST = "copies/state/step-00000004"


def cut(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def lose(path: str) -> None:
    os.unlink(path)


@pytest.mark.parametrize("damage, file", [(lose, "manifest.json"), (cut, "manifest.json"), (lose, "planes.0"), (cut, "planes.0"), (cut, "commit-0")])
def test_a_damaged_state_is_removed_as_the_message_says(damage: Any, file: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(f"{NEWEST}/{file}")
    said = message(capsys, resume())
    assert f"Remove {NEWEST} to resume from copies/state/step-00000002" in said
    for command in ("check copies", "export --state copies --out exported"):
        assert "use copies/state/step-00000002, the state before it" in message(capsys, main(command.split()))
    subprocess.run(shlex.split(re.search("`(rm -r .*?)`", said)[1]), check=True)
    assert resume() == 0 and Path("copies/state/step-00000006/manifest.json").is_file()


def test_an_older_state_that_is_damaged_too_is_not_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for state in Path("copies/state").iterdir():
        cut(f"{state}/manifest.json")
    assert "There is no older state in it: start anew with --overwrite" in message(capsys, resume())
    assert main(["train", "--model", "base", "--data", "text.jsonl", *OPTIONS, "--steps", "1", "--out", "copies", "--overwrite"]) == 0


@pytest.mark.parametrize("instead", ["nothing", "an empty directory", "another drive"])
def test_an_ssd_that_is_mounted_elsewhere(instead: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("ssd")
    assert main([*START, "--out", "commits", "--ssd", "ssd", "--tier", "ssd", "--durable", "step"]) == 0
    os.rename("ssd", "elsewhere")
    if instead != "nothing":
        os.mkdir("ssd")
    if instead == "another drive":
        Path("ssd/ratel-0123456789abcdef.0").write_bytes(b"of somebody else")
    before = {path: path.read_bytes() for path in home.glob("ssd/*")}
    said = message(capsys, resume("commits"))
    assert "is not there" in said and "Mount its drive again, or, if it is mounted elsewhere now, name that directory with --ssd" in said
    assert "Mount its drive again" in message(capsys, main(["check", "commits"]))
    assert before == {path: path.read_bytes() for path in home.glob("ssd/*")}
    assert main(["check", "commits", "--ssd", "elsewhere"]) == 0
    assert resume("commits", "--ssd", "elsewhere") == 0


@pytest.mark.parametrize("flag, name", [("--model", "base"), ("--data", "text.jsonl")])
def test_what_the_run_reads_was_moved(flag: str, name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(name, f"moved-{name}")
    said = message(capsys, resume())
    assert f"{flag}: is what the run was started with, and is not there (given: {name}). Say where it is now with {flag}" in said
    assert resume("copies", flag, f"moved-{name}") == 0


def test_another_directory_to_resume_in(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "below").mkdir()
    monkeypatch.chdir(home / "below")
    assert "or resume in the directory that the run was started in" in message(capsys, resume("../copies"))
    monkeypatch.chdir(home)
    assert resume() == 0


def edited(name: str, change: Any) -> None:
    content = json.loads(Path(name).read_text())
    change(content)
    Path(name).write_text(json.dumps(content))


def test_a_model_that_computes_otherwise(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("base", "other")
    edited("other/config.json", lambda content: content.update(hidden_act="gelu", transformers_version="0", initializer_range=0.5))
    said = message(capsys, resume("copies", "--model", "other"))
    assert 'its configuration is not that of the run to be continued: hidden_act (was "silu", is "gelu") (given: other)' in said
    edited("other/config.json", lambda content: content.update(hidden_act="silu"))
    assert resume("copies", "--model", "other") == 0


def test_a_tokenizer_of_the_same_size_with_other_tokens(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def swap(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    shutil.copytree("base", "other")
    edited("base/tokenizer.json", swap)
    said = message(capsys, resume())
    assert "different: what the tokenizer makes of a text" in said and "start a new run with --model OUT/model" in said
    assert main(["train", "--model", "copies/model", "--data", "text.jsonl", *OPTIONS, "--steps", "1", "--out", "new"]) == 0
    assert resume("copies", "--tokenizer", "other") == 0


def test_lost_options_are_given_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("copies/config.json").write_text("{")
    assert "Put the file right, or remove it and give --model and all other options again" in message(capsys, resume())
    lose("copies/config.json")
    assert "or --model and all other options as they were" in message(capsys, resume())
    assert resume("copies", "--model", "base", "--data", "text.jsonl", *OPTIONS, "--save-every", "2") == 0


@pytest.mark.parametrize("option, said, instead", [
    (["--optimizer-state", "moments"], "contradicts --resume: the state that is continued has moments of its own", []),
    (["--seed", "1"], "seed: the state was made with seed 0 (given: 1). Give seed 0", ["--seed", "0"]),
    (["--seq-len", "32"], "different: --seq-len (was 16, is 32)", ["--seq-len", "16"]),
    (["--device", "cuda"], "there is no CUDA device", ["--device", "cpu"]),
    (["--dram", "1MiB"], "Give a larger --dram", ["--dram", "3GiB"]),
    (["--durable", "step"], "Use --keep 1, or --durable checkpoint to keep more", ["--keep", "1", "--durable", "step", "--ssd", "base"])])
def test_options_that_cannot_be_as_asked(option: list[str], said: str, instead: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in message(capsys, resume("copies", *option))
    assert resume("copies", *instead) == 0


def test_other_versions_of_libraries_are_said(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratel.training.attempt.library_versions", lambda: {**host.library_versions(), "torch": "9.9"})
    edited("copies/config.json", lambda content: content.update(quiet=False))
    assert resume() == 0
    assert re.search(r"torch: was \S+, is 9.9; sums may be rounded differently", capsys.readouterr().out)


@pytest.mark.parametrize("place", ["model", "state"])
def test_a_file_of_options_in_what_is_replaced(place: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("copies", place, "run.toml")
    file.write_text('model = "base"\ndata = "text.jsonl"\nsteps = 1\n')
    said = message(capsys, main(["train", "--config", str(file), *OPTIONS, "--out", "copies", "--overwrite"]))
    assert f"--config: lies in copies/{place}, which the run replaces (given: {file})" in said
    os.rename(file, "copies/run.toml")
    assert main(["train", "--config", "copies/run.toml", *OPTIONS, "--out", "copies", "--overwrite"]) == 0
    assert Path("copies/run.toml").is_file()


def test_a_copy_by_hard_links_is_made_a_copy(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["cp", "-al", "copies", "linked"], check=True)
    before = {path: path.read_bytes() for path in sorted(home.glob("copies/**/*")) if path.is_file()}
    said = message(capsys, resume("linked"))
    assert "as a hard link: what the run writes would be in its other name, too (given: linked). Make a copy of the directory (cp -r)" in said
    subprocess.run(["cp", "-r", "linked", "copied"], check=True)
    assert resume("copied") == 0
    assert before == {path: path.read_bytes() for path in sorted(home.glob("copies/**/*")) if path.is_file()}


def test_a_disk_that_fills_up_and_is_emptied(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, calls = os.posix_fallocate, []

    def second_fails(*given: int) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(*given)

    start = [*START, "--steps", "6", "--save-every", "2", "--out", "filled"]
    with monkeypatch.context() as patch:
        patch.setattr(nvme_ds.files.os, "posix_fallocate", second_fails)
        said = message(capsys, main(start))
    assert re.search(r"could not be written: \d+ bytes are needed and \d+ are free \(given: filled/state/step-00000004\)\. Free space there", said)
    assert [path.name for path in Path("filled/state").iterdir()] == ["step-00000002"]
    assert resume("filled") == 0 and main(["check", "filled"]) == 0
    assert main([*start[:-1], "whole"]) == 0
    filled, whole = ([json.loads(line)["loss"] for line in Path(out, "metrics.jsonl").read_text().splitlines()] for out in ("filled", "whole"))
    assert len(whole) == 6 and filled == whole


@pytest.mark.parametrize("place, said", [("model/t.json", "lies in copies/model, which the run replaces"),
                                         ("metrics.jsonl", "is copies/metrics.jsonl, which the run replaces"),
                                         ("skipped.json", "is copies/skipped.json, which the run replaces")])
def test_a_trace_in_what_is_replaced(place: str, said: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in home.glob("copies/**/*") if path.is_file()}
    assert f"--trace: {said}" in message(capsys, main([*START, "--out", "copies", "--overwrite", "--trace", f"copies/{place}"]))
    assert before == {path: path.read_bytes() for path in home.glob("copies/**/*") if path.is_file()}
    assert main([*START, "--out", "copies", "--overwrite", "--trace", "copies/t.json"]) == 0
    assert Path("copies/t.json").read_text().startswith('{"displayTimeUnit"')


def test_another_text_to_evaluate_on_is_said(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy("text.jsonl", "held.jsonl")
    assert main([*START, "--out", "run", "--save-every", "2", "--eval-data", "held.jsonl"]) == 0
    assert resume("run") == 0 and "evaluated" not in caplog.text
    with open("held.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert main(["train", "--out", "run", "--resume", "--steps", "7"]) == 0
    assert caplog.text.count("what is evaluated on was changed: losses before and after are of different texts") == 1


def test_batches_of_python_are_given_again_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [{"input_ids": torch.arange(32).view(2, 16)}] * 4
    options = dict(batch_size=2, seq_len=16, device="cpu", dtype="fp32", dram="4GiB", quiet=True)
    ratel.train("base", data, steps=2, out="own", save_every=1, **options)
    said = message(capsys, resume("own"))
    assert "(given: list)" in said and "what was an object of Python is given again to ratel.train(..., resume=True, out=...)" in said
    assert "Resume with ratel.train(model, batches, resume=True, out=...)" in message(capsys, resume("own", "--data", "text.jsonl"))
    assert ratel.train("base", data, steps=3, out="own", resume=True).steps == 3
