"""OUT/metrics.jsonl, written by a thread of its own: a slow file system must not show up in a
step."""

import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from ratel import interrupt
from ratel.errors import WorkerError


class MissingMetricsError(WorkerError):
    """Lines that could not be written. Nothing else is lost."""


class MetricsWriter:
    """One JSON object per line. ``write`` returns at once unless ``max_pending`` records wait for
    the disk.

    What the file system does not take is kept and tried again with every further record: a disk
    that is full for a while must not end a run of weeks. Only ``flush`` and ``close`` raise, while
    something is missing.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False, max_pending: int = 1024) -> None:
        self._path, self._mode = os.fspath(path), os.O_APPEND if append else os.O_TRUNC | os.O_APPEND
        self._max_pending, self._process = max_pending, os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[str] = deque()
        self._asked = self._tried = 0
        """Attempts at writing what waits."""
        self._error: OSError | None = None
        self._was_told = False
        self._is_closed = False
        self._file: int | None = None
        self._thread = threading.Thread(target=self._run, name="ratel-metrics", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        assert not self._is_closed, "write after close"
        line = json.dumps({key: _plain(value) for key, value in record.items()}) + "\n"
        with self._changed:
            self._wait(lambda: self._error is not None or len(self._waiting) < self._max_pending)
            self._waiting.append(line)
            self._ask()

    def news(self) -> Iterator[str]:
        """What has changed since the last call, for the user."""
        error = self._error
        if (error is not None) != self._was_told:
            self._was_told = error is not None
            yield (f"{self._path} cannot be written: {error.strerror}. Its lines are kept and tried again" if error is not None else
                   f"{self._path} can be written again: nothing is missing")

    def flush(self) -> None:
        """Return when every record is with the operating system."""
        if not self._is_closed:
            with self._changed:
                number = self._ask()
                self._wait(lambda: self._tried >= number)
        self._raise_error()

    def close(self) -> None:
        if os.getpid() != self._process:
            return  # a forked child has not the thread
        try:
            self.flush()
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, exc_type: object, *exc: object) -> None:
        try:
            self.close()
        except MissingMetricsError:
            if exc_type is None:  # never hide the error that ended the run
                raise

    def _raise_error(self) -> None:
        if self._error is not None:
            raise MissingMetricsError(f"{self._path} could not be written: {self._error.strerror} ({len(self._waiting)} of its "
                                      "lines are missing)") from self._error

    def _ask(self) -> int:
        self._asked += 1
        self._changed.notify_all()
        return self._asked

    def _wait(self, ready: Callable[[], bool]) -> None:
        while not self._changed.wait_for(ready, interrupt.POLL_S):
            interrupt.check()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._asked > self._tried)
                if self._asked == self._tried:
                    break
                number, lines = self._asked, list(self._waiting)
            error = self._put(lines)
            with self._changed:
                for _ in lines if error is None else []:
                    self._waiting.popleft()
                self._error, self._tried = error, number
                self._changed.notify_all()
        if self._file is not None:
            os.close(self._file)

    def _put(self, lines: list[str]) -> OSError | None:
        """Write all of the lines, or none."""
        data, size = memoryview("".join(lines).encode()), None
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | self._mode, 0o666)
                self._mode = os.O_APPEND
            size = os.fstat(self._file).st_size
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.ftruncate(self._file, size)  # half a line would make the next one unreadable
            return error
        return None


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity; a reader that is strict would refuse the line."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
