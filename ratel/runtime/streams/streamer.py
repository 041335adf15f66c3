"""Brings weights, checkpoints and inner activations into GPU slots ahead of their use, in the order
of the step's schedule.

Two threads, each a plain loop over the schedule: the *reader* gets the bytes into DRAM (starting
SSD reads, or waiting for the unit's pending update), the *uploader* moves them into a slot. The
main thread calls ``get`` and ``release``.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from ratel.memory import jitter
from ratel.memory.exchange import Exchange, Mailbox, Worker, join_all
from ratel.memory.lanes import Event, Lanes
from ratel.memory.retire import Retirer
from ratel.memory.slots import Slot, SlotPool
from ratel.planner.schedule import Gather

Key = tuple


def key_of(gather: Gather) -> Key:
    if gather.is_unit:
        return "unit", gather.unit
    return "saved", *gather.saved


class Source(Protocol):
    """Where one gather's bytes come from."""

    def open(self, gather: Gather) -> object:
        """Reserve DRAM and start reading; may block. On the reader's thread."""

    def fill(self, gather: Gather, handle: object, slot: Slot) -> torch.Tensor:
        """Wait for the bytes, enqueue their copy on the current stream, return the view of the slot
        that holds them."""

    def done(self, gather: Gather, handle: object) -> None:
        """The copy has completed; give the DRAM back."""

    def pool(self, gather: Gather) -> SlotPool:
        """The pool of slots that the gather goes into."""

    def name(self, gather: Gather) -> str:
        """What the gather is called in traces."""


@dataclass(slots=True)
class Landed:
    slot: Slot
    view: torch.Tensor
    arrived: Event


class Streamer:
    def __init__(self, exchange: Exchange, lanes: Lanes, copies: Retirer, weights: Source, saved: Source) -> None:
        self._exchange, self._lanes, self._copies = exchange, lanes, copies
        self._weights, self._saved = weights, saved
        self._to_read, self._to_upload = Mailbox(exchange), Mailbox(exchange)
        self._landing = exchange.condition()
        self._landed: dict[Key, Landed] = {}
        self._workers = [Worker("reader", exchange, self._read), Worker("uploader", exchange, self._upload)]

    def start(self, schedule: list[Gather]) -> None:
        """Begin a pass. Gathers run ahead as far as slots allow."""
        self._to_read.put(*schedule)

    def get(self, key: Key, name: str) -> torch.Tensor:
        """The gathered bytes, safe to use by work enqueued on the compute lane from now on.
        ``name`` is for traces."""
        with self._exchange.lock:
            self._exchange.wait_for(self._landing, lambda: key in self._landed,
                                    "weights" if key[0] == "unit" else "activations", name)
            landed = self._landed[key]
        self._lanes.wait("compute", landed.arrived)
        jitter.pause(on_stream=True)
        return landed.view

    def release(self, key: Key) -> None:
        """The compute lane's work enqueued so far is the last of one use of the gather."""
        with self._exchange.lock:
            slot = self._landed[key].slot
            slot.uses -= 1
            if slot.uses:
                return
            del self._landed[key]
        slot.pool.release(slot, self._lanes.record("compute"))

    def join(self, timeout_s: float) -> bool:
        return join_all(self._workers, timeout_s)

    def _source_of(self, gather: Gather) -> Source:
        return self._weights if gather.is_unit else self._saved

    def _read(self) -> None:
        while True:
            gather = self._to_read.take()
            jitter.pause()
            self._to_upload.put((gather, self._source_of(gather).open(gather)))

    def _upload(self) -> None:
        if self._lanes.is_cuda:
            torch.cuda.set_device(self._lanes.device)
        with torch.no_grad():
            while True:
                self._upload_one(*self._to_upload.take())

    def _upload_one(self, gather: Gather, handle: object) -> None:
        source = self._source_of(gather)
        slot = source.pool(gather).acquire("GPU slot", source.name(gather))
        slot.uses = gather.uses
        self._lanes.wait("h2d", slot.last_use)
        view = source.fill(gather, handle, slot)
        arrived = self._lanes.record("h2d")
        with self._exchange.lock:
            assert key_of(gather) not in self._landed, f"{key_of(gather)} was gathered twice"
            self._landed[key_of(gather)] = Landed(slot, view, arrived)
            self._landing.notify_all()
        self._copies.when_event(arrived, lambda: source.done(gather, handle))
