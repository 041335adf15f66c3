"""When a disk or a thread fails: the error surfaces at the next call with its place, nothing hangs, nothing is left.

Also tested: errors of the engine itself in nvme_ds/test_faults.py; of the data thread in data/test_dataset.py; what the
command prints and returns in test_cli.py; Ctrl-C that completes the step, and twice, in test_train_e2e.py.
"""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ratel.errors import RatelError, WorkerError
from ratel.memory.retire import Retirer
from ratel.runtime.session.session import Session
from tests.support.commands import start
from tests.support.families import batches, build, llama, loss_fn_of
from tests.support.patience import patience, wait_until, within
from tests.support.sessions import SMALL

pytestmark = pytest.mark.numerics

class Subject:
    """A session on a model of the user's, and what must hold when it has failed."""

    def __init__(self, directory: Path, family: str = "llama", **options: object) -> None:
        self.directory, self.family, self.model = directory, family, build(family)
        self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.threads = set(threading.enumerate())
        defaults = dict(ssd=[directory], device="cpu", lr=1e-3, loss_fn=loss_fn_of(family), micro_batch=2)
        self.session = Session(self.model, **{**defaults, **options})

    def train(self, steps: int = 1) -> None:
        for batch in batches(self.family, steps):
            self.session.step(batch)

    @property
    def engine(self):
        return self.session._machinery.engine

    def fail_in_flight(self, steps: int = 3) -> WorkerError:
        """Steps, then a flush, until one of them reports the failure."""
        with within(), pytest.raises(WorkerError) as caught:
            self.train(steps)
            self.session.flush()
        return caught.value

    def check_refuses(self) -> None:
        """Every further call says that the session is over, and why."""
        with within():
            for call in (self.train, self.session.flush, lambda: self.session.evaluate(batches(self.family, 1)),
                         self.session.state_dict):
                with pytest.raises((RatelError, WorkerError), match="the session ended with an earlier error"):
                    call()

    def close(self) -> None:
        with within(5.0):
            self.session.close()

    def check_clean(self) -> None:
        left = set(threading.enumerate()) - self.threads
        assert not left, f"threads are left: {left}"
        assert os.listdir(self.directory) == [], "files are left"

    def check_model_as_given(self) -> None:
        now = self.model.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in self.weights.items())
        assert all(p.grad is None and p.requires_grad for p in self.model.parameters())
        with torch.no_grad():
            assert torch.isfinite(self.model(batches(self.family, 1)[0]["input_ids"]).logits).all()

    def check_ended(self) -> None:
        self.check_refuses()
        self.close()
        self.check_clean()
        self.check_model_as_given()


# What is on SSD, and which transfers of it fail. Two steps earlier everything was well.
TRAFFIC = {
    "weights are read": (dict(placement={"*": {"hi": "ssd"}}), "read", 3),
    "weights are written back": (dict(placement={"*": {"hi": "ssd"}}), "write", 2),
    "weights are read, fp32": (dict(placement={"*": {"hi": "ssd", "lo": "ssd"}}, dtype="fp32"), "read", 5),
    "moments are read": (dict(placement={"*": {"m": "ssd", "v": "ssd"}}), "read", 3),
    "moments are written back": (dict(placement={"*": {"m": "ssd", "v": "ssd"}}), "write", 3),
    "checkpoints are written": (dict(tier="dram", checkpoint_tier="ssd"), "write", 2),
    "checkpoints are read": (dict(tier="dram", checkpoint_tier="ssd"), "read", 2),
    "gradients are written": (dict(placement={"*": {"g": "ssd"}}), "write", 2),
    "gradients are read": (dict(placement={"*": {"g": "ssd"}}), "read", 2),
    "everything, one of each buffer": (dict(tier="ssd", checkpoint_tier="ssd", buffers=SMALL), "any", 40),
    "eager: weights are read": (dict(tier="ssd", optimizer="eager", max_grad_norm=0), "read", 1),
    "eager: states are written": (dict(tier="ssd", optimizer="eager", max_grad_norm=0, buffers=SMALL), "write", 7),
}


@pytest.mark.parametrize("what", TRAFFIC)
def test_an_io_error_ends_the_session_with_its_place(what: str, ssd_dir: Path) -> None:
    options, op, after = TRAFFIC[what]
    subject = Subject(ssd_dir, **options)
    subject.train()
    code = errno.EIO if op == "read" else errno.ENOSPC
    paths = [os.path.realpath(path) for path in ssd_dir.iterdir()]
    subject.engine.inject(fail_op=op, fail_after_n=after, errno=code)
    error = subject.fail_in_flight()
    cause = error.__cause__
    assert isinstance(cause, OSError) and cause.errno == code
    assert cause.filename in paths and cause.offset % 4096 == 0
    assert all(part in str(error) for part in (cause.filename, f"at offset {cause.offset}", os.strerror(code)))
    assert "what it has trained is lost" in str(error) and "the weights it came with" in str(error)
    subject.check_ended()


def test_failures_one_after_another_at_every_request(ssd_dir: Path) -> None:
    """Wherever in a step the device dies, for good, the session ends; EIO from the n-th request on."""
    for after in range(0, 90, 9):
        subject = Subject(ssd_dir, tier="ssd", checkpoint_tier="ssd", optimizer="eager" if after % 2 else "deferred",
                          max_grad_norm=0)
        subject.train()
        subject.engine.inject(fail_op="any", fail_after_n=after, fail_count=1 << 30, errno=errno.EIO, max_delay_us=300)
        assert subject.fail_in_flight().__cause__.errno == errno.EIO, after
        subject.close()
        subject.check_clean()
        subject.check_model_as_given()


def test_short_transfers_are_continued(ssd_dir: Path) -> None:
    (ssd_dir / "a").mkdir(), (ssd_dir / "b").mkdir()
    results = []
    for name, faults in (("a", {}), ("b", dict(short_transfers=True, max_delay_us=300, seed=1))):
        subject = Subject(ssd_dir / name, tier="ssd", checkpoint_tier="ssd")
        subject.session.prepare(4, 16)
        subject.engine.inject(**faults)
        with within():
            subject.train(2)
        results.append(subject.session.state_dict())
        subject.close()
        subject.check_clean()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_failure_that_no_call_has_reported_is_reported_by_close(ssd_dir: Path) -> None:
    """Updates run on after step() has returned. A model that silently kept its old weights would pass for trained."""
    subject = Subject(ssd_dir, placement={"*": {"m": "ssd"}})
    subject.train()
    subject.session.flush()
    subject.engine.inject(fail_op="write", fail_after_n=1, errno=errno.ENOSPC)
    subject.train()
    exchange = subject.session._core.exchange
    wait_until(lambda: exchange.failed)
    with within(), pytest.raises(WorkerError, match="No space left"):
        subject.session.close()
    subject.session.close()
    subject.check_clean()
    subject.check_model_as_given()


def test_a_failure_during_close_is_reported(ssd_dir: Path) -> None:
    subject = Subject(ssd_dir, tier="ssd")
    subject.train()
    subject.engine.inject(fail_op="write", fail_after_n=1, errno=errno.EIO, max_delay_us=20000)
    with within(), pytest.raises(WorkerError, match="Input/output error"):
        subject.train()
        subject.session.close()
    subject.session.close()
    subject.check_clean()
    subject.check_model_as_given()


def test_an_import_that_fails_leaves_the_model_and_the_directory(ssd_dir: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from nvme_ds import Engine

    real = Engine.create_volume

    def failing_device(engine: Engine, *args: object, **kwargs: object):
        engine.inject(fail_op="write", fail_after_n=5, errno=errno.EIO)
        return real(engine, *args, **kwargs)

    subject = Subject(ssd_dir, tier="ssd")
    with monkeypatch.context() as patch, within(), pytest.raises(OSError, match="write of .* at offset") as caught:
        patch.setattr(Engine, "create_volume", failing_device)
        subject.train()
    assert caught.value.errno == errno.EIO
    subject.check_clean()
    subject.train()  # the device is well again: nothing of the attempt stands in the way
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "create_volume", failing_device)
        other = Subject(ssd_dir / "other", tier="ssd")
        with within(), pytest.raises(OSError):
            other.train()
        other.close()
        other.check_model_as_given()
    subject.close()
    (ssd_dir / "other").rmdir()
    subject.check_clean()


def test_trained_weights_that_cannot_be_read_back_are_reported(ssd_dir: Path) -> None:
    subject = Subject(ssd_dir, tier="ssd")
    subject.train()
    subject.session.flush()
    subject.engine.inject(fail_op="read", fail_after_n=4, errno=errno.EIO)
    with within(), pytest.raises(WorkerError, match="only a part of its trained weights.*Input/output error"):
        subject.session.close()
    subject.check_clean()


def failing(number: int, real: Callable) -> Callable:
    calls = []

    def call(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) == number:
            raise RuntimeError("broken for a test")
        return real(*args, **kwargs)

    return call


def break_optimizer(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = subject.session._machinery.pool
    monkeypatch.setattr(pool, "adamw", failing(3, pool.adamw))


def break_uploader(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = subject.session._machinery.weights
    monkeypatch.setattr(weights, "fill", failing(3, weights.fill))


def break_reader(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = subject.session._machinery.weights
    monkeypatch.setattr(weights, "open", failing(3, weights.open))


def break_loader(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = subject.session._machinery.updates.loader
    monkeypatch.setattr(loader, "_start_chunk", failing(3, loader._start_chunk))


def break_retirer(name: str) -> Callable[[Subject, pytest.MonkeyPatch], None]:
    def act(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        retirer: Retirer = getattr(subject.session._machinery, name)
        real = retirer.when
        monkeypatch.setattr(retirer, "when", lambda wait, after: real(wait, failing(1, after)))

    return act


THREADS = {"updater": break_optimizer, "uploader": break_uploader, "reader": break_reader, "loader": break_loader,
           "writes": break_retirer("writes"), "copies": break_retirer("copies")}


@pytest.mark.parametrize("mode", ["deferred", "eager"])
@pytest.mark.parametrize("thread", THREADS)
def test_an_error_in_a_thread_ends_the_session(thread: str, mode: str, ssd_dir: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(ssd_dir, tier="ssd", checkpoint_tier="dram", optimizer=mode, max_grad_norm=0, buffers=SMALL)
    subject.train()
    THREADS[thread](subject, monkeypatch)
    error = subject.fail_in_flight()
    assert f"the {thread} thread failed: broken for a test" in str(error)
    assert isinstance(error.__cause__, RuntimeError)
    subject.check_ended()


def test_an_error_of_the_users_own_loss_ends_the_session_too(ssd_dir: Path) -> None:
    def loss_fn(model: nn.Module, batch: dict) -> torch.Tensor:
        if batch["x"].isnan().any():
            raise ZeroDivisionError("mine")
        return model(batch["x"]).square().mean()

    subject = Subject(ssd_dir, "patches", loss_fn=loss_fn, tier="ssd")
    subject.train()
    with within(), pytest.raises(ZeroDivisionError, match="mine"):
        subject.session.step({"x": torch.full((4, 16, 12), torch.nan), "y": torch.zeros(4, 2)})
    subject.check_refuses()
    subject.close()
    subject.check_clean()
    now = subject.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in subject.weights.items())
    assert torch.isfinite(subject.model(torch.zeros(1, 16, 12))).all()


def moved_bytes(engine: Any) -> int:
    totals = engine.stats()
    return totals["bytes_read"] + totals["bytes_written"]


def test_ctrl_c_in_a_slow_step_ends_promptly(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python a KeyboardInterrupt ends the step where it is; here the disk would take a minute for it."""
    subject = Subject(ssd_dir, tier="ssd", ssd_bandwidth=400e3)
    with within(30):
        subject.session.prepare(4, 16)
    weights, ended = subject.session._machinery.weights, threading.Event()
    gather, gathers = weights.open, count()

    def noting(*arguments: object) -> object:
        if next(gathers) == 2:  # the main thread needs this one to go on with its step
            os.kill(os.getpid(), signal.SIGINT)
            ended.wait(patience(60))
        return gather(*arguments)

    monkeypatch.setattr(weights, "open", noting)
    imported_bytes = moved_bytes(subject.engine)
    with within(), pytest.raises(KeyboardInterrupt):
        subject.train(200)
    ended.set()
    subject.check_refuses()
    assert moved_bytes(subject.engine) - imported_bytes < 26 * subject.session.plan.spec.num_params / 2, "it went on"
    subject.close()
    subject.check_clean()
    subject.check_model_as_given()


SLOW = {"imports": ("20kB/s", 8), "steps": ("1.5MB/s", 25)}
"""Rates at which the import of the weights takes half a minute, and a step a second; seconds that the end may take: one
that has begun is completed, flushed and exported."""


@pytest.mark.e2e
@pytest.mark.parametrize("what", SLOW)
def test_ctrl_c_ends_the_command_whatever_it_waits_for(what: str, ssd_dir: Path, tmp_path: Path) -> None:
    rate, limit_s = SLOW[what]
    llama(vocab_size=272).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A line of text to be learned.\n\n" * 200)
    process = start("train", "--model", tmp_path / "model", "--data", tmp_path / "text.txt", "--ssd", ssd_dir, "--tier", "ssd",
                    "--ssd-bandwidth", rate, "--batch-size", "2", "--seq-len", "32", "--steps", "100000", "--device", "cpu",
                    "--eval-fraction", "0", "--out", tmp_path / "out")
    metrics = tmp_path / "out" / "metrics.jsonl"
    try:
        def has_begun() -> bool:
            assert process.poll() is None, process.communicate()
            return bool(os.listdir(ssd_dir) if what == "imports" else metrics.exists() and metrics.stat().st_size)

        wait_until(has_begun, 60)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=patience(limit_s))
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err, err
    assert os.listdir(ssd_dir) == [] and (tmp_path / "out" / "model").exists() == (what == "steps")
