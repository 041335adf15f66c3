"""OUT/metrics.jsonl, written by a thread of its own: a slow file system must not show up in a step."""

import asyncio
import json
import math
import os
import threading
from collections.abc import Mapping
from typing import Any

from ratel.errors import WorkerError

_STOP = object()


class MetricsWriter:
    """One JSON object per line. ``write`` returns at once unless ``max_pending`` records wait for the disk.

    An error of the file system is raised by the next call, as `WorkerError` from the original one.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False, max_pending: int = 1024) -> None:
        self._path, self._mode = os.fspath(path), "a" if append else "w"
        self._room = threading.BoundedSemaphore(max_pending)
        self._error: BaseException | None = None
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._thread = threading.Thread(target=self._run, name="ratel-metrics", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        assert not self._is_closed, "write after close"
        self._raise_error()
        line = json.dumps({key: _plain(value) for key, value in record.items()}) + "\n"
        self._room.acquire()
        self._loop.call_soon_threadsafe(self._queue.put_nowait, line)

    def flush(self) -> None:
        """Return when every record is with the operating system."""
        if not self._is_closed:
            reached = threading.Event()
            self._loop.call_soon_threadsafe(self._queue.put_nowait, reached)
            reached.wait()
        self._raise_error()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._loop.call_soon_threadsafe(self._queue.put_nowait, _STOP)
            self._thread.join()
        self._raise_error()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, exc_type: object, *exc: object) -> None:
        try:
            self.close()
        except WorkerError:
            if exc_type is None:  # never hide the error that ended the run
                raise

    def _raise_error(self) -> None:
        if self._error is not None:
            raise WorkerError(f"{self._path} could not be written: {self._error}") from self._error

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        """Take what waits, write it, release those who wait; after an error only the releasing is left to do."""
        import aiofiles

        file, is_open = None, True
        while is_open:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            is_open = _STOP not in items
            lines = [item for item in items if isinstance(item, str)]
            try:
                file = file or await aiofiles.open(self._path, self._mode, encoding="utf-8")
                if self._error is None:
                    await file.write("".join(lines))
                    await file.flush()
                if not is_open:
                    await file.close()
            except OSError as error:
                self._error = self._error or error
            self._release(items)

    def _release(self, items: list[Any]) -> None:
        for item in items:
            if isinstance(item, str):
                self._room.release()
            elif isinstance(item, threading.Event):
                item.set()


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity; a reader that is strict would refuse the line."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
