"""The door to the native library: ctypes mirrors of csrc/abi.h, loaded on first use and checked."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_uint32, c_uint64
from functools import cache
from pathlib import Path
from types import SimpleNamespace

ABI_VERSION = 4
FELL_BACK = 1  # kFellBack
STALLED = -100_000  # kStalled of csrc/abi.h
LIBRARY_NAME = "libnvme_ds.so"
BUILD_COMMAND = "python -m nvme_ds.build"


class Failure(ctypes.Structure):
    _fields_ = [("error", c_int32), ("op", c_int32), ("offset", c_uint64), ("num_bytes", c_uint64),
                ("path", ctypes.c_char * 4096)]


class Counters(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in (
        "bytes_read", "bytes_written", "reads", "writes", "errors", "busy_ns", "fixed_ops", "queued", "in_flight",
        "max_in_flight")]


class Span(ctypes.Structure):
    _fields_ = [("begin_ns", c_int64), ("end_ns", c_int64), ("ticket", c_int64), ("volume", c_int64), ("offset", c_uint64),
                ("num_bytes", c_uint64), ("op", c_int32), ("priority", c_int32)]


class Faults(ctypes.Structure):
    _fields_ = [*((name, c_uint64) for name in (
        "seed", "max_delay_us", "fail_after_n", "fail_count", "flip_after_n", "flip_count", "torn_after_n", "torn_count",
        "stall_after_n")), *((name, c_int32) for name in (
            "fail_op", "fail_errno", "flip_op", "stall_op", "short_transfers", "direct_errno"))]


class EngineOptions(ctypes.Structure):
    _fields_ = [("backend", c_int32), ("queue_depth", c_uint32), ("num_threads", c_uint32), ("request_bytes", c_uint64),
                ("stall_timeout_ns", c_int64)]


class VolumeSpec(ctypes.Structure):
    _fields_ = [("num_files", c_uint32), ("devices", POINTER(c_int32)), ("fds", POINTER(c_int32)),
                ("paths", POINTER(c_char_p)), ("pattern_length", c_uint32), ("pattern", POINTER(c_uint32)),
                ("stripe_bytes", c_uint64), ("num_bytes", c_uint64), ("direct", c_int32)]


class ReferenceSpec(ctypes.Structure):
    _fields_ = [("fds", POINTER(c_int32)), ("num_fds", c_uint32), ("use_uring", c_int32), ("depth", c_uint32),
                ("request_bytes", c_uint64), ("region_bytes", c_uint64), ("num_requests", c_uint64),
                ("memory_bytes", c_uint64), ("writes_per_16", c_uint32)]


# name -> (result, arguments). Those of _SHORT never sleep, so they keep the GIL: getting it back
# can take 5 ms.
_LONG = {
    "engine_close": (c_int32, [c_int64, c_int64]),
    "engine_abandon": (c_int32, [c_int64]),
    "engine_destroy": (c_int32, [c_int64]),
    "device_add": (c_int32, [c_int64, c_double]),
    "volume_add": (c_int64, [c_int64, POINTER(VolumeSpec)]),
    "volume_close": (c_int32, [c_int64, c_int64]),
    "wait": (c_int32, [c_int64, c_int64, c_int64, POINTER(Failure)]),
    "buffer_register": (c_int32, [c_int64, c_uint64, c_uint64]),
    "buffer_unregister": (c_int32, [c_int64, c_uint64]),
    "watch": (c_int32, [c_int64, c_uint64]),
    "spans": (c_int64, [c_int64, c_int32, POINTER(Span), c_uint64, POINTER(c_uint64)]),
    "reference_io": (c_int64, [POINTER(ReferenceSpec)]),
}
_SHORT = {
    "abi_version": (c_int32, []),
    "uring_probe": (c_int32, [c_uint32]),
    "engine_create": (c_int64, [POINTER(EngineOptions)]),
    "submit": (c_int64, [c_int64, c_int64, c_int32, c_uint64, c_uint64, c_uint64, c_int32]),
    "submit_sync": (c_int64, [c_int64, c_int64]),
    "done": (c_int32, [c_int64, c_int64]),
    "num_tickets": (c_int64, [c_int64]),
    "busy_ns": (c_int64, [c_int64]),
    "buffer_error": (c_int32, [c_int64]),
    "device_counters": (c_int32, [c_int64, c_int32, POINTER(Counters)]),
    "counters_reset": (c_int32, [c_int64]),
    "inject": (c_int32, [c_int64, POINTER(Faults)]),
}


def library_path() -> Path:
    """``NVME_DS_LIBRARY`` names another build, one with a sanitizer for example."""
    override = os.environ.get("NVME_DS_LIBRARY")
    return Path(override) if override else Path(__file__).parent / "_lib" / LIBRARY_NAME


def _bind(library: ctypes.CDLL, table: dict) -> dict:
    bound = {}
    for name, (result, arguments) in table.items():
        function = getattr(library, f"nds_{name}")
        function.restype, function.argtypes = result, arguments
        bound[name] = function
    return bound


@cache
def library() -> SimpleNamespace:
    """The native functions, named without their prefix. ImportError when the library is missing or
    of another version."""
    path = library_path()
    if not path.exists():
        raise ImportError(f"the native I/O engine is not built: {path} is missing. Run: {BUILD_COMMAND}")
    try:
        releasing, holding = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    except OSError as error:
        raise ImportError(f"the native I/O engine cannot be loaded: {error}. Rebuild it: {BUILD_COMMAND}") from error
    found = releasing.nds_abi_version()
    if found != ABI_VERSION:
        raise ImportError(f"{path} has interface {found}, not {ABI_VERSION}. Rebuild it: {BUILD_COMMAND}")
    functions = _bind(releasing, _LONG) | _bind(holding, _SHORT)
    return SimpleNamespace(**functions, poll=_bind(holding, {"wait": _LONG["wait"]})["wait"])
