"""Threads that wait for what completes by itself (copies, writes) and then give its buffers back.

What is handed over here must need no further action of any thread to complete; so the wait cannot
be part of a cycle, and FIFO order is safe.
"""

from collections.abc import Callable

from ratel.memory import jitter
from ratel.memory.exchange import Exchange, Mailbox, Worker, join_all
from ratel.memory.lanes import Event


class Retirer:
    """Calls ``after`` once ``wait`` has returned, in the order of submission, on its own thread."""

    def __init__(self, name: str, exchange: Exchange) -> None:
        self._mail = Mailbox(exchange)
        self._worker = Worker(name, exchange, self._run)

    def when(self, wait: Callable[[], None], after: Callable[[], None]) -> None:
        self._mail.put((wait, after))

    def when_event(self, event: Event, after: Callable[[], None]) -> None:
        self.when(event.synchronize, after)

    def join(self, timeout_s: float) -> bool:
        return join_all([self._worker], timeout_s)

    def _run(self) -> None:
        while True:
            wait, after = self._mail.take()
            wait()
            jitter.pause()
            after()
            del wait, after  # what they hold, the whole session as a rule, is not this thread's
