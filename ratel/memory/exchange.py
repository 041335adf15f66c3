"""One lock, one failure, one end for all threads of a session.

Every blocking wait in the runtime goes through an Exchange, so that the first error of any thread,
or the close of the session, wakes every waiter with that error instead of leaving it asleep.
"""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress

from ratel import interrupt
from ratel.errors import NonFiniteError, WorkerError
from ratel.memory.tracing import Tracing

LOST = ("The session cannot go on and what it has trained is lost, but for what was saved or committed; a model that was given "
        "as an object keeps the weights it came with")


class Closed(RuntimeError):
    """The session was closed while a thread waited; ends that thread, never reaches the user."""


class Exchange:
    """Conditions that share a lock; a failure or a close wakes all of them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._conditions: list[threading.Condition] = []
        self._failure: BaseException | None = None
        self._failed_in = ""
        self.closed = False
        self.tracing = Tracing()

    def condition(self) -> threading.Condition:
        condition = threading.Condition(self.lock)
        with self.lock:
            self._conditions.append(condition)
        return condition

    def wait_for(self, condition: threading.Condition, ready: Callable[[], bool], cause: str = "", name: str = "") -> None:
        """Block until ``ready()``; raises if a thread has failed or the session was closed. The
        lock is held.

        ``cause`` and ``name`` say in a trace what for; without them the thread just has nothing to
        do.
        """
        if not ready():
            poll_s = interrupt.POLL_S if threading.current_thread() is threading.main_thread() else None
            with self.tracing.waiting(cause, name) if cause else nullcontext():
                while not ready():
                    self.check()
                    condition.wait(poll_s)
                    interrupt.check()
        self.check()

    def check(self) -> None:
        """Raise what a background thread failed with, as a new error whose cause is the
        original."""
        if isinstance(self._failure, NonFiniteError):
            raise NonFiniteError(str(self._failure)) from self._failure
        if self._failure is not None:
            raise WorkerError(f"{self._failed_in} failed: {self._failure}. {LOST}") from self._failure
        if self.closed:
            raise Closed("the session is closed")

    def fail(self, error: BaseException, where: str) -> None:
        with self.lock:
            if self._failure is None and not self.closed:
                self._failure, self._failed_in = error, where
            self._wake_all()

    def close(self) -> None:
        """Whoever does this is not in the middle of anything: if the lock is this thread's, an
        exception that came between two lines has left it so, and everybody else would wait for it
        for ever."""
        with suppress(RuntimeError):
            while True:
                self.lock.release()
        with self.lock:
            self.closed = True
            self._wake_all()

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def _wake_all(self) -> None:
        for condition in self._conditions:
            condition.notify_all()


class Worker(threading.Thread):
    """A background thread whose error becomes the session's error."""

    def __init__(self, name: str, exchange: Exchange, body: Callable[[], None]) -> None:
        super().__init__(name=f"ratel-{name}", daemon=True)
        self._exchange, self._body, self._label = exchange, body, name
        self.start()

    def run(self) -> None:
        try:
            self._body()
        except Closed:
            pass
        except WorkerError:
            pass  # another thread failed first; its error is already the session's
        except BaseException as error:  # noqa: BLE001 - the session must learn of anything, or its waiters hang
            self._exchange.fail(error, f"the {self._label} thread")
        finally:
            del self._body  # a method of what holds this thread, as a rule: with it all that it holds would stay

    def end(self, until_s: float) -> bool:
        """Wait for it, to this moment of ``time.monotonic`` at most. Whether it is over."""
        if self is threading.current_thread():  # a collection of garbage may close a session anywhere
            return True
        self.join(max(0.0, until_s - time.monotonic()))
        return not self.is_alive()


def join_all(workers: "Iterable[Worker]", timeout_s: float) -> bool:
    until_s = time.monotonic() + timeout_s
    return all([worker.end(until_s) for worker in workers])


class Mailbox:
    """A queue between two threads of one session; ``take`` blocks until there is something or the
    session ends."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._filled = exchange.condition()
        self._items: list = []

    def put(self, *items: object) -> None:
        with self._exchange.lock:
            self._items.extend(items)
            self._filled.notify_all()

    def take(self):
        with self._exchange.lock:
            self._exchange.wait_for(self._filled, lambda: bool(self._items))
            return self._items.pop(0)
