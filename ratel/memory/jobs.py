"""Threads for work beside the main thread, which nobody has to end.

They are daemons: one that was started, and of which nobody knows because an exception came between,
does not keep the process from ending, as a thread of `concurrent.futures` would. The main thread
waits for their results and looks at signals meanwhile.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from ratel import interrupt

_PATIENCE_S = 60.0
"""Seconds to wait for a job that was begun, once its pool is to end. It holds what it works on, so
leaving it alone harms nobody."""


class Job:
    """An action, and what became of it."""

    def __init__(self, action: Callable[..., Any], *arguments: Any) -> None:
        self._work: tuple[Callable[..., Any], tuple] | None = (action, arguments)
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        work, self._work = self._work, None  # a method of what holds this job, as a rule: with it all that it holds would stay
        self._result, self._error = _outcome(*work)
        self._done.set()

    def result(self) -> Any:
        """Wait for it; raises what it failed with."""
        interrupt.wait_for(self._done)
        try:
            if self._error is not None:
                raise self._error
            return self._result
        finally:
            self = None  # else the error would hold this frame, and the frame the error

    def wait(self) -> None:
        """Wait until it is over, signals or not: its end must be in sight."""
        self._done.wait()


def _outcome(action: Callable[..., Any], arguments: tuple) -> tuple[Any, BaseException | None]:
    try:
        return action(*arguments), None
    except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
        return None, error.with_traceback(error.__traceback__.tb_next)  # without this frame, which holds what the job does


def in_thread(name: str, action: Callable[..., Any], *arguments: Any) -> Job:
    job = Job(action, *arguments)
    threading.Thread(target=job.run, name=name, daemon=True).start()
    return job


class Crew:
    """A number of threads that take jobs in the order in which they were given."""

    def __init__(self, count: int, name: str) -> None:
        self._given: SimpleQueue[Job | None] = SimpleQueue()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=_serve, args=(self._given, self._is_over), name=f"{name}-{number}", daemon=True)
                         for number in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, action: Callable[..., Any], *arguments: Any) -> Job:
        job = Job(action, *arguments)
        self._given.put(job)
        return job

    def map(self, action: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Results in order, all asked for at once."""
        jobs = [self.submit(action, item) for item in items]
        return (job.result() for job in jobs)

    def close(self) -> None:
        """What nobody has begun is left undone; what was begun is waited for."""
        self._is_over.set()
        for _ in self._threads:
            self._given.put(None)
        for thread in self._threads:
            thread.join(_PATIENCE_S)


def _serve(given: "SimpleQueue[Job | None]", is_over: threading.Event) -> None:
    while (job := given.get()) is not None and not is_over.is_set():
        job.run()


@contextmanager
def crew(count: int, name: str) -> Iterator[Crew]:
    threads = Crew(count, name)
    try:
        yield threads
    finally:
        threads.close()
