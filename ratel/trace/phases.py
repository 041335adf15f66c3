"""The time line of a start: what the process did until its first step was done, in seconds since it
began.

Phases may overlap: reading ahead goes on beside everything else. They are noted for the whole
process, because what takes time first (the interpreter, imports) belongs to no session.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_KEPT = 64
"""Phases: a process that makes session after session keeps those of the last few."""

_phases: deque[dict[str, Any]] = deque(maxlen=_KEPT)
_silent: set[int] = set()
"""Threads whose phases are not noted: one around them is."""


def age_s() -> float:
    """Seconds since the kernel made this process; to 10 ms, the kernel's own grain."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the name before it may hold anything
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s


def note(name: str, begin_s: float, end_s: float | None = None, **facts: Any) -> None:
    """Record a phase; ``facts`` are numbers that explain it."""
    if threading.get_ident() in _silent:
        return
    phase = {"name": name, "begin_s": round(begin_s, 3), "end_s": round(age_s() if end_s is None else end_s, 3), **facts}
    _phases.append(phase)
    log.info("%.2f to %.2f s: %s", phase["begin_s"], phase["end_s"], name)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Record what the block takes, if it comes to its end; ``cpu_s`` is that of all threads
    meanwhile."""
    begin_s, begin_cpu_s = age_s(), time.process_time()
    yield
    note(name, begin_s, cpu_s=round(time.process_time() - begin_cpu_s, 3))


@contextmanager
def as_one(name: str) -> Iterator[None]:
    """A phase that stands for all that the calling thread would note inside."""
    with phase(name):
        _silent.add(threading.get_ident())
        try:
            yield
        finally:
            _silent.discard(threading.get_ident())


def phases() -> list[dict[str, Any]]:
    """The phases in the order in which they ended: ``name``, ``begin_s``, ``end_s``."""
    return list(_phases)
