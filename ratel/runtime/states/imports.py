"""Weights from the model's source to their tiers, and zeros for what training begins with."""

import torch

from ratel import interrupt
from ratel.memory.jobs import crew
from ratel.models import Parts
from ratel.models.safetensors.stored_bits import StoredBits
from ratel.planner.shape import ModelSpec, UnitSpec
from ratel.planner.slot_layout import pieces
from ratel.store.planes import Store
from ratel.store.transfer import PIECE_ELEMENTS, UnitTransfer

THREADS = 8
"""Threads that read files, one piece of 8 MiB each: as many as a disk needs requests in flight, and
beside each other they copy faster out of the page cache, add up checksums and write to SSDs faster
than any disk reads."""

Stream = tuple[UnitSpec, StoredBits]


def import_weights(parts: Parts, spec: ModelSpec, store: Store, transfer: UnitTransfer) -> None:
    """All planes of new storage. What is bf16 in files goes straight to its tier, in the order of
    the files; any other unit is made in memory, one at a time."""
    streams = [(unit, bits) for unit in spec.units if (bits := parts.stored.bits(unit)) is not None]
    streamed = {unit.index for unit, _ in streams}
    _stream(streams, transfer)
    _convert(parts, [unit for unit in spec.units if unit.index not in streamed], transfer)
    for unit in spec.units:
        for name in ("lo", "m", "v") if unit.index in streamed else ("m", "v"):
            if store.has(unit.index, name):
                transfer.start_at_zero(unit, name)


def import_frozen(parts: Parts, spec: ModelSpec, store: Store, transfer: UnitTransfer) -> None:
    """What is frozen alone: the rest comes out of a state."""
    units = [unit for unit in spec.units if unit.num_elements > unit.num_trainable]
    streams = [(unit, bits) for unit in units if (bits := parts.stored.bits(unit)) is not None]
    for unit, _ in streams:
        if store.has(unit.index, "lo"):
            transfer.start_at_zero(unit, "lo")
    _stream(streams, transfer, frozen=True)
    streamed = {unit.index for unit, _ in streams}
    _convert(parts, [unit for unit in units if unit.index not in streamed], transfer, frozen=True)


def _stream(streams: list[Stream], transfer: UnitTransfer, *, frozen: bool = False) -> None:
    jobs = [(unit, bits, begin, end) for unit, bits in streams
            for begin, end in pieces(unit, unit.num_elements, PIECE_ELEMENTS) if begin >= _first(unit, frozen)]
    with crew(THREADS, "ratel-import") as threads:
        for running in [threads.submit(_read, transfer, *job) for job in sorted(jobs, key=_place)]:
            running.result()


def _place(job: tuple[UnitSpec, StoredBits, int, int]) -> tuple[str, int]:
    _, bits, begin, end = job
    return bits.place(begin, end)


def _read(transfer: UnitTransfer, unit: UnitSpec, bits: StoredBits, begin: int, end: int) -> None:
    transfer.fill_upper_half(unit, begin, end, lambda target: bits.read(begin, target))


def _first(unit: UnitSpec, frozen: bool) -> int:
    return unit.num_trainable if frozen else 0


def _convert(parts: Parts, units: list[UnitSpec], transfer: UnitTransfer, *, frozen: bool = False) -> None:
    master = torch.empty(max((unit.num_elements for unit in units), default=0), dtype=torch.float32)
    for unit in units:
        interrupt.check()
        part = master[: unit.num_elements]
        parts.stored.read_unit(unit.index, part)
        transfer.write_weights(unit, part, _first(unit, frozen))
