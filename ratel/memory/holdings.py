"""What a session has taken of the machine: threads, an engine with its files, memory. Given back
once, by whoever comes to it.

Held apart from the session's parts, so that it can be given back when these are dropped, or the
interpreter ends, with nobody having closed them: an exception of a signal may come between any two
lines of the program that uses a session.
"""

import os
import time
from typing import Protocol

from ratel import native
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.memory.lanes import Lanes

_PATIENCE_S = 60.0
"""Seconds to wait for threads that were told to end. They hold what they work on; memory stays
mapped where one does not."""


class Joinable(Protocol):
    def join(self, timeout_s: float) -> bool:
        """Whether its threads have ended by then."""


class Holdings:
    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.engine: "native.nvme_ds.Engine | None" = None
        self.arena: Arena | None = None
        self.lanes: Lanes | None = None
        self.workers: list[Joinable] = []
        self._process = os.getpid()

    def close(self) -> None:
        """End the threads, then the engine, then the memory. Can be called again where it was
        interrupted. A child that was forked has none of the threads, and nothing here is its own.

        A device that has stopped answering is given up, with the memory that it may still write to.
        """
        if os.getpid() != self._process:
            return
        self.exchange.close()
        is_over = self.engine is None or self._end_engine(self.engine)
        is_over = self._join() and is_over
        if self.lanes is not None:
            self.lanes.synchronize()
        arena, self.arena = self.arena, None
        if arena is not None:
            arena.close() if is_over else arena.abandon()

    def _end_engine(self, engine: "native.nvme_ds.Engine") -> bool:
        """Whether every transfer is over."""
        try:
            engine.close()
        except TimeoutError:
            engine.abandon()
            return False
        return True

    def _join(self) -> bool:
        """Whether every thread has ended."""
        until_s = time.monotonic() + _PATIENCE_S
        return all([worker.join(max(0.0, until_s - time.monotonic())) for worker in self.workers])
