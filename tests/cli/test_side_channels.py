"""What a command shows, to whoever does not take it: closed pipes, full disks, stopped readers. The
run goes on."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ratel import interrupt, process
from ratel.monitor.progress import ProgressDisplay
from ratel.monitor.side_channel import SideChannel
from ratel.process import Channel
from tests.support.patience import patience
from tests.support.resume import make_model, make_text

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 65536)
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


def test_a_pipe_without_a_reader(pipe: tuple[int, int]) -> None:
    channel = Channel(pipe[1])
    os.close(pipe[0])
    assert channel.write(b"a line\n") == 7 and isinstance(channel.error, BrokenPipeError)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk() -> None:
    with open("/dev/full", "wb") as full:
        channel = Channel(full.fileno())
        assert channel.write(b"a line\n") == 7 and channel.error.errno == errno.ENOSPC


@pytest.mark.parametrize("blocks", [True, False])
def test_progress_does_not_wait_for_a_reader_who_has_stopped(pipe: tuple[int, int], blocks: bool,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SHOWN_S", 0.01)
    os.set_blocking(pipe[1], blocks)
    channel = Channel(pipe[1])
    channel.may_drop = True
    for _ in range(1000):
        assert channel.write(b"x" * 100) == 100
    assert channel.is_dropping
    taken = os.read(pipe[0], 1 << 20)
    assert 60_000 <= len(taken) <= 65536  # a pipe is ready as long as one of its pages is free
    channel.write(b"again\n")
    assert os.read(pipe[0], 65536) == b"again\n" and not channel.is_dropping


@pytest.mark.parametrize("blocks", [True, False])
def test_a_result_waits_for_its_reader(pipe: tuple[int, int], blocks: bool) -> None:
    """A reader who takes his time has it all; one that shares the pipe may have made it not to
    block."""
    os.set_blocking(pipe[1], blocks)
    channel, data, taken = Channel(pipe[1]), os.urandom(50_000), []

    def read() -> None:
        while sum(map(len, taken)) < len(data):
            time.sleep(0.001)
            taken.append(os.read(pipe[0], 3000))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert channel.write(data) == len(data)
    reader.join(patience(30))
    assert b"".join(taken) == data and channel.error is None


def test_a_result_that_nobody_reads_can_be_interrupted(pipe: tuple[int, int]) -> None:
    channel = Channel(pipe[1])
    with interrupt.watching():
        timer = threading.Timer(0.2, os.kill, (os.getpid(), 2))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            channel.write(bytes(100_000))
        timer.join()


class Broken:
    encoding = "ascii"

    def __init__(self, error: type[Exception] | None) -> None:
        self.error, self.text = error, ""

    def write(self, text: str) -> int:
        text.encode(self.encoding)
        if self.error:
            raise self.error("broken")
        self.text += text
        return len(text)

    flush = isatty = lambda self: self.write("")


@pytest.mark.parametrize("stream", [None, Broken(OSError), Broken(ValueError), Broken(BlockingIOError)])
def test_progress_of_a_library_is_dropped_too(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    with ProgressDisplay(3, log_every=1) as display:
        display.start()
        display.note("a note")


def test_what_an_encoding_lacks_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Broken(None)
    monkeypatch.setattr(sys, "stdout", stream)
    with ProgressDisplay(3) as display:
        display.note("tokens of caf\xe9 in /data/\udcff")
    assert "caf\\xe9 in /data/\\udcff" in stream.text


def test_the_side_channel_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    Console(file=SideChannel()).print("seen")
    assert capsys.readouterr().out == "seen\n"


def run_in_shell(command: str, timeout_s: float = patience(120)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command.replace("RATEL", f"{sys.executable} -m ratel")], cwd=ROOT, capture_output=True,
                          text=True, timeout=timeout_s)


def test_a_product_that_cannot_be_written_is_a_failure() -> None:
    done = run_in_shell("RATEL --help > /dev/full; echo $?; RATEL --help | true; echo ${PIPESTATUS[0]}; RATEL --help >&-; echo $?")
    assert done.stdout.split() == ["1", "0", "0"]
    assert done.stderr == "ratel: standard output cannot be written: No space left on device\n"


@pytest.mark.e2e
def test_a_run_whose_output_goes_nowhere_ends_well(tmp_path: Path) -> None:
    """All at once: standard input and error closed, output a small pipe of which nobody takes more
    than a line, not blocking."""
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    command = f"""exec {sys.executable} -m ratel train --model {model} --data {text} --out {tmp_path}/out --device cpu --dtype fp32
        --steps 60 --batch-size 2 --seq-len 16 --dram 2GiB --log-every 1 --save-every 30 --eval-fraction 0 <&- 2>&-"""
    running = subprocess.Popen(["bash", "-c", command.replace("\n", " ")], cwd=ROOT, stdout=writer)
    try:
        os.close(writer)
        assert os.read(reader, 10)
        assert running.wait(patience(120)) == 0
    finally:
        running.kill()
        os.close(reader)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 60
    assert (tmp_path / "out" / "model" / "model.safetensors").exists() and (tmp_path / "out" / "state").exists()
