"""What a process may not have, and numbers that are no run's: one line, before anything starts or
at the end of what began."""

import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ratel import cli, native
from ratel.config import TrainConfig
from ratel.errors import RatelError, out_of, remedy_for
from ratel.runtime.session.session import Session
from tests.support.patience import patience
from tests.support.resume import make_model, make_text

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]
HUGE = 10**18


@pytest.mark.parametrize("option", ["optimizer_threads", "batch_size", "micro_batch", "steps", "seq_len", "warmup_steps", "keep",
                                    "save_every", "eval_every", "eval_sequences", "log_every"])
def test_numbers_have_limits(option: str) -> None:
    with pytest.raises(RatelError, match=f"--{option.replace('_', '-')}: must be at most [0-9,]+ .given: {HUGE}.") as caught:
        TrainConfig(**{option: HUGE})
    assert "\n" not in str(caught.value)


def test_a_seed_has_128_bits_and_a_rate_is_a_number_of_fp32() -> None:
    assert TrainConfig(seed=2**128 - 1).seed == 2**128 - 1
    for options in ({"seed": 2**128}, {"lr": 1e39}, {"weight_decay": 1e300}):
        with pytest.raises(RatelError, match="must be at most"):
            TrainConfig(**options)


def test_a_step_of_more_tokens_than_any_memory_holds() -> None:
    with pytest.raises(RatelError, match="--batch-size: with --seq-len 1000000 makes steps of more than"):
        TrainConfig(batch_size=100_000_000, seq_len=1_000_000)


@pytest.mark.parametrize("option", ["model", "data", "out", "ssd", "tokenizer", "eval_data", "trace"])
def test_names_that_are_not_utf8_are_refused_before_anything_starts(option: str, tmp_path: Path) -> None:
    """transformers writes tokenizers with a library that cannot open them: a run would fail at its
    end."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/n\xff")
    with pytest.raises(RatelError, match=r"has a name that is not UTF-8 .given: .*/n\\xff.*Rename it"):
        TrainConfig(**{option: name})


def test_a_link_with_another_name_does_not_help_an_ssd_directory(tmp_path: Path) -> None:
    there = os.fsencode(tmp_path) + b"/n\xff"
    os.mkdir(there)
    os.symlink(there, tmp_path / "link")
    for make in (lambda: TrainConfig(ssd=str(tmp_path / "link")), lambda: Session("demo", ssd=tmp_path / "link", device="cpu")):
        with pytest.raises(RatelError, match="ssd: has a name that is not UTF-8"):
            make()


@pytest.mark.parametrize(("error", "words"), [
    (MemoryError(), "no more memory"),
    (ImportError("libx.so: failed to map segment from shared object"), "no more memory"),
    (RuntimeError("can't start new thread"), "ulimit -u"),
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    (ImportError("a page\n" * 500 + "failed to map segment"), "no more memory"),
])
def test_what_the_system_refuses_is_one_line(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> None:
        raise error

    monkeypatch.setattr(cli.train, "run", run)
    assert cli.main(["train", "--model", "demo"]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and len(said) < 500
    assert out_of(ValueError("another")) is None


def test_against_a_limit_on_files_room_is_no_remedy() -> None:
    assert "ulimit -f" in remedy_for(OSError(errno.EFBIG, ""), "Make room")
    assert remedy_for(OSError(errno.ENOSPC, ""), "Make room") == "Make room"


def test_a_file_larger_than_allowed(ssd_dir: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with native.nvme_ds.Engine() as engine, pytest.raises(OSError, match="ulimit -f") as caught:
            engine.create_volume([ssd_dir], "v", 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Free some space" not in str(caught.value) and not list(ssd_dir.iterdir())


def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ssd_dir: Path) -> None:
    """Neither a native thread of the optimizer nor one of Python's, wherever it fails to start,
    leaves anything behind."""
    import torch

    model, batch = make_model(tmp_path / "model"), {"input_ids": torch.zeros(2, 16, dtype=torch.long)}

    def refuse(*unused: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    with Session(model, device="cpu", ssd=ssd_dir, tier="ssd", micro_batch=2) as session:
        with monkeypatch.context() as patch:
            patch.setattr(native.op_ds, "Pool", refuse)
            with pytest.raises(RatelError, match="optimizer_threads: the system starts no .* threads"):
                session.step(batch)
        real, started = threading.Thread.start, []
        for allowed in range(6):
            def start(thread: threading.Thread) -> None:
                if len(started) >= allowed:
                    raise RuntimeError("can't start new thread")
                started.append(thread)
                real(thread)

            started.clear()
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    session.step(batch)
            assert not list(ssd_dir.iterdir()) and not any(thread.is_alive() for thread in started)
        session.step(batch)


LIMITED = """
import resource, sys
{limit}
sys.argv[1:] = {words!r}
from ratel.__main__ import main
sys.exit(main())
"""


@pytest.mark.e2e
@pytest.mark.parametrize(("limit", "words"), [
    ("resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))", "Raise the limit on the size of a file"),
    ("resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))", "no more memory"),
], ids=["files", "memory"])
def test_a_run_within_a_limit_that_is_too_small(limit: str, words: str, tmp_path: Path) -> None:
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    command = ["train", "--model", str(model), "--data", str(text), "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "1",
               "--batch-size", "2", "--seq-len", "16", "--dram", "2GiB", "--eval-fraction", "0", "--quiet"]
    done = subprocess.run([sys.executable, "-c", LIMITED.format(limit=limit, words=command)], cwd=ROOT, capture_output=True, text=True,
                          timeout=patience(120))
    assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr, done.stderr
