"""What the engine's queues did: counters, and spans on one clock."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import NamedTuple

from nvme_ds import native
from nvme_ds.errors import OPS, checked


_TOTALLED = ("bytes_read", "bytes_written", "reads", "writes", "errors", "fixed_ops", "queued", "in_flight")


class IoSpan(NamedTuple):
    """A stretch of a transfer on one directory. Times are those of ``time.perf_counter`` on Linux
    (CLOCK_MONOTONIC); what a bandwidth cap holds back has begun. ``volume`` is a handle; ``offset``
    is in that volume."""

    directory: str
    op: str
    volume: int
    offset: int
    num_bytes: int
    priority: int
    begin_s: float
    end_s: float


def _device_stats(functions: ctypes.CDLL, handle: int, index: int) -> dict:
    counters = native.Counters()
    functions.device_counters(handle, index, ctypes.byref(counters))
    entry = {name: getattr(counters, name) for name, _ in counters._fields_}
    entry["busy_s"] = entry.pop("busy_ns") / 1e9
    return entry


def counted(functions: ctypes.CDLL, handle: int, devices: Mapping[str, int]) -> dict:
    """The counters of each directory, and their totals."""
    directories = {folder: _device_stats(functions, handle, index) for folder, index in devices.items()}
    totals = {key: sum(entry[key] for entry in directories.values()) for key in _TOTALLED}
    totals["busy_s"] = max(0, functions.busy_ns(handle)) / 1e9
    totals["tickets"] = max(0, functions.num_tickets(handle))
    return {**totals, "directories": directories}


def recorded_spans(functions: ctypes.CDLL, handle: int, devices: Mapping[str, int], capacity: int) -> tuple[list[IoSpan], int]:
    """What every directory has recorded, and how many requests found no room."""
    found, lost, count = [], 0, ctypes.c_uint64()
    buffer = (native.Span * max(capacity, 1))()
    for folder, index in devices.items():
        number = functions.spans(handle, index, buffer, capacity, ctypes.byref(count))
        lost += count.value
        found += [IoSpan(folder, OPS[s.op], s.volume, s.offset, s.num_bytes, s.priority, s.begin_ns / 1e9, s.end_ns / 1e9)
                  for s in buffer[:min(checked(number, "reading spans"), capacity)]]
    return found, lost
