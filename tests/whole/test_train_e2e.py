"""Whole runs as a user starts them: the command, Ctrl-C, the examples, and bad input at the front
door."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import ratel
from ratel.errors import RatelError
from tests.support.commands import Command, start
from tests.support.patience import patience, wait_until

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
METRICS = {"step", "loss", "grad_norm", "lr", "tokens", "step_s", "tokens_per_s", "bound_s", "bound_by", "skipped",
           "early_units", "redone_units", "ssd_read_bytes", "ssd_written_bytes"}
SMALL = ["--batch-size", "2", "--seq-len", "32", "--lr", "1e-3", "--device", "cpu", "--dram", "2GiB",
         "--eval-sequences", "2"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=272, max_position_embeddings=64, tie_word_embeddings=False)
    path = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} times two is {2 * n}. " * 8}) + "\n" for n in range(60)))
    return path


def in_a_new_interpreter(*arguments: object) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "ratel", "train", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=patience(90))
    return done.returncode, done.stdout, done.stderr


def finish(process: Command, timeout_s: float = patience(90)) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, out, err


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_its_states_on_ssd(tiny_model: Path, text: Path, tmp_path: Path, ssd_dir: Path) -> None:
    out = tmp_path / "out"
    status, shown, err = in_a_new_interpreter("--model", tiny_model, "--data", text, "--ssd", ssd_dir, "--tier", "ssd",
                                              "--out", out, "--steps", 12, "--eval-every", 6, *SMALL)
    assert status == 0, err
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(1, 13)) and all(METRICS <= set(r) for r in records)
    assert records[-1]["loss"] < records[0]["loss"] and "eval_loss" in records[5] and "eval_loss" in records[11]
    assert all(record["ssd_read_bytes"] > 0 and record["ssd_written_bytes"] > 0 for record in records[1:])
    assert "step 12/12" in shown and "12 steps" in shown and "binds" in shown
    assert {name: json.loads((out / f"{name}.json").read_text()) != {} for name in ("config", "plan", "hardware")}
    assert list(ssd_dir.iterdir()) == [], "files are left under --ssd"


def test_the_result_loads_with_transformers(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = ratel.train(tiny_model, text, out=tmp_path / "out", steps=2, batch_size=2, seq_len=32, lr=1e-2,
                         device="cpu", dtype="bf16", quiet=True, eval_fraction=0)
    model = AutoModelForCausalLM.from_pretrained(result.out / "model")
    before = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.dtype == torch.bfloat16
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(result.out / "model")("two")["input_ids"][-3:] == list(b"two")


def run_until(process: Command, out: Path, steps: int) -> None:
    def has_come_so_far() -> bool:
        assert process.poll() is None, process.communicate()
        return (out / "metrics.jsonl").exists() and len(metrics(out)) >= steps

    wait_until(has_come_so_far, 90)


def test_ctrl_c_completes_the_step_and_writes_the_model(tiny_model: Path, text: Path, tmp_path: Path,
                                                        ssd_dir: Path) -> None:
    out = tmp_path / "out"
    process = start("train", "--model", tiny_model, "--data", text, "--out", out, "--steps", 100000, "--ssd", ssd_dir, "--tier",
                    "ssd", *SMALL)
    run_until(process, out, 2)
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process, patience(30))
    assert status == 130 and "stopped after step" in err and "Traceback" not in err
    steps = len(metrics(out))
    assert f"stopped after step {steps} of 100000" in err
    assert (out / "model" / "config.json").exists() and list(ssd_dir.iterdir()) == []


def test_ctrl_c_twice_ends_at_once(tiny_model: Path, text: Path, tmp_path: Path, ssd_dir: Path) -> None:
    out = tmp_path / "out"
    process = start("train", "--model", tiny_model, "--data", text, "--out", out, "--steps", 100000, "--ssd", ssd_dir, "--tier",
                    "ssd", "--ssd-bandwidth", "100kB/s", *SMALL)  # a step takes seconds
    def has_begun() -> bool:
        assert process.poll() is None, process.communicate()
        return (out / "config.json").exists()

    wait_until(has_begun, 60)
    time.sleep(1.5)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    status, _, err = finish(process, patience(30))
    assert status == 130 and "stopped in step" in err and "Traceback" not in err, err
    assert not (out / "model").exists() and list(ssd_dir.iterdir()) == []


def test_a_file_gives_the_options_and_flags_override_it(tmp_path: Path) -> None:
    status, _, err = finish(start("train", "--config", ROOT / "examples" / "run.toml", "--steps", 2, "--seq-len", 16, "--out",
                                  tmp_path / "out", "--ssd", tmp_path / "ssd", "--eval-sequences", 1, "--no-export"))
    assert status == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["steps"], config["seq_len"], config["batch_size"], config["tier"]) == (2, 16, 4, "ssd")


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_of_a_model_of_ones_own(tmp_path: Path) -> None:
    result = load_example("own_model").main(["--steps", "25", "--out", str(tmp_path / "out")])
    assert result.losses[-1] < 0.5 * result.losses[0] and 25 in result.eval_losses


def test_example_of_a_transformers_model(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = load_example("huggingface").main(["--steps", "3", "--data", str(text), "--out", str(tmp_path / "out")])
    assert result.losses[-1] < result.losses[0] and "Return the" in capsys.readouterr().out


class Lonely(nn.Module):
    """Blocks whose loss can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_loss_that_is_never_finite_ends_with_advice(tmp_path: Path) -> None:
    batches = [{"x": torch.randn(2, 8)}]
    with pytest.raises(RatelError, match="not finite for 10 steps in a row.*Lower --lr"):
        ratel.train(Lonely(), batches, loss_fn=lambda model, batch: model(batch["x"]).sum() * math.nan, steps=50,
                    out=tmp_path / "out", quiet=True, device="cpu", dtype="fp32", batch_size=2)
    assert len(metrics(tmp_path / "out")) == 10 and not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "no-such-model"], "no-such-model"),
    (["--data", "no-such-file.txt"], "no-such-file.txt"),
    (["--ssd", "/proc/ratel", "--tier", "ssd"], "/proc/ratel"),
    (["--seq-len", "128"], "64"),
    (["--dram", "1MiB"], "--dram"),
    (["--tokenizer", "no-such-directory"], "--tokenizer: is not a directory"),
    (["--tokenizer", os.path.dirname(__file__)], "--tokenizer: holds no tokenizer"),
    pytest.param(["--device", "cuda"], "--device: there is no CUDA device",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")),
])
def test_bad_input_is_one_line_and_touches_nothing(tiny_model: Path, text: Path, tmp_path: Path, arguments: list[str],
                                                   message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ratel.cli import main

    out = tmp_path / "out"
    given = ["train", "--model", str(tiny_model), "--data", str(text), "--out", str(out), "--steps", "2", "--quiet",
             *SMALL]
    assert main([*given, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ratel: ") and err.count("\n") == 1 and message in err
    assert not out.exists()


def test_malformed_data_names_the_line(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ratel.cli import main

    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    assert main(["train", "--model", str(tiny_model), "--data", str(tmp_path / "bad.jsonl"), "--out",
                 str(tmp_path / "out"), *SMALL]) == 2
    assert "bad.jsonl" in (err := capsys.readouterr().err) and "line 2" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_found_before_training(tiny_model: Path, text: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    from ratel.cli import main

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        assert main(["train", "--model", str(tiny_model), "--data", str(text), "--ssd", str(small), "--tier", "ssd",
                     "--out", str(tmp_path / "out"), "--quiet", *SMALL]) == 2
        assert "SSD space is short by" in capsys.readouterr().err and not (tmp_path / "out").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)
