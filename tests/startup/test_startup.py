"""The way to the first step: reading ahead, weights straight from their files to their tiers, and
the time line."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ratel import cli, models
from ratel.cli import train as train_command
from ratel.errors import RatelError
from ratel.models.safetensors import files as safetensors_files
from ratel.models.safetensors.stored_bits import Run, StoredBits
from ratel.models.stored import Stored
from ratel.runtime.session.session import Session
from ratel.runtime.states import imports as weight_import
from ratel.startup import readahead
from ratel.trace import phases
from tests.support.patience import patience, wait_until
from tests.startup.starts import save_checkpoint

STATES = ("hi", "lo", "m", "v")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def states(checkpoint: Path, tier: str, ssd: Path, **options: object) -> dict[tuple[str, str], torch.Tensor]:
    with Session(str(checkpoint), device="cpu", dtype="bf16", dram="2GiB", ssd=[ssd], tier=tier, **options) as session:
        session.prepare(1, 16)
        return {(unit.name, name): session.read_state(unit, name) for unit in session.plan.spec.units for name in STATES}


@pytest.mark.e2e
@pytest.mark.parametrize("tier", ["gpu", "dram", "ssd"])
def test_weights_from_files_are_those_that_were_converted_in_memory(checkpoint: Path, tier: str, ssd_dir: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"gpu_memory": "2GiB"} if tier == "gpu" else {}
    monkeypatch.setattr(weight_import, "PIECE_ELEMENTS", 1 << 18)  # two pieces of the embedding
    straight = states(checkpoint, tier, ssd_dir, **more)
    monkeypatch.setattr(Stored, "bits", lambda self, unit: None)
    converted = states(checkpoint, tier, ssd_dir, **more)
    assert straight.keys() == converted.keys()
    for key, values in straight.items():
        assert values.dtype == converted[key].dtype and torch.equal(values, converted[key]), key
        assert values.any() == (key[1] == "hi"), key


@pytest.mark.unit
def test_fp32_weights_are_converted(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    parts = models.load(str(tmp_path), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert all(parts.stored.bits(unit) is None for unit in parts.spec.units)
    parts.close()


@pytest.mark.unit
def test_any_part_of_a_unit_is_read_and_padding_is_zero(tmp_path: Path) -> None:
    bits = torch.randint(-(1 << 15), 1 << 15, (40,), dtype=torch.int16)  # infinities and NaN among them
    file = tmp_path / "file"
    file.write_bytes(b"head" + bits.numpy().tobytes())
    runs = [Run(file=file, offset=4 + 2 * 10, begin=0, end=5), Run(file=file, offset=4, begin=8, end=18)]
    whole = torch.zeros(24, dtype=torch.int16)
    whole[0:5], whole[8:18] = bits[10:15], bits[0:10]
    for begin in range(24):
        for end in range(begin + 1, 25):
            out = torch.full((end - begin,), 7, dtype=torch.int16)
            StoredBits(runs).read(begin, out.view(torch.bfloat16))
            assert torch.equal(out, whole[begin:end]), (begin, end)


@pytest.mark.unit
def test_a_file_that_became_shorter_or_unreadable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10))
    run = StoredBits([Run(file=file, offset=0, begin=0, end=8)])
    with pytest.raises(RatelError, match="the file ends at byte 10, in the middle of a tensor") as refusal:
        run.read(0, torch.empty(8, dtype=torch.bfloat16))
    assert str(file) in str(refusal.value)

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(safetensors_files.os, "preadv", failing)
    with pytest.raises(OSError) as failure:
        run.read(0, torch.empty(4, dtype=torch.bfloat16))
    assert (failure.value.errno, failure.value.filename) == (5, str(file))


@pytest.mark.e2e
def test_an_import_that_fails_says_why_and_can_be_tried_again(checkpoint: Path, ssd_dir: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    read = StoredBits.read

    def failing(self: StoredBits, begin: int, out: torch.Tensor) -> None:
        raise OSError(5, "Input/output error", "weights")

    with Session(str(checkpoint), device="cpu", dram="2GiB", ssd=[ssd_dir], tier="ssd") as session:
        monkeypatch.setattr(StoredBits, "read", failing)
        with pytest.raises(OSError, match="weights"):
            session.prepare(1, 16)
        assert not any(thread.name.startswith("ratel-import") for thread in threading.enumerate())
        monkeypatch.setattr(StoredBits, "read", read)
        session.prepare(1, 16)


# --- reading ahead ----------------------------------------------------------------------------------------------------


def finished(reader: readahead.ReadAhead) -> int:
    reader.wait()
    return reader.num_bytes


@pytest.mark.unit
@pytest.mark.parametrize("limit", [10 << 20, 1 << 30])
def test_files_are_read_in_full_or_up_to_the_limit(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "_PIECE_BYTES", 1 << 20)
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(bytes((8 << 20) + 123))
    read = finished(readahead.ReadAhead(paths, limit))
    assert read == (2 * ((8 << 20) + 123) if limit > 16 << 20 else pytest.approx(limit, abs=1 << 20))


@pytest.mark.unit
@pytest.mark.parametrize("content", ["none", "not json", "[]", '{"weight_map": 3}'])
def test_what_is_no_checkpoint_is_left_to_the_import(tmp_path: Path, content: str) -> None:
    if content != "none":
        (tmp_path / "model.safetensors.index.json").write_text(content)
    assert readahead.weight_files(str(tmp_path)) == [] == readahead.weight_files("llama-3b")


@pytest.mark.unit
def test_a_file_that_is_missing_ends_the_reading_quietly(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert finished(readahead.ReadAhead(readahead.weight_files(str(tmp_path)), 1 << 30)) == 0


@pytest.mark.unit
def test_the_index_says_which_files_and_one_reading_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "_current", None)
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(bytes(1000))
    index = {"weight_map": {"x": "model-2.safetensors", "y": "model-1.safetensors", "z": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    paths = readahead.weight_files(str(tmp_path))
    assert [path.name for path in paths] == ["model-1.safetensors", "model-2.safetensors"]
    assert readahead.begin(paths, 1 << 30) and finished(readahead._current) == 2000
    assert not readahead.begin(paths, 1 << 30)


# --- the time line ----------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_seconds_count_from_the_beginning_of_the_process() -> None:
    import psutil

    begun_s = psutil.Process().create_time()  # to a second
    before_s, age_s, after_s = time.time(), phases.age_s(), time.time()
    assert before_s - 1.5 <= begun_s + age_s <= after_s + 1.5
    before_s = phases.age_s()
    with phases.phase("a test"):
        time.sleep(0.05)
    last, rounding_s = phases.phases()[-1], 0.001
    assert last["name"] == "a test" and last["end_s"] - last["begin_s"] > 0.03
    assert before_s - rounding_s <= last["begin_s"] and last["end_s"] <= phases.age_s() + rounding_s


@pytest.mark.e2e
def test_a_run_says_what_its_start_went_to(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "_current", None)
    (tmp_path / "text.txt").write_text("One and two are three. " * 200)
    arguments = ["--data", tmp_path / "text.txt", "--steps", 2, "--batch-size", 2, "--seq-len", 16, "--dram", "2GiB",
                 "--eval-fraction", 0, "--device", "cpu", "--no-export", "--quiet", "--out", tmp_path / "out"]
    assert cli.main(["train", "--model", str(checkpoint), *map(str, arguments)]) == 0
    phases = {phase["name"]: phase for phase in json.loads((tmp_path / "out" / "startup.json").read_text())["phases"]}
    order = ["imports", "transformers", "model in outline", "trial of blocks and plan", "importing states", "first step"]
    begins = [phases[name]["begin_s"] for name in order]
    assert begins == sorted(begins) and all(phase["begin_s"] <= phase["end_s"] for phase in phases.values())
    reading = phases["reading ahead"]
    assert reading["bytes"] == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert reading["begin_s"] <= phases["imports"]["begin_s"]


@pytest.mark.unit
@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_looked_for_during_imports(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(train_command.gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with train_command._nothing_collected():
        assert gc.isenabled()  # this process has more to do
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ImportError) if fails else nullcontext(), train_command._nothing_collected():
        assert not gc.isenabled()
        if fails:
            raise ImportError
    assert gc.isenabled() and frozen == [False]


@pytest.mark.unit
def test_a_package_that_is_passed_over_can_be_imported_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with train_command._passed_over("colorsys", "json", "no such package"):
        assert find_spec("colorsys") is None and sys.modules["json"] is json  # what is imported already stays
        with pytest.raises(ImportError):
            import colorsys
    import colorsys  # noqa: F811

    assert colorsys.rgb_to_hsv(0, 0, 1) and "no such package" not in sys.modules


@pytest.mark.e2e
def test_a_command_does_not_import_what_transformers_could_use_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    """Here they would even end it, as one that was built for another PyTorch does."""
    for name in ("sklearn", "scipy", "torchvision"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')")
    path = os.pathsep.join([str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ratel", "train", "--model", checkpoint, "--steps", "1", "--batch-size", "1", "--seq-len",
               "16", "--dram", "2GiB", "--eval-fraction", "0", "--device", "cpu", "--no-export", "--quiet", "--out", tmp_path / "out"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=patience(120))
    assert ended.returncode == 0, ended.stderr


@pytest.mark.e2e
def test_a_run_that_is_ended_before_its_first_step_takes_its_files_with_it(checkpoint: Path, ssd_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ratel", "train", "--model", checkpoint, "--batch-size", "256", "--seq-len", "64", "--tier", "ssd",
               "--ssd", ssd_dir, "--eval-fraction", "0", "--device", "cpu", "--quiet", "--out", tmp_path / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        wait_until(lambda: any(path.stat().st_size for path in ssd_dir.iterdir()) or running.poll() is not None, 120)
        assert running.poll() is None, running.stderr.read()
        assert list(ssd_dir.iterdir()) and not (tmp_path / "out" / "metrics.jsonl").exists()
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=patience(120))
    assert running.returncode == 130 and "interrupted" in said and "Traceback" not in said, said
    assert list(ssd_dir.iterdir()) == []
