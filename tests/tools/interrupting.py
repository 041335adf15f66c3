"""A signal, or the exception of one, at a given line of a small run; and what must be so
afterwards.

Each try is a fork of a process that has imported everything. A tracing function counts how often
the main thread comes to each line of our own files, and acts at one of these moments.
"""

import ast
import faulthandler
import gc
import json
import os
import shutil
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ratel import process
from tests.tools.forks import Ended, Site, Tell, in_fork, newest_step
from tests.support.patience import patience
from tests.support.resume import OPTIONS, assert_same_run

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(f"{ROOT / name}{os.sep}" for name in ("ratel", "nvme_ds", "op_ds"))
PATIENCE_S = 120.0
STEPS = 3
MEASURED = 3
"""Runs that nobody interrupts."""
COMMAND, LIBRARY = "command", "library"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The ``hit``-th time (from 1) that the main thread comes to a line: the first one, or the
    last."""

    file: str
    line: int
    hit: int

    def __str__(self) -> str:
        return f"{os.path.relpath(self.file, ROOT)}:{self.line}#{self.hit}"

    @property
    def name(self) -> str:
        """The same where a run comes to the line more or less often."""
        return f"{os.path.relpath(self.file, ROOT)}:{self.line} {'first' if self.hit == 1 else 'last'}"

    @property
    def may_skip_an_exit(self) -> bool:
        """Whether what a tracing function raises there may come before ``__exit__`` is called,
        where no exception of a signal does: modes of PyTorch stay on in this process."""
        return self.hit > 1 and self.line in _heads(self.file)

    @property
    def place(self) -> int:
        """In an order in which any beginning is a sample of all files."""
        return zlib.crc32(self.name.encode())


@cache
def _heads(file: str) -> frozenset[int]:
    """The lines of `with` up to its block. Python comes to them once more when it leaves the
    block."""
    tree = ast.parse(Path(file).read_text())
    return frozenset(line for node in ast.walk(tree) if isinstance(node, ast.With) for line in range(node.lineno, node.body[0].lineno))


class Tracer:
    """Counts lines, and acts at a moment, once. Where there is one, only its line is counted, which
    takes half the time."""

    def __init__(self, at: Moment | None = None, act: Callable[[], None] = lambda: None) -> None:
        self.at, self._act = at, act
        self.hits: dict[tuple[str, int], int] = {}
        self._known: dict[int, tuple[Any, bool]] = {}
        """Codes by their number (two of different files may be equal), and whether their lines are
        counted."""

    def begin(self) -> None:
        sys.settrace(self._on_call)

    def end(self) -> None:
        sys.settrace(None)

    def run(self, act: Callable[[], object]) -> None:
        self.begin()
        try:
            act()
        finally:
            self.end()

    def _on_call(self, frame: Any, event: str, value: Any) -> Any:
        code = frame.f_code
        if id(code) not in self._known:
            self._known[id(code)] = code, self._is_counted(code)
        return self._on_line if self._known[id(code)][1] else None

    def _is_counted(self, code: Any) -> bool:
        if self.at is None:
            return code.co_filename.startswith(PACKAGES)
        return code.co_filename == self.at.file and self.at.line in {line for *_, line in code.co_lines()}

    def _on_line(self, frame: Any, event: str, value: Any) -> Any:
        if event == "line":
            key = frame.f_code.co_filename, frame.f_lineno
            self.hits[key] = self.hits.get(key, 0) + 1
            if self.at is not None and key == (self.at.file, self.at.line) and self.hits[key] == self.at.hit:
                sys.settrace(None)
                frame.f_trace = None
                self._act()
        return self._on_line


def interrupt() -> None:
    raise KeyboardInterrupt


def moments(hits: dict[tuple[str, int], int]) -> list[Moment]:
    """The first time and the last of every line."""
    found = {Moment(file=file, line=line, hit=hit) for (file, line), count in hits.items() for hit in (1, count)}
    return sorted(found, key=lambda moment: (moment.place, moment.name))


@dataclass(frozen=True, kw_only=True)
class Tried:
    moment: Moment
    came: bool
    """Whether the run came to it: how often a wait looks differs from run to run."""
    problems: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


class Interrupting:
    """Tries of one form: a command and a real signal, or a session in somebody's program and an
    exception."""

    def __init__(self, site: Site, form: str) -> None:
        self._site, self._form = site, form
        self._ssd, self._out = site.folder(form), site.path / f"out-{form}"
        self._whole = site.path / f"whole-{form}"

    def measure(self) -> list[Moment]:
        """The moments of runs that nobody interrupts. Where they come to a line more or less often,
        the last time is the smallest number: other runs come to it too."""
        gc.collect()
        gc.freeze()  # what is there already: collecting it would take a fork longer than the run
        hits: dict[tuple[str, int], int] = {}
        for _ in range(MEASURED):
            for key, count in self._measured().items():
                hits[key] = min(count, hits.get(key, count))
        return moments(hits)

    def _measured(self) -> dict[tuple[str, int], int]:
        self._clear()
        ended = in_fork(lambda tell: self._act(tell, Tracer()), patience_s=PATIENCE_S)
        assert ended.status == 0 and not ended.hung, ended.errors
        shutil.rmtree(self._whole, ignore_errors=True)
        if self._form == COMMAND:
            os.rename(self._out, self._whole)
        return {(file, int(line)): int(count) for _, file, line, count in (words for words in ended.told if words[0] == "hits")}

    def attempt(self, moment: Moment) -> Tried:
        self._clear()
        ended = in_fork(lambda tell: self._act(tell, Tracer(moment, lambda: self._interrupt(tell))), patience_s=PATIENCE_S)
        came = any(words[0] == "came" for words in ended.told)
        problems = [" ".join(words[1:]) for words in ended.told if words[0] == "problem"]
        if ended.hung:
            problems.append("hangs: " + ended.errors[-3000:])
        elif ended.status != 0 and not (came and self._has_left(ended)):
            problems.append(f"status {ended.status}: {ended.errors[-2000:]}")
        elif self._form == COMMAND:
            problems += self._check_restart(ended)
        elif moment.may_skip_an_exit:
            again = in_fork(self._go_on, patience_s=PATIENCE_S)
            problems += [again.errors[-2000:]] if again.status or again.hung else [" ".join(words[1:]) for words in again.told]
        return Tried(moment=moment, came=came, problems=tuple(problems))

    def _has_left(self, ended: Ended) -> bool:
        """At once, as a command does while it imports others' code: not by an exception, and in one
        line."""
        return self._form == COMMAND and ended.status == process.EXIT_INTERRUPTED and ended.errors.endswith("ratel: interrupted\n")

    # --- in the child -------------------------------------------------------------------------------------------

    def _act(self, tell: Tell, tracer: Tracer) -> None:
        faulthandler.dump_traceback_later(patience(PATIENCE_S) - 10, file=2)
        (self._command if self._form == COMMAND else self._library)(tell, tracer)
        tracer.end()
        for (file, line), count in tracer.hits.items() if tracer.at is None else ():
            tell("hits", file, line, count)
        kept = [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
        if kept:
            tell("problem", "the interpreter would wait for", *kept)
        faulthandler.cancel_dump_traceback_later()

    def _interrupt(self, tell: Tell) -> None:
        tell("came")
        if self._form == LIBRARY:
            interrupt()
        os.kill(os.getpid(), signal.SIGINT)

    def _command(self, tell: Tell, tracer: Tracer) -> None:
        """In a process of its own, as far as a fork can be one."""
        process.begin()
        self._run_command(tell, ["--overwrite"], tracer)

    def _run_command(self, tell: Tell, more: list[str], tracer: Tracer) -> None:
        from ratel import cli

        sys.argv = ["ratel", "train", "--model", str(self._site.model), "--data", str(self._site.text), "--out", str(self._out),
                    "--ssd", str(self._ssd), "--tier", "ssd", "--durable", "step", *_flags({**OPTIONS, "steps": STEPS}), *more]
        tracer.begin()
        status = cli.main()
        tracer.end()
        tell("status", status)

    def _library(self, tell: Tell, tracer: Tracer) -> None:
        try:
            tracer.begin()
            self._use_session()
        except KeyboardInterrupt:
            if tracer.at is not None and tracer.at.may_skip_an_exit:
                return  # another process goes on
        tracer.end()
        gc.collect()
        self._go_on(tell)

    def _go_on(self, tell: Tell) -> None:
        from ratel.runtime.states.commits import committed_files

        self._use_session()
        left = {os.fspath(path) for path in self._ssd.iterdir()} - committed_files(self._out / "commits")
        if left:
            tell("problem", "left on the SSD:", *left)

    def _use_session(self) -> None:
        """As somebody's program does; what an earlier one has committed is gone on with."""
        import torch

        from ratel import Session

        commits, batch = self._out / "commits", {"input_ids": torch.arange(32).view(2, 16)}
        with Session(str(self._site.model), ssd=str(self._ssd), tier="ssd", device="cpu", durable="step", commits=commits,
                     dram="1GiB", micro_batch=2) as session:
            if commits.exists():
                session.load(commits)
            session.step(batch)
            session.commit(wait=True)
            session.save(self._out / "copy")
            session.evaluate([batch])
            session.step(batch)
            session.export(self._out / "model")

    # --- afterwards ---------------------------------------------------------------------------------------------

    def _check_restart(self, ended: Ended) -> Iterator[str]:
        """The same command goes on or begins again, and comes to what an uninterrupted one does."""
        status = process.EXIT_INTERRUPTED if self._has_left(ended) else ended.last("status")
        if status not in (0, 130) or "Traceback" in ended.errors:
            yield f"status {status}: {ended.errors[-2000:]}"
        yield from self._left_on_ssd()
        is_there = newest_step(self._out) > 0
        if is_there and (self._out / "config.json").exists():
            again = in_fork(lambda tell: self._run_command(tell, ["--resume"], Tracer()), patience_s=PATIENCE_S)
        else:
            again = in_fork(lambda tell: self._run_command(tell, ["--overwrite"], Tracer()), patience_s=PATIENCE_S)
        if again.hung or again.last("status") != 0:
            yield f"{'resumed' if is_there else 'begun again'}: status {again.last('status')}: {again.errors[-2000:]}"
            return
        try:
            assert_same_run(self._out, self._whole)
        except AssertionError as error:
            yield f"another run: {error}"
        yield from self._left_on_ssd()

    def _left_on_ssd(self) -> Iterator[str]:
        from ratel.runtime.states.commits import committed_files

        left = {os.fspath(path) for path in self._ssd.iterdir()} - committed_files(self._out / "state" / "commits")
        if left:
            yield f"left on the SSD: {left}"

    def _clear(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        shutil.rmtree(self._ssd, ignore_errors=True)
        self._ssd.mkdir(parents=True)


def _flags(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def as_json(tried: Tried) -> str:
    return json.dumps({"at": str(tried.moment), "came": tried.came, "problems": list(tried.problems)})
