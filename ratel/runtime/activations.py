"""Block inputs (checkpoints) of every micro-batch: kept on the GPU, moved to DRAM, or through DRAM to SSD, and back."""

from collections import deque
from dataclasses import dataclass

import torch

from ratel import native
from ratel.errors import RatelError
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.memory.lanes import Event, Lanes
from ratel.memory.retire import Retirer
from ratel.memory.slots import Slot, SlotPool
from ratel.plan.placement import DRAM, GPU, SSD
from ratel.plan.plan import PAGE_BYTES, Plan
from ratel.plan.schedule import Gather
from ratel.units import align_up

MAX_COPIES_BEHIND = 2
"""Checkpoints whose copy to DRAM may still run while the next blocks are launched: what bounds the GPU memory that a
main thread far ahead of the GPU can hold on to."""


@dataclass(slots=True)
class Saved:
    """A checkpoint outside the GPU: in DRAM once ``copied``, on SSD once ``written``; bit for bit."""

    shape: torch.Size
    dtype: torch.dtype
    copied: Event
    written: bool


@dataclass(frozen=True, slots=True)
class Fetch:
    """A checkpoint on its way back. ``slot`` and ``ticket``: the staging slot and the read of one that was on SSD."""

    saved: Saved
    host: torch.Tensor
    slot: Slot | None
    ticket: int


class Checkpoints:
    """Saves on the main thread, returns through the streamer (it is the Source of checkpoint gathers)."""

    def __init__(self, plan: Plan, arena: Arena, device: torch.device, exchange: Exchange, lanes: Lanes,
                 copies: Retirer, writes: Retirer, engine: "native.nvme_ds.Engine | None",
                 volume: "native.nvme_ds.Volume | None") -> None:
        self._plan, self._lanes, self._exchange = plan, lanes, exchange
        self._copies, self._writes, self._engine, self._volume = copies, writes, engine, volume
        self._num_bytes = plan.work.hidden_bytes
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._in_dram: dict[tuple[int, int], torch.Tensor] = self._take_dram(arena)
        self._saved: dict[tuple[int, int], Saved] = {}
        self._changed = exchange.condition()
        self._leaving: deque[tuple[Event, torch.Tensor]] = deque()
        self._make_pools(arena, device)

    def save(self, block: int, micro: int, hidden: torch.Tensor) -> None:
        key = (block, micro)
        tier = self._plan.checkpoint_tiers[block]
        if tier == GPU:
            self._kept[key] = hidden
            return
        self._check_size(block, hidden, tier)
        slot = self._staging_out.acquire() if tier == SSD else None
        host = slot.buffer if slot else self._in_dram[key]
        view = _shaped(host, hidden.shape, hidden.dtype)
        self._lanes.wait("d2h", self._lanes.record("compute"))
        with self._lanes.work("d2h", f"checkpoint {block}.{micro}"):
            view.copy_(hidden, non_blocking=True)
        copied = self._lanes.record("d2h")
        self._hold(copied, hidden)
        saved = Saved(hidden.shape, hidden.dtype, copied, written=slot is None)
        with self._exchange.lock:
            self._saved[key] = saved
            self._changed.notify_all()
        if slot is not None:
            self._write_out(key, slot, saved)

    def kept(self, block: int, micro: int) -> torch.Tensor | None:
        """The checkpoint if it never left the GPU; given up by this call."""
        return self._kept.pop((block, micro), None)

    def pool(self, gather: Gather) -> SlotPool:
        return self._slots

    def open(self, gather: Gather) -> "Fetch":
        """Wait for the forward pass to save it; start its read if it is on SSD."""
        key = gather.checkpoint
        with self._exchange.lock:
            self._exchange.wait_for(self._changed, lambda: key in self._saved and self._saved[key].written)
            saved = self._saved.pop(key)
        if self._plan.checkpoint_tiers[key[0]] == DRAM:
            return Fetch(saved, self._in_dram[key], None, 0)
        slot = self._staging_in.acquire()
        ticket = self._engine.submit_read(self._volume, self._offset(key), slot.buffer.data_ptr(), slot.buffer.numel(),
                                          native.nvme_ds.ACTIVATION)
        return Fetch(saved, slot.buffer, slot, ticket)

    def fill(self, gather: Gather, handle: "Fetch", slot: Slot) -> torch.Tensor:
        if handle.slot is not None:
            self._engine.wait(handle.ticket)
        saved = handle.saved
        self._lanes.wait("h2d", saved.copied)
        view = _shaped(slot.buffer, saved.shape, saved.dtype)
        with self._lanes.work("h2d", "checkpoint"):
            view.copy_(_shaped(handle.host, saved.shape, saved.dtype), non_blocking=True)
        return view

    def done(self, gather: Gather, handle: "Fetch") -> None:
        if handle.slot is not None:
            self._staging_in.release(handle.slot, Event())

    def _check_size(self, block: int, hidden: torch.Tensor, tier: str) -> None:
        if hidden.numel() * hidden.element_size() > self._num_bytes:
            raise RatelError(f"block {block} is given hidden states of more bytes than the first block "
                             f"({hidden.dtype} {tuple(hidden.shape)})", field="checkpoint_tier", value=tier,
                             remedy="Use --checkpoint-tier gpu")

    def _hold(self, copied: Event, hidden: torch.Tensor) -> None:
        """Keep the tensor until its copy is complete; its memory must not be reused before."""
        self._leaving.append((copied, hidden))
        while len(self._leaving) > MAX_COPIES_BEHIND * self._plan.work.num_micro:
            self._leaving.popleft()[0].synchronize()

    def _write_out(self, key: tuple[int, int], slot: Slot, saved: Saved) -> None:
        def submit() -> None:
            ticket = self._engine.submit_write(self._volume, self._offset(key), slot.buffer.data_ptr(),
                                               slot.buffer.numel(), native.nvme_ds.ACTIVATION)
            self._writes.when(lambda: self._engine.wait(ticket), lambda: self._wrote(saved, slot))

        self._copies.when_event(saved.copied, submit)

    def _wrote(self, saved: Saved, slot: Slot) -> None:
        self._staging_out.release(slot, Event())
        with self._exchange.lock:
            saved.written = True
            self._changed.notify_all()

    def _offset(self, key: tuple[int, int]) -> int:
        on_ssd = [b for b, tier in enumerate(self._plan.checkpoint_tiers) if tier == SSD]
        index = on_ssd.index(key[0]) * self._plan.work.num_micro + key[1]
        return index * align_up(self._num_bytes, PAGE_BYTES)

    def _take_dram(self, arena: Arena) -> dict[tuple[int, int], torch.Tensor]:
        return {(block, micro): arena.take(self._num_bytes)
                for block, tier in enumerate(self._plan.checkpoint_tiers) if tier == DRAM
                for micro in range(self._plan.work.num_micro)}

    def _make_pools(self, arena: Arena, device: torch.device) -> None:
        count = self._plan.buffers.checkpoint_slots
        paged = align_up(self._num_bytes, PAGE_BYTES)
        if self._plan.offloads_checkpoints:
            buffers = [torch.empty(self._num_bytes, dtype=torch.uint8, device=device) for _ in range(count)]
            self._slots = SlotPool(self._exchange, buffers)
        if SSD in self._plan.checkpoint_tiers:
            self._staging_out = SlotPool(self._exchange, [arena.take(paged) for _ in range(count)])
            self._staging_in = SlotPool(self._exchange, [arena.take(paged) for _ in range(count)])


def _shaped(buffer: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
