"""What forward keeps for backward (block inputs and inner activations): on the GPU, in DRAM, or
through DRAM on SSD."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ratel import native
from ratel.errors import RatelError
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.memory.lanes import Event, Lanes
from ratel.memory.retire import Retirer
from ratel.memory.slots import Slot, SlotPool
from ratel.planner.checkpoints import INPUT, PART_ALIGN, Group
from ratel.planner.placement import DRAM, GPU, SSD
from ratel.planner.plan import Plan
from ratel.planner.schedule import Gather
from ratel.planner.slot_layout import PAGE_BYTES
from ratel.runtime.blocks.packing import Part, flat, lay_out_parts, part_of
from ratel.runtime.streams.slot_sums import SlotSums
from ratel.units import align_up

Key = tuple[int, int, str]
"""Block, micro-batch, and which group of the block: `INPUT`, or the tier that inner activations go
to."""

MAX_COPIES_BEHIND = 2
"""Checkpoints whose copy to DRAM may still run while the next blocks are launched: what bounds the
GPU memory that a main thread far ahead of the GPU can hold on to."""


@dataclass(slots=True)
class Leaving:
    """A group while its tensors are copied out, one after the other, into ``host``. They must stay
    until they are."""

    group: Group
    key: Key
    host: Tensor
    slot: Slot | None
    """The staging slot of what goes to SSD."""
    tensors: list[Tensor] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    parts: dict[str, list[Part]] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        return align_up(self.ranges[-1][1], PART_ALIGN) if self.ranges else 0


@dataclass(slots=True)
class Left:
    """A group outside the GPU: in DRAM once ``copied``, on SSD once ``written``; bit for bit.
    ``ranges``: where its bytes are; none where forward has not kept what the plan had room for."""

    ranges: list[tuple[int, int]]
    copied: Event
    written: bool


@dataclass(frozen=True, slots=True)
class Fetch:
    """Something on its way back. ``slot`` and ``ticket``: the staging slot and the read of what was
    on SSD."""

    left: Left
    host: Tensor
    slot: Slot | None
    ticket: int


class Activations:
    """Saves on the main thread, returns through the streamer (it is the Source of these
    gathers)."""

    def __init__(self, plan: Plan, arena: Arena, device: torch.device, exchange: Exchange, lanes: Lanes,
                 copies: Retirer, writes: Retirer, engine: "native.nvme_ds.Engine | None",
                 volume: "native.nvme_ds.Volume | None", sums: SlotSums) -> None:
        self._plan, self._lanes, self._exchange = plan, lanes, exchange
        self._copies, self._writes, self._engine, self._volume = copies, writes, engine, volume
        self._sums = sums
        self._on_gpu = {(saved.block, saved.name) for saved in plan.saved if saved.tier == GPU}
        self._groups: dict[tuple[int, str], Group] = {(group.block, group.what): group for group in plan.groups}
        self._group_of = {(group.block, saved.name): group for group in plan.groups for saved in group.members}
        self._kept: dict[Key, list[Tensor]] = {}
        """What is kept on the GPU, by block, micro-batch and name."""
        self._parts: dict[Key, dict[str, list[Part]]] = {}
        """How to find the tensors again in the bytes of what has left, by name; of the main thread
        alone."""
        self._open: dict[Key, Leaving] = {}
        """Inner activations of the block that runs."""
        self._left: dict[Key, Left] = {}
        self._changed = exchange.condition()
        self._leaving: deque[tuple[Event, list[Tensor]]] = deque()
        self._leaving_inner: deque[list[tuple[Event, list[Tensor]]]] = deque()
        self._in_dram = self._take_dram(arena)
        self._offsets = self._lay_out_volume()
        self._make_pools(arena, device)

    # --- out ----------------------------------------------------------------------------------------------------

    def save_input(self, block: int, micro_batch: int, hidden: Tensor) -> None:
        """A whole tensor that nobody writes to any more."""
        if (block, INPUT) in self._on_gpu:
            self._kept[block, micro_batch, INPUT] = [hidden]
            return
        leaving = self._begin(self._groups[block, INPUT], micro_batch)
        self._copy_out(leaving, INPUT, [hidden])
        self._leaving.append((self._send(leaving), leaving.tensors))
        while len(self._leaving) > MAX_COPIES_BEHIND * self._plan.work.num_micro:
            copied, _tensors = self._leaving.popleft()  # which are held until the wait is over
            self._wait_copied(copied)
            del _tensors

    def begin(self) -> None:
        """A block is about to save inner activations. Waits until there is GPU memory for what is
        on its way out."""
        while len(self._leaving_inner) >= self._plan.buffers.inner_slots:
            for copied, _ in self._leaving_inner.popleft():
                self._wait_copied(copied)
        self._leaving_inner.append([])

    def save(self, block: int, micro_batch: int, name: str, tensors: list[Tensor]) -> None:
        """One inner activation between ``begin`` and ``end``: whole tensors that nobody writes to
        any more."""
        if (block, name) in self._on_gpu:
            self._kept[block, micro_batch, name] = tensors
            return
        group = self._group_of[block, name]
        key = (block, micro_batch, group.what)
        if key not in self._open:
            self._open[key] = self._begin(group, micro_batch)
        self._copy_out(self._open[key], name, tensors)

    def end(self, block: int, micro_batch: int) -> None:
        """The block has run; what it has not saved will not come."""
        for group in self._plan.groups_of(block):
            key = (block, micro_batch, group.what)
            if key in self._open:
                leaving = self._open.pop(key)
                self._leaving_inner[-1].append((self._send(leaving), leaving.tensors))
            elif group.is_inner:
                self._announce(key, Left([], Event(), written=True))

    # --- back ---------------------------------------------------------------------------------------------------

    def kept(self, block: int, micro_batch: int, name: str) -> list[Tensor] | None:
        """What never left the GPU; given up by this call."""
        return self._kept.pop((block, micro_batch, name), None)

    def returned(self, key: Key, view: Tensor) -> dict[str, list[Tensor]]:
        """The tensors in the bytes that the streamer has brought back, by name; but those that
        forward has not kept."""
        parts = self._parts.pop(key, {})
        return {name: [part_of(view, part) for part in found] for name, found in parts.items()}

    def pool(self, gather: Gather) -> SlotPool:
        return self._slots[_is_inner(gather.saved)]

    def name(self, gather: Gather) -> str:
        return _label(gather.saved)

    def open(self, gather: Gather) -> Fetch:
        """Wait for the forward pass to save it; start its read if it is on SSD."""
        key = gather.saved
        with self._exchange.lock:
            self._exchange.wait_for(self._changed, lambda: key in self._left and self._left[key].written, "saving",
                                    self.name(gather))
            left = self._left.pop(key)
        if key in self._in_dram or not left.ranges:
            return Fetch(left, self._in_dram.get(key), None, 0)
        slot = self._staging_in[_is_inner(key)].acquire("DRAM slot", self.name(gather))
        host = slot.buffer[: self._disk_bytes(key)]
        ticket = self._engine.submit_read(self._volume, self._offsets[key], host.data_ptr(), host.numel(),
                                          native.nvme_ds.ACTIVATION)
        return Fetch(left, host, slot, ticket)

    def fill(self, gather: Gather, handle: Fetch, slot: Slot) -> Tensor:
        if handle.slot is not None:
            with self._exchange.tracing.waiting("SSD read", self.name(gather)):
                self._engine.wait(handle.ticket)
            self._sums.verify(gather.saved, handle.host, self._offsets[gather.saved])
        ranges = handle.left.ranges
        if ranges:
            self._lanes.wait("h2d", handle.left.copied)
            with self._lanes.work("h2d", self.name(gather), _sum(ranges)):
                for begin, end in ranges:
                    slot.buffer[begin:end].copy_(handle.host[begin:end], non_blocking=True)
        return slot.buffer

    def done(self, gather: Gather, handle: Fetch) -> None:
        if handle.slot is not None:
            handle.slot.pool.release(handle.slot, Event())

    # --- how ----------------------------------------------------------------------------------------------------

    def _begin(self, group: Group, micro_batch: int) -> Leaving:
        key, slot = (group.block, micro_batch, group.what), None
        if group.tier == SSD:
            slot = self._staging_out[group.is_inner].acquire("SSD write", _label(key))
        host = slot.buffer[: self._disk_bytes(key)] if slot else self._in_dram[key]
        return Leaving(group, key, host, slot)

    def _copy_out(self, leaving: Leaving, name: str, tensors: list[Tensor]) -> None:
        begin = leaving.used_bytes
        parts, num_bytes = lay_out_parts(tensors, begin)
        if num_bytes > next(saved.num_bytes for saved in leaving.group.members if saved.name == name):
            raise _too_large(leaving.group, name, tensors[0])
        self._lanes.wait("d2h", self._lanes.record("compute"))
        with self._lanes.work("d2h", _label(leaving.key), num_bytes):
            for part, tensor in zip(parts, tensors, strict=True):
                flat(part_of(leaving.host, part)).copy_(flat(tensor), non_blocking=True)
        leaving.parts[name] = parts
        leaving.ranges.append((begin, begin + num_bytes))
        leaving.tensors += tensors

    def _send(self, leaving: Leaving) -> Event:
        """Nothing more comes. Returns when all of it is copied; the GPU's memory must not be reused
        before."""
        copied = self._lanes.record("d2h")
        self._parts[leaving.key] = leaving.parts
        left = Left(leaving.ranges, copied, written=leaving.slot is None)
        self._announce(leaving.key, left)
        if leaving.slot is not None:
            self._write_out(leaving, left)
        return copied

    def _announce(self, key: Key, left: Left) -> None:
        with self._exchange.lock:
            self._left[key] = left
            self._changed.notify_all()

    def _wait_copied(self, copied: Event) -> None:
        with self._exchange.tracing.waiting("copy out"):
            copied.synchronize()

    def _write_out(self, leaving: Leaving, left: Left) -> None:
        key, host = leaving.key, leaving.host

        def submit() -> None:
            self._sums.record(key, host)
            ticket = self._engine.submit_write(self._volume, self._offsets[key], host.data_ptr(), host.numel(),
                                               native.nvme_ds.ACTIVATION)
            self._writes.when(lambda: self._engine.wait(ticket), lambda: self._wrote(left, leaving.slot))

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
        return [((group.block, micro_batch, group.what), group.num_bytes) for group in self._plan.groups if group.tier == tier
                for micro_batch in range(self._plan.work.num_micro)]

    def _disk_bytes(self, key: Key) -> int:
        return align_up(self._groups[key[0], key[2]].num_bytes, PAGE_BYTES)

    def _take_dram(self, arena: Arena) -> dict[Key, Tensor]:
        return {key: arena.take(num_bytes) for key, num_bytes in self._keys_on(DRAM)}

    def _lay_out_volume(self) -> dict[Key, int]:
        offsets, cursor = {}, 0
        for key, num_bytes in self._keys_on(SSD):
            offsets[key], cursor = cursor, cursor + align_up(num_bytes, PAGE_BYTES)
        return offsets

    def _make_pools(self, arena: Arena, device: torch.device) -> None:
        """Make the pools of slots, by whether they are for inner activations."""
        self._slots, self._staging_out, self._staging_in = ({}, {}, {})
        for inner in (False, True):
            count, num_bytes = self._plan.return_slots(inner)
            buffers = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(count)]
            self._slots[inner] = SlotPool(self._exchange, buffers)
            count, num_bytes = self._plan.staging_slots(inner)
            for staging in (self._staging_out, self._staging_in):
                staging[inner] = SlotPool(self._exchange, [arena.take(align_up(num_bytes, PAGE_BYTES)) for _ in range(count)])


def _too_large(group: Group, name: str, hidden: Tensor) -> RatelError:
    assert not group.is_inner, f"{name} of block {group.block} is larger than the plan has room for"
    return RatelError(f"block {group.block} is given hidden states of more bytes than the first block ({hidden.dtype} "
                      f"{tuple(hidden.shape)})", field="checkpoint_tier", value=group.tier,
                      remedy="Use --checkpoint-tier gpu")


def _is_inner(key: Key) -> bool:
    return key[2] != INPUT


def _label(key: Key) -> str:
    block, micro_batch, _ = key
    return f"inside {block}.{micro_batch}" if _is_inner(key) else f"checkpoint {block}.{micro_batch}"


def _sum(ranges: list[tuple[int, int]]) -> int:
    return sum(end - begin for begin, end in ranges)
