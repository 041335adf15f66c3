"""Preallocated device buffers that planes occupy for a while, and the threads that wait for one."""

from dataclasses import dataclass, field

import torch

from ratel.memory.exchange import Exchange
from ratel.memory.lanes import Event


@dataclass(slots=True, eq=False)
class Slot:
    """``buffer`` may be overwritten once ``last_use`` is reached; ``uses`` counts the releases
    still to come."""

    buffer: torch.Tensor
    pool: "SlotPool | None" = None
    """The pool of a slot that is lent. Free ones are the pool's: if they had it, too, the buffers
    would outlive both until a collection."""
    last_use: Event = field(default_factory=Event)
    uses: int = 0


class SlotPool:
    """Equal buffers. A slot is given back as soon as its last user is *enqueued*; ``last_use``
    orders the device."""

    def __init__(self, exchange: Exchange, buffers: list[torch.Tensor]) -> None:
        self._exchange = exchange
        self._freed = exchange.condition()
        self._free = [Slot(buffer) for buffer in buffers]

    def acquire(self, cause: str, name: str) -> Slot:
        """Block until one is free. ``cause`` and ``name`` say in a trace what its last user still
        waits for, and who asks."""
        with self._exchange.lock:
            self._exchange.wait_for(self._freed, lambda: bool(self._free), cause, name)
            slot = self._free.pop(0)
            slot.pool = self
            return slot

    def release(self, slot: Slot, last_use: Event) -> None:
        with self._exchange.lock:
            slot.pool, slot.last_use = None, last_use
            self._free.append(slot)
            self._freed.notify_all()
