"""Runs a command on a machine that seems to have less memory: ``python -m
benchmarks.size.limit_dram 64GiB -- COMMAND ...``

Three ways, chosen by name and never by themselves:

- ``huge-pages`` (the default; root): reserves huge pages until only that much is available. What is
  reserved is gone for everybody, the page cache included, as if the modules had been pulled out.
  Taken from each NUMA node in proportion to what it has free.
- ``cgroup`` (root, or a writable cgroup): the command's own control group may hold that much, page
  cache included; the rest of the machine stays as it is.
- ``mlock``: a process holds the rest in locked memory. Needs ``ulimit -l``, and no root.

A watcher process undoes it all when the command is over, and also when this program is killed: it
waits for the end of a pipe whose other end only this program holds. What is to be undone stands in
a state file too. If the watcher is killed as well, ``--restore`` does its work. The command's exit
status is passed on.
"""

import argparse
import ctypes
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.machine_memory import Cgroup, Machine, remove_group, reserve_pages
from benchmarks.harness.report import script_command, script_path
from ratel.errors import RatelError
from ratel.units import MIB, format_bytes, parse_bytes

METHODS = ("huge-pages", "cgroup", "mlock")
TOLERANCE = 0.01
"""The share of what is to be taken that a busy kernel may keep without the limit counting as
missed."""
_PR_SET_PDEATHSIG = 1
_LOCK_BYTES = 64 * MIB
_SMALLEST_BYTES = 256 * MIB
"""With less left over than this a Linux machine starts killing what it needs itself."""


# --- the watcher ----------------------------------------------------------------------------------------------------


def watch(state_file: Path) -> int:
    """The watcher's work, in a process of its own: hold what is to be held, say so, wait until
    nobody needs it any more, undo."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    state = json.loads(state_file.read_text())
    try:
        Path("/proc/self/oom_score_adj").write_text("-1000")  # else the first that the kernel ends when memory is short
    except OSError:
        pass  # takes root; if it is ended, the caller notices
    held = _lock_memory(state["lock_bytes"])
    print("ready", flush=True)
    sys.stdin.buffer.read()
    undo(state)
    held.clear()
    state_file.unlink()
    return 0


def _lock_memory(num_bytes: int) -> list[mmap.mmap]:
    """Locked anonymous memory, in pieces: an error comes before the machine is full."""
    libc, held = ctypes.CDLL(None, use_errno=True), []
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for begin in range(0, num_bytes, _LOCK_BYTES):
        piece = mmap.mmap(-1, min(_LOCK_BYTES, num_bytes - begin), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if libc.mlock(ctypes.addressof(ctypes.c_char.from_buffer(piece)), len(piece)):
            raise OSError(ctypes.get_errno(), f"after {format_bytes(begin)}: {os.strerror(ctypes.get_errno())}")
        held.append(piece)
    return held


def undo(state: dict[str, Any]) -> None:
    for path, text in state["counts"].items():
        Path(path).write_text(text)
    for path in state["groups"]:
        remove_group(Path(path))


def restore(machine: Machine = Machine()) -> bool:
    """Undo what killed programs and killed watchers left; False if there is nothing. RatelError if
    one is in use."""
    found = machine.state_files()
    in_use = [path for path in found if not _restore_one(path, machine)]
    if in_use:
        raise RatelError("this limit is in force", field="limit_dram", value=in_use[0],
                         remedy="Wait for its command to end, or end it")
    return bool(found)


def _restore_one(path: Path, machine: Machine) -> bool:
    with open(path) as file:
        if not _lock_state(file.fileno()):
            return False
        state = json.loads(file.read() or "{}")
        if state and state["boot_id"] == machine.boot_id():
            undo(state)
        path.unlink()
    return True


def _lock_state(descriptor: int) -> bool:
    """Whether nobody else has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_state(path: Path, state: dict[str, Any]) -> int:
    """The locked file's descriptor. The lock belongs to all who inherit it, and falls when the last
    of them is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise RatelError("an earlier limit is still in force or was not given back", field="limit_dram", value=path,
                         remedy="Run `python -m benchmarks.size.limit_dram --restore`") from error
    _lock_state(descriptor)
    os.write(descriptor, json.dumps(state).encode())
    os.fsync(descriptor)
    return descriptor


# --- the limit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A limit in force. ``taken_bytes``: what the machine has less; 0 for a control group."""

    taken_bytes: int
    group: Cgroup | None
    watcher: subprocess.Popen

    def enter(self, command: list[str]) -> list[str]:
        return command if self.group is None else self.group.enter(command)


@contextmanager
def limit_dram(limit_bytes: int, method: str = "huge-pages", machine: Machine = Machine()) -> Iterator[Limit]:
    """Leave ``limit_bytes`` until the block ends, however it ends. RatelError where the method
    cannot be had."""
    available = machine.available_bytes()
    take_bytes = available - limit_bytes
    if limit_bytes < _SMALLEST_BYTES or take_bytes <= 0:
        raise RatelError(f"must be between {format_bytes(_SMALLEST_BYTES)} and the {format_bytes(available)} that are "
                         "available", field="limit", value=format_bytes(limit_bytes))
    counts = _counts(machine) if method == "huge-pages" else {}
    group = _make_group() if method == "cgroup" else None
    state = {"boot_id": machine.boot_id(), "method": method, "lock_bytes": take_bytes if method == "mlock" else 0,
             "counts": counts, "groups": [str(group.path)] if group else []}
    with _watcher(machine.state_file(method), state) as watcher:
        if method == "huge-pages":
            take_bytes = _take_pages(machine, take_bytes)
        elif group is not None:
            group.limit(limit_bytes)
            take_bytes = 0
        yield Limit(taken_bytes=take_bytes, group=group, watcher=watcher)


def _make_group() -> Cgroup:
    try:
        return Cgroup.create()
    except OSError as error:
        raise RatelError(f"no memory control group can be made here ({error})", field="--method", value="cgroup",
                         remedy="Run as root outside of a container, or choose another method") from error


def _counts(machine: Machine) -> dict[str, str]:
    """What the counters hold, by path; refused before anything is touched where they cannot be
    written."""
    counters = machine.counters()
    closed = [str(path) for path in counters if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        raise RatelError(f"huge pages cannot be reserved here: {closed[0]} is missing or cannot be written",
                         field="--method", value="huge-pages",
                         remedy="Run as root on a writable /sys, or choose --method cgroup or mlock")
    return {str(path): path.read_text().strip() for path in counters}


def _take_pages(machine: Machine, num_bytes: int) -> int:
    taken = reserve_pages(machine, num_bytes)
    if num_bytes - taken > max(TOLERANCE * num_bytes, 2 * machine.page_bytes()):
        raise RatelError(f"the kernel gave {format_bytes(taken)} of {format_bytes(num_bytes)} in huge pages: the "
                         "memory is in use or fragmented", field="--method", value="huge-pages",
                         remedy="End what uses memory, restart the machine, or choose another --method")
    return taken


@contextmanager
def _watcher(state_file: Path, state: dict[str, Any]) -> Iterator[subprocess.Popen]:
    """Started before anything is taken, and the only one that gives back: one path for every
    ending."""
    try:
        descriptor = _write_state(state_file, state)
    except BaseException:
        undo(state)  # nothing but an empty group exists so far
        raise
    watcher = subprocess.Popen([*script_command("size.limit_dram"), "--watch", str(state_file)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               pass_fds=[descriptor], start_new_session=True, env={**os.environ, **script_path()})
    os.close(descriptor)
    try:
        if watcher.stdout.readline() != "ready\n":
            raise RatelError(f"memory cannot be held: {watcher.stderr.read().strip().rpartition(chr(10))[2]}",
                             field="--method", value=state["method"],
                             remedy="Raise the limit of locked memory (ulimit -l), or choose another method")
        yield watcher
    finally:
        watcher.communicate()
        if watcher.returncode and state_file.exists():  # it was ended or failed: do what it would have done
            undo(state)
            state_file.unlink()


def run(command: list[str], limit_bytes: int, method: str, machine: Machine = Machine()) -> int:
    """The command under the limit; its exit status, 128 + n after signal n, and 1 if the limit did
    not last."""
    with limit_dram(limit_bytes, method, machine) as limit:
        print(f"limit_dram: {format_bytes(limit_bytes)} for {command[0]}, {format_bytes(limit.taken_bytes)} taken away "
              f"({method}), {format_bytes(machine.available_bytes())} available", file=sys.stderr)
        with _passing_signals() as passing:
            child = passing.child = subprocess.Popen(limit.enter(command), preexec_fn=_die_with_parent)
            if passing.was_asked:
                child.terminate()
            status = child.wait()
    if limit.watcher.returncode != 0:
        print("limit_dram: the memory came back before the command ended: do not trust its result", file=sys.stderr)
        return 1
    return status if status >= 0 else 128 - status


class _Passing:
    """SIGTERM to the command, if there is one yet."""

    child: subprocess.Popen | None = None
    was_asked = False

    def ask(self, *_: object) -> None:
        self.was_asked = True
        if self.child is not None:
            self.child.terminate()


@contextmanager
def _passing_signals() -> Iterator[_Passing]:
    """Ctrl-C reaches the command by itself, SIGTERM is passed on, and this program waits in both
    cases. Not ignored but handled: a command would inherit that a signal is ignored. From before
    there is a command, whose first word may be what somebody waits for who then ends this
    program."""
    passing = _Passing()
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: passing.ask}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield passing
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """A command that goes on without its limit would measure something else."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, command = (given[:given.index("--")], given[given.index("--") + 1:]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0],
                                     usage="%(prog)s SIZE [--method M] -- COMMAND ... | %(prog)s --restore")
    parser.add_argument("limit", nargs="?", metavar="SIZE", help="what is to remain available, like 64GiB")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help=f"default: {METHODS[0]}")
    parser.add_argument("--restore", action="store_true", help="give back what a killed run has left, and do no more")
    parser.add_argument("--watch", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(own)
    if options.watch:
        return watch(Path(options.watch))
    try:
        if options.restore:
            print("given back" if restore() else "nothing to give back")
            return 0
        if options.limit is None or not command:
            parser.error("a size and, after --, a command are needed")
        return run(command, parse_bytes(options.limit, field="limit"), options.method)
    except RatelError as error:
        print(f"limit_dram: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
