"""The GPU's CUDA context, made from the moment a command starts, while Python imports its modules
on another core; and memory that is pinned in it before PyTorch is there.

A process has one primary context per device, whoever asks for it first, so PyTorch finds this one
and nothing has to be handed over. The driver is called without the interpreter's lock. What fails
here fails in the same way when PyTorch asks, and is reported there.
"""

import ctypes
import os
import sys
import threading

from ratel.trace import phases

_DRIVER = "libcuda.so.1"
_PORTABLE_AND_MAPPED = 1 | 2
"""What the runtime library asks of the driver where it is not told otherwise."""

_current: "_Context | None" = None


class _Context:
    def __init__(self) -> None:
        self._driver: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        # No daemon: the interpreter must not end beside a driver that is starting.
        self._thread = threading.Thread(target=self._make, name="ratel-context")
        self._thread.start()

    def _make(self) -> None:
        begin_s, device = phases.age_s(), ctypes.c_int()
        try:
            driver = ctypes.CDLL(_DRIVER)
        except OSError:
            return
        if (driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
                and driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._handle), device) == 0):
            self._driver = driver
            phases.note("context of the GPU", begin_s)

    def do(self, function: str, *arguments: object) -> bool:
        """Call the driver from this thread, once there is a context; whether that did it."""
        self._thread.join()
        driver = self._driver
        return driver is not None and driver.cuCtxSetCurrent(self._handle) == 0 and getattr(driver, function)(*arguments) == 0


def begin() -> None:
    """Make the CUDA context in the background, on the first device. Nothing is done where PyTorch
    is there already: another one may be chosen in it."""
    global _current
    if "torch" not in sys.modules and _current is None:
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # PyTorch's own choice, which the driver reads once
        _current = _Context()


def pin(address: int, num_bytes: int) -> bool:
    """Whether the memory is pinned now, as ``cudaHostRegister`` would do it. Not where `begin` has
    made no context."""
    return _current is not None and _current.do("cuMemHostRegister_v2", ctypes.c_void_p(address),
                                                ctypes.c_size_t(num_bytes), _PORTABLE_AND_MAPPED)


def unpin(address: int) -> None:
    """Undo it; the runtime's ``cudaHostUnregister`` does as well."""
    assert _current is not None, "nothing was pinned"
    _current.do("cuMemHostUnregister", ctypes.c_void_p(address))
