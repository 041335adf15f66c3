"""What forward keeps for backward (block inputs and inner activations): on the GPU, in DRAM, or through DRAM on SSD."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ratel import native
from ratel.errors import RatelError
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.memory.lanes import Event, Lanes
from ratel.memory.retire import Retirer
from ratel.memory.slots import Slot, SlotPool
from ratel.plan.placement import DRAM, GPU, SSD
from ratel.plan.plan import PAGE_BYTES, Plan
from ratel.plan.saved import INPUT, Saved
from ratel.plan.schedule import Gather
from ratel.runtime.packing import Part, flat, lay_out_parts, part_of
from ratel.runtime.slot_sums import SlotSums
from ratel.units import align_up

Key = tuple[int, int, str]
"""Block, micro-batch, name: `INPUT` or that of an inner activation."""

MAX_COPIES_BEHIND = 2
"""Checkpoints whose copy to DRAM may still run while the next blocks are launched: what bounds the GPU memory that a
main thread far ahead of the GPU can hold on to."""


@dataclass(slots=True)
class Left:
    """Something outside the GPU: in DRAM once ``copied``, on SSD once ``written``; bit for bit. None of it
    (``num_bytes`` 0) where forward has not kept what the plan had room for."""

    num_bytes: int
    copied: Event
    written: bool


@dataclass(frozen=True, slots=True)
class Fetch:
    """Something on its way back. ``slot`` and ``ticket``: the staging slot and the read of what was on SSD."""

    left: Left
    host: Tensor
    slot: Slot | None
    ticket: int


class Activations:
    """Saves on the main thread, returns through the streamer (it is the Source of these gathers)."""

    def __init__(self, plan: Plan, arena: Arena, device: torch.device, exchange: Exchange, lanes: Lanes,
                 copies: Retirer, writes: Retirer, engine: "native.nvme_ds.Engine | None",
                 volume: "native.nvme_ds.Volume | None", sums: SlotSums) -> None:
        self._plan, self._lanes, self._exchange = plan, lanes, exchange
        self._copies, self._writes, self._engine, self._volume = copies, writes, engine, volume
        self._sums = sums
        self._places: dict[tuple[int, str], Saved] = {(s.block, s.name): s for s in plan.saved}
        self._kept: dict[Key, list[Tensor]] = {}
        self._parts: dict[Key, list[Part]] = {}
        """How to find the tensors again in the bytes of what has left; of the main thread alone."""
        self._left: dict[Key, Left] = {}
        self._changed = exchange.condition()
        self._leaving: deque[tuple[Event, Tensor]] = deque()
        self._leaving_inner: deque[list[tuple[Event, Tensor]]] = deque()
        self._in_dram = self._take_dram(arena)
        self._offsets = self._lay_out_volume()
        self._make_pools(arena, device)

    # --- out ----------------------------------------------------------------------------------------------------

    def save(self, key: Key, tensors: list[Tensor]) -> None:
        """Whole tensors that nobody writes to any more; an inner activation's come between ``begin`` and ``end``."""
        place = self._place(key)
        if place.tier == GPU:
            self._kept[key] = tensors
            return
        parts, num_bytes = lay_out_parts(tensors)
        if num_bytes > place.num_bytes:
            raise _too_large(place, tensors[0])
        slot = None
        if place.tier == SSD:
            slot = self._staging_out[place.is_inner, place.num_bytes].acquire("SSD write", _label(key))
        host = slot.buffer if slot else self._in_dram[key]
        self._lanes.wait("d2h", self._lanes.record("compute"))
        with self._lanes.work("d2h", _label(key), num_bytes):
            for part, tensor in zip(parts, tensors, strict=True):
                flat(part_of(host, part)).copy_(flat(tensor), non_blocking=True)
        copied = self._lanes.record("d2h")
        self._hold(place, copied, tensors)
        self._parts[key] = parts
        left = Left(num_bytes, copied, written=slot is None)
        self._announce(key, left)
        if slot is not None:
            self._write_out(key, slot, left)

    def begin(self) -> None:
        """A block is about to save inner activations. Waits until there is GPU memory for what is on its way out."""
        while len(self._leaving_inner) >= self._plan.buffers.inner_slots:
            for copied, _ in self._leaving_inner.popleft():
                self._wait_copied(copied)
        self._leaving_inner.append([])

    def end(self, block: int, micro: int) -> None:
        """The block has run; what it has not saved will not come."""
        for place in self._plan.saved_of(block):
            key = (block, micro, place.name)
            if place.tier != GPU and place.is_inner and key not in self._parts:
                self._announce(key, Left(0, Event(), written=True))

    # --- back ---------------------------------------------------------------------------------------------------

    def kept(self, key: Key) -> list[Tensor] | None:
        """What never left the GPU; given up by this call."""
        return self._kept.pop(key, None)

    def returned(self, key: Key, view: Tensor) -> list[Tensor] | None:
        """The tensors in the bytes that the streamer has brought back; None if forward has not kept them."""
        parts = self._parts.pop(key, None)
        return None if parts is None else [part_of(view, part) for part in parts]

    def pool(self, gather: Gather) -> SlotPool:
        place = self._place(_key_of(gather))
        return self._slots[place.is_inner, place.num_bytes]

    def name(self, gather: Gather) -> str:
        return _label(_key_of(gather))

    def open(self, gather: Gather) -> Fetch:
        """Wait for the forward pass to save it; start its read if it is on SSD."""
        key = _key_of(gather)
        with self._exchange.lock:
            self._exchange.wait_for(self._changed, lambda: key in self._left and self._left[key].written, "saving",
                                    self.name(gather))
            left = self._left.pop(key)
        place = self._place(key)
        if place.tier == DRAM or not left.num_bytes:
            return Fetch(left, self._in_dram.get(key), None, 0)
        slot = self._staging_in[place.is_inner, place.num_bytes].acquire("DRAM slot", self.name(gather))
        ticket = self._engine.submit_read(self._volume, self._offsets[key], slot.buffer.data_ptr(), slot.buffer.numel(),
                                          native.nvme_ds.ACTIVATION)
        return Fetch(left, slot.buffer, slot, ticket)

    def fill(self, gather: Gather, handle: Fetch, slot: Slot) -> Tensor:
        if handle.slot is not None:
            key = _key_of(gather)
            with self._exchange.tracing.waiting("SSD read", self.name(gather)):
                self._engine.wait(handle.ticket)
            self._sums.verify(key, handle.slot.buffer, self._offsets[key])
        view = slot.buffer[: handle.left.num_bytes]
        if handle.left.num_bytes:
            self._lanes.wait("h2d", handle.left.copied)
            with self._lanes.work("h2d", self.name(gather), view.numel()):
                view.copy_(handle.host[: handle.left.num_bytes], non_blocking=True)
        return view

    def done(self, gather: Gather, handle: Fetch) -> None:
        if handle.slot is not None:
            handle.slot.pool.release(handle.slot, Event())

    # --- how ----------------------------------------------------------------------------------------------------

    def _place(self, key: Key) -> Saved:
        return self._places[key[0], key[2]]

    def _announce(self, key: Key, left: Left) -> None:
        with self._exchange.lock:
            self._left[key] = left
            self._changed.notify_all()

    def _hold(self, place: Saved, copied: Event, tensors: list[Tensor]) -> None:
        """Keep the tensors until their copies are complete; their memory must not be reused before."""
        held = [(copied, tensor) for tensor in tensors]
        if place.is_inner:
            self._leaving_inner[-1] += held
            return
        self._leaving += held
        while len(self._leaving) > MAX_COPIES_BEHIND * self._plan.work.num_micro:
            self._wait_copied(self._leaving.popleft()[0])

    def _wait_copied(self, copied: Event) -> None:
        with self._exchange.tracing.waiting("copy out"):
            copied.synchronize()

    def _write_out(self, key: Key, slot: Slot, left: Left) -> None:
        def submit() -> None:
            self._sums.record(key, slot.buffer)
            ticket = self._engine.submit_write(self._volume, self._offsets[key], slot.buffer.data_ptr(),
                                               slot.buffer.numel(), native.nvme_ds.ACTIVATION)
            self._writes.when(lambda: self._engine.wait(ticket), lambda: self._wrote(left, slot))

        self._copies.when_event(left.copied, submit)

    def _wrote(self, left: Left, slot: Slot) -> None:
        slot.pool.release(slot, Event())
        with self._exchange.lock:
            left.written = True
            self._changed.notify_all()

    # --- where --------------------------------------------------------------------------------------------------

    def on_ssd(self) -> "tuple[native.nvme_ds.Volume | None, list[tuple[int, str]]]":
        """The volume, and what begins where in it, in the order of the places."""
        return self._volume, [(offset, _label(key)) for key, offset in self._offsets.items()]

    def _keys_on(self, tier: str) -> list[tuple[Key, int]]:
        """Everything that goes to the tier, with its bytes."""
        return [((s.block, micro, s.name), s.num_bytes) for s in self._plan.saved if s.tier == tier
                for micro in range(self._plan.work.num_micro)]

    def _take_dram(self, arena: Arena) -> dict[Key, Tensor]:
        return {key: arena.take(num_bytes) for key, num_bytes in self._keys_on(DRAM)}

    def _lay_out_volume(self) -> dict[Key, int]:
        offsets, cursor = {}, 0
        for key, num_bytes in self._keys_on(SSD):
            offsets[key], cursor = cursor, cursor + align_up(num_bytes, PAGE_BYTES)
        return offsets

    def _make_pools(self, arena: Arena, device: torch.device) -> None:
        """By whether it is for inner activations and by the bytes that go in."""
        self._slots: dict[tuple[bool, int], SlotPool] = {}
        self._staging_out: dict[tuple[bool, int], SlotPool] = {}
        self._staging_in: dict[tuple[bool, int], SlotPool] = {}
        for inner in (False, True):
            for num_bytes, count in self._plan.return_slots(inner).items():
                buffers = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(count)]
                self._slots[inner, num_bytes] = SlotPool(self._exchange, buffers)
            for num_bytes, count in self._plan.staging_slots(inner).items():
                for staging in (self._staging_out, self._staging_in):
                    buffers = [arena.take(align_up(num_bytes, PAGE_BYTES)) for _ in range(count)]
                    staging[inner, num_bytes] = SlotPool(self._exchange, buffers)


def _too_large(place: Saved, hidden: Tensor) -> RatelError:
    assert not place.is_inner, f"{place.name} of block {place.block} is larger than the plan has room for"
    return RatelError(f"block {place.block} is given hidden states of more bytes than the first block ({hidden.dtype} "
                      f"{tuple(hidden.shape)})", field="checkpoint_tier", value=place.tier,
                      remedy="Use --checkpoint-tier gpu")


def _key_of(gather: Gather) -> Key:
    return (*gather.checkpoint, INPUT) if gather.is_checkpoint else gather.inner


def _label(key: Key) -> str:
    block, micro, name = key
    return f"checkpoint {block}.{micro}" if name == INPUT else f"{name} {block}.{micro}"
