"""Commands as a user starts them, each in a fork of one process that has imported everything. No
tests here.

A new interpreter takes seconds to import PyTorch and transformers, as long as most of what is
tested; that a new interpreter runs the commands, too, is shown by test_cli.py and by one run in
test_train_e2e.py.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.patience import patience
from tests.support.tools import ROOT, environment

PAUSE_S = 0.01


class Command:
    """A command that runs, with the methods of `subprocess.Popen` that the tests need. Its output
    goes to files."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._output = directory, tuple(directory / name for name in ("out", "err"))
        self.pid = int(_when_written(directory / "pid", patience(120)))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (self._directory / "status").exists():
            self.returncode = int((self._directory / "status").read_text())
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self._directory), timeout, *(p.read_bytes() for p in self._output))
            time.sleep(PAUSE_S)
        return self.returncode

    def communicate(self, timeout: float = patience(60)) -> tuple[str, str]:
        self.wait(timeout)
        return self.output, self._output[1].read_text()

    @property
    def output(self) -> str:
        """So far."""
        return self._output[0].read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(*arguments: object, code: str | None = None) -> Command:
    """``ratel ARGUMENTS``, or Python code that finds the arguments in ``sys.argv[1:]``."""
    directory = Path(tempfile.mkdtemp(dir=_directory().name))
    for name in ("out", "err"):  # there from the start for whoever asks early
        (directory / name).touch()
    request = {"directory": os.fspath(directory), "arguments": [*map(str, arguments)], "code": code}
    _server().stdin.write(json.dumps(request) + "\n")
    _server().stdin.flush()
    return Command(directory)


@cache
def _directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="ratel-commands-")


@cache
def _server() -> subprocess.Popen:
    """It ends when its input does, with this process at the latest."""
    server = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
    atexit.register(lambda: (server.stdin.close(), server.wait()))
    return server


def _when_written(path: Path, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline and _server().poll() is None, "the process that commands fork from has ended"
        time.sleep(PAUSE_S)
    return path.read_text()


# --- the process that commands fork from ------------------------------------------------------------------------------


def serve() -> dict[str, Any] | None:
    """Fork for every request. Returns twice or more: the request in each child, None at the end."""
    for line in sys.stdin:
        request = json.loads(line)
        watcher = os.fork()
        if watcher == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child = os.fork()
            if child == 0:
                return request
            directory = Path(request["directory"])
            _write(directory / "pid", child)
            _write(directory / "status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
    return None


def _write(path: Path, number: int) -> None:
    path.with_suffix(".new").write_text(str(number))
    path.with_suffix(".new").rename(path)


def become(request: dict[str, Any]) -> None:
    """What ``python -m ratel`` is, down to its end by `sys.exit`."""
    for number, name in enumerate(("/dev/null", "out", "err")):
        flags = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
        os.dup2(os.open(Path(request["directory"]) / name, flags), number)
    sys.argv = ["ratel", *request["arguments"]]
    if request["code"] is not None:
        exec(request["code"], {"__name__": "__main__"})
        return
    from ratel import cli

    sys.exit(cli.main(sys.argv[1:]))


if __name__ == "__main__":
    from tests.tools.forks import import_everything

    with tempfile.TemporaryDirectory() as path:
        import_everything(Path(path) / "model")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers are nobody's to wait for
    asked = serve()
    if asked is not None:
        become(asked)
