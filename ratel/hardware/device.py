"""Which device computes, and in which type."""

import logging
import warnings

import torch

from ratel.errors import RatelError
from ratel.hardware.host import describe_cpu

log = logging.getLogger(__name__)


def require_device(device: "str | torch.device" = "auto") -> torch.device:
    """The device asked for, or why it cannot be had. ``auto`` takes a CUDA device where there is
    one."""
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise RatelError("not a device", field="--device", value=device, remedy="Use auto, cuda or cpu") from error
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type != "cuda":
        raise RatelError("not supported", field="--device", value=device, remedy="Use auto, cuda or cpu")
    return _require_cuda(wanted)


def _require_cuda(wanted: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        why = why_no_cuda() or "PyTorch finds no usable device"
        raise RatelError(f"there is no CUDA device: {why}", field="--device", value=wanted,
                         remedy="Use --device cpu, or see `ratel doctor`")
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise RatelError(f"this machine has {torch.cuda.device_count()} CUDA device(s), counted from 0",
                         field="--device", value=wanted)
    return torch.device("cuda", index)


def choose_dtype(device: torch.device) -> str:
    """``bf16`` where it is the faster one. Without bf16 instructions a processor emulates it, tens
    of times slower than fp32 on AVX2."""
    has_bf16 = {"avx512_bf16", "amx_bf16"} & set(describe_cpu()["isa"])
    return "bf16" if device.type == "cuda" or has_bf16 else "fp32"


def avoid_fragmentation() -> None:
    """Let PyTorch's allocator grow its segments instead of adding others that nothing fits into.

    With 22 of 24 GiB in use, 2 GiB lay in pieces too small for 256 MiB. Where it cannot be set
    (older versions, platforms without virtual memory management) the plan's slack has to do.
    """
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # its older name warns from torch 2.10 on
    setter = setter or getattr(torch.cuda.memory, "_set_allocator_settings", None)
    try:
        if setter is not None:
            setter("expandable_segments:True")
    except (RuntimeError, ValueError) as error:
        log.info("the allocator keeps its segments: %s", error)


def why_no_cuda() -> str | None:
    """Why CUDA cannot be used; None where it works."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    return f"this PyTorch is built for CUDA {torch.version.cuda} but finds no device or no driver"


def quiet_first_product() -> None:
    """Autograd runs on a thread of its own, whose first product finds no CUDA context there and
    takes the device's: nothing that a user could do about, so PyTorch's warning about it is not
    shown."""
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")
