"""Runs a command as its own group of processes: with a time limit, and with the DRAM that the
machine gave up meanwhile."""

import os
import signal
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.harness.machine_memory import meminfo
from benchmarks.harness.report import ROOT, script_path

LOOK_EVERY_S = 0.1
LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Ended:
    """``dram_peak_bytes``: the most memory in use (total less available, so pinned memory and RAM
    disks count, clean page cache does not) beyond what was in use before. ``exit_status`` is None
    where the time limit ended it."""

    exit_status: int | None
    seconds: float
    dram_peak_bytes: int
    last_lines: str

    @property
    def problem(self) -> str | None:
        if self.exit_status == 0:
            return None
        why = f"stopped after {self.seconds:.0f} s" if self.exit_status is None else f"exit status {self.exit_status}"
        return f"{why}: {self.last_lines}"


def run_watched(command: list[str], limit_s: float, env: dict[str, str] | None = None) -> Ended:
    """``env`` is added to this process's, and the path to this repository's packages. Output goes
    to a file, so that no full pipe stops the command."""
    watch = _Watch()
    with tempfile.TemporaryFile() as output:
        begun = perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                 env={**os.environ, **script_path(), **(env or {})})
        try:
            status: int | None = child.wait(max(limit_s, 0.0))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            stop_group(child)
        seconds, peak = perf_counter() - begun, watch.stop()
        output.seek(0)
        # Where the repository lies on this machine is of no interest to who reads a result.
        lines = output.read().decode(errors="replace").replace(f"{ROOT}{os.sep}", "").strip().splitlines()
    return Ended(exit_status=status, seconds=seconds, dram_peak_bytes=peak, last_lines="\n".join(lines[-LAST_LINES:]))


def stop_group(child: subprocess.Popen) -> None:
    """End the child and also what it has left behind, which would hold the GPU's memory for whoever
    comes next."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


class _Watch:
    def __init__(self) -> None:
        self._before = self._peak = _used_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self._peak = max(self._peak, _used_bytes())

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._peak - self._before


def _used_bytes() -> int:
    facts = meminfo(Path("/proc/meminfo"))
    return facts["MemTotal"] - facts["MemAvailable"]
