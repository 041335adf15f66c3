"""The GPU's CUDA context, made from the moment a command starts, while Python imports its modules on another core.

A process has one primary context per device, whoever asks for it first, so PyTorch finds this one and nothing has to be handed
over. The driver is called without the interpreter's lock. What fails here fails in the same way when PyTorch asks, and is
reported there.
"""

import ctypes
import os
import sys
import threading

from ratel import startup

_DRIVER = "libcuda.so.1"


def begin() -> None:
    """In the background, on the first device. Nothing where PyTorch is there already: another one may be chosen in it."""
    if "torch" in sys.modules:
        return
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # PyTorch's own choice, which the driver reads once
    # No daemon: the interpreter must not end beside a driver that is starting.
    threading.Thread(target=_make, name="ratel-context").start()


def _make() -> None:
    begin_s = startup.age_s()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return
    if (driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
            and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0):
        startup.note("context of the GPU", begin_s)
