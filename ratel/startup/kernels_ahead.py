"""The GPU's libraries and kernels that every first step begins with, loaded while Python imports
transformers on another core.

cuBLAS and cuDNN open their libraries, and CUDA loads kernels, when they are first called, for which
the interpreter's lock is not held. A block no larger than a tile calls them ahead. Nothing of it
stays but what has been loaded: no memory of PyTorch's, no state of a random generator. What fails
here fails again where it counts, and is reported there.
"""

import logging
import threading

import torch
import torch.nn.functional as F

from ratel import interrupt
from ratel.hardware.device import avoid_fragmentation, quiet_first_product
from ratel.trace import phases

log = logging.getLogger(__name__)

_ROWS, _POSITIONS, _CHANNELS, _HEADS = 1, 128, 256, 2

_thread: threading.Thread | None = None


def begin(device: str) -> None:
    """Call what a first step calls, in the background. ``wait`` must follow before anybody measures
    the GPU's memory or asks for other kernels."""
    global _thread
    # No daemon: the interpreter must not end beside a library that is opening.
    _thread = threading.Thread(target=_load, args=(torch.device(device),), name="ratel-kernels")
    _thread.start()


def wait() -> None:
    """Wait until what ``begin`` began is over."""
    global _thread
    thread, _thread = _thread, None
    if thread is not None:
        interrupt.join(thread)


def _load(device: torch.device) -> None:
    begin_s = phases.age_s()
    try:
        if device.type == "cuda":
            avoid_fragmentation()  # before the allocator has its first segment
            quiet_first_product()
        _use(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch without CUDA
        log.info("kernels are not loaded ahead: %s", error)
    else:
        phases.note("kernels of the GPU", begin_s)


def _use(device: torch.device) -> None:
    """Forward and backward of what most transformers are made of, in bf16. Nothing here makes
    Python import anything: beside the imports of the main thread, each could wait for the other."""
    hidden = torch.ones(_ROWS, _POSITIONS, _CHANNELS, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.ones(_CHANNELS, _CHANNELS, dtype=torch.bfloat16, device=device, requires_grad=True)
    wide = hidden.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)
    heads = F.linear(normed, weight).view(_ROWS, _POSITIONS, _HEADS, -1).transpose(1, 2)
    turned = torch.cat((-heads[..., 1:], heads[..., :1]), dim=-1) * heads.cos() + heads * heads.sin()
    mixed = F.scaled_dot_product_attention(turned, heads, heads, is_causal=True).transpose(1, 2).reshape(hidden.shape)
    output = hidden + F.silu(F.linear(mixed, weight)) * mixed
    logits = F.linear(output, weight).float().view(-1, _CHANNELS)
    targets = torch.zeros(len(logits), dtype=torch.long, device=device)
    grads = torch.autograd.grad(F.cross_entropy(logits, targets), (hidden, weight))
    torch.embedding(weight, targets)
    torch.linalg.vector_norm(grads[1], dtype=torch.float32)
