"""Ctrl-C and its like at any instant: a run ends in order, or at once, and never hangs."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ratel import interrupt
from ratel.memory.exchange import Exchange
from ratel.memory.jobs import crew, in_thread
from tests.support.patience import patience
from tests.support.resume import make_model, make_text
from tests.support.tools import environment, run_tool

pytestmark = pytest.mark.unit


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_a_handler_counts_and_raises_nothing() -> None:
    with interrupt.watching():
        send(signal.SIGINT)  # and nothing happens on the next line
        reached = True
        with pytest.raises(interrupt.Interrupted):
            interrupt.check()
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_insists_in_a_program_is_not_made_to_wait() -> None:
    with interrupt.watching(), pytest.raises(interrupt.Interrupted):
        send(signal.SIGINT, signal.SIGINT)
        pytest.fail("two requests before anything looks at them: the second one comes through")


def test_a_hangup_is_a_request_unless_it_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupt.watching():
        send(signal.SIGHUP)
        with pytest.raises(interrupt.Interrupted):
            interrupt.check()
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with interrupt.watching():
            send(signal.SIGHUP)
            interrupt.check()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_deferred_signal_is_the_programs_own() -> None:
    """At a check, at the end of the block, or for the second time at once: the handler that was
    there is called."""
    seen: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with interrupt.deferring():
            send(signal.SIGTERM)
            assert seen == []
            interrupt.check()
            assert seen == [signal.SIGTERM]
        with interrupt.deferring():
            send(signal.SIGTERM)
        assert len(seen) == 2
        with pytest.raises(KeyboardInterrupt):
            with interrupt.deferring():
                send(signal.SIGINT)
                ended = True
        assert ended
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("wait", [
    lambda: in_thread("waits", threading.Event().wait, 30).result(),
    lambda: interrupt.wait_for(threading.Event()),
    lambda: wait_in_exchange(),
    lambda: [job.result() for threads in [crew(1, "crew").__enter__()] for job in [threads.submit(threading.Event().wait, 30)]],
], ids=["job", "event", "exchange", "crew"])
def test_every_wait_of_the_main_thread_looks(wait: Callable[[], object]) -> None:
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with interrupt.watching(), pytest.raises(interrupt.Interrupted):
        wait()
    timer.join()


def wait_in_exchange() -> None:
    exchange = Exchange()
    changed = exchange.condition()
    with exchange.lock:
        exchange.wait_for(changed, lambda: False)


def test_user_code_is_interrupted_where_it_is() -> None:
    """It looks at nothing: a generator of batches that blocks would never end."""
    def batches() -> object:
        yield 1
        send(signal.SIGINT)
        pytest.fail("it was not interrupted")

    with interrupt.watching(), pytest.raises(interrupt.Interrupted):
        list(interrupt.each_outside(batches()))


def test_a_child_has_its_own_signals() -> None:
    with interrupt.watching():
        child = os.fork()
        if child == 0:
            try:
                send(signal.SIGINT)
            except KeyboardInterrupt:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        interrupt.check()


def test_a_lock_that_an_exception_has_left_behind_keeps_nobody() -> None:
    exchange = Exchange()
    exchange.lock.acquire()
    exchange.lock.acquire()
    exchange.close()
    assert in_thread("other", lambda: exchange.lock.acquire(timeout=patience(10))).result()


STUCK = """
import ctypes, sys
from ratel import process
process.begin()
mutex = ctypes.create_string_buffer(64)
libc = ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
print("stuck", flush=True)
libc.pthread_mutex_lock(mutex)
"""


def test_a_command_that_is_stuck_in_a_library_leaves() -> None:
    """No handler of Python's runs there; another thread sees the signals."""
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "stuck\n"
        running.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=patience(60))
    assert running.returncode == 130 and said == "ratel: interrupted\n"


@pytest.mark.e2e
def test_a_terminal_that_goes_away_ends_a_run_in_order(tmp_path: Path) -> None:
    """SIGHUP, and every line that is shown from then on fails."""
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    words = [sys.executable, "-m", "ratel", "train", "--model", model, "--data", text, "--out", tmp_path / "out", "--device", "cpu",
             "--steps", "100000", "--batch-size", "2", "--seq-len", "16", "--dram", "2GiB", "--save-every", "100000", "--eval-fraction", "0"]
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, list(map(str, words)), environment())
    metrics, until_s = tmp_path / "out" / "metrics.jsonl", time.monotonic() + patience(120)
    shown = b""
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until_s:
        shown += os.read(terminal, 65536)
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 130, shown
    steps = len(metrics.read_text().splitlines())
    assert steps >= 1 and (tmp_path / "out" / "model" / "config.json").exists()
    assert [path.name for path in (tmp_path / "out" / "state").iterdir()] == [f"step-{steps:08d}"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("form", "every"), [("command", 500), ("library", 250)])
def test_interrupts_at_some_of_all_lines(form: str, every: int, tmp_path: Path) -> None:
    """All of them: `python -m tests.tools.interrupt_run DIRECTORY command` and the same with
    library."""
    done = run_tool("interrupt_run", tmp_path, form, "--every", every, limit_s=590)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # A busy machine waits longer, and has more lines of waiting among those that are counted than
    # it comes to again.
    assert found["tried"] >= 10 and found["came"] >= 5 and found["with_problems"] == 0, found
