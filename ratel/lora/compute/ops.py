"""The adapter's operations as PyTorch's dispatcher knows them, each by the Triton kernel or by the
reference.

They are operations of a library (``ratel_lora``) so that whoever traces, compiles or plans a block
sees them: a kernel that is launched past the dispatcher reads unseen. All are pure: the same
arguments give the same bits, and none writes to its arguments.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.lora.compute import reference

CHOICES = ("auto", "on", "off")
log = logging.getLogger(__name__)
_LAUNCH = "ratel.lora.compute.launch"
_library = torch.library.Library("ratel_lora", "DEF")
_choice = "auto"
_failed = False


def use_kernels(choice: str) -> None:
    """``auto``: Triton on an NVIDIA GPU where it can be imported and compiles. ``on``: or an error.
    ``off``: plain PyTorch."""
    global _choice, _failed
    if choice not in CHOICES:
        raise RatelError("is not a way to run an adapter's operations", field="kernels", value=choice,
                         remedy=f"Choose one of {', '.join(CHOICES)}")
    _choice, _failed = choice, False


def kernels_serve(device: torch.device) -> bool:
    return _choice != "off" and not _failed and _triton_is_there(device.type)


@functools.cache
def _triton_is_there(device_type: str) -> bool:
    if device_type != "cuda" or torch.version.cuda is None:
        return False
    try:
        import triton  # noqa: F401
    except ImportError as error:
        log.warning("triton cannot be imported (%s): adapters are computed by plain PyTorch, which passes over memory more often", error)
        return False
    return True


def run(name: str, *args: Any) -> Any:
    """By the kernel if there is one for this; what Triton cannot compile here is said once and not
    tried again."""
    global _failed
    x = args[2] if name == "input_grad" else args[0]
    if kernels_serve(x.device):
        launch = sys.modules.get(_LAUNCH) or importlib.import_module(_LAUNCH)
        try:
            if launch.can(x):
                return getattr(launch, name)(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if _choice == "on":
                raise
            _failed = True
            log.warning("a Triton kernel failed (%s: %s): adapters are computed by plain PyTorch from here on",
                        type(error).__name__, str(error).partition("\n")[0])
    elif _choice == "on":
        raise RatelError("Triton cannot compute adapters here", field="kernels", value=f"on, {x.device}",
                         remedy="Use an NVIDIA GPU and install the package triton, or leave it at auto")
    return getattr(reference, name)(*args)


def is_watched(x: Tensor) -> bool:
    """Whether anybody traces, compiles or counts operations. If nobody does, `run` may be called
    itself: to go through the dispatcher to Python takes longer than a launch."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def _define(signature: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    name = signature.partition("(")[0]
    _library.define(signature)
    _library.impl(name, functools.partial(run, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ratel_lora::{name}", fake, lib=_library)
    return getattr(torch.ops.ratel_lora, name).default


dropped = _define("dropped(Tensor x, Tensor? draw, float p, int index) -> Tensor",
                  lambda x, draw, p, index: torch.empty_like(x))
down = _define("down(Tensor x, Tensor a, Tensor? draw, float p) -> Tensor",
               lambda x, a, draw, p: x.new_empty(x.shape[0], a.shape[0]))
linear = _define("linear(Tensor x, Tensor w, Tensor? bias, Tensor s, Tensor b, float scale) -> Tensor",
                 lambda x, w, bias, s, b, scale: x.new_empty(x.shape[0], w.shape[0]))
up_grads = _define("up_grads(Tensor dy, Tensor b, Tensor s, float scale) -> (Tensor, Tensor)",
                   lambda dy, b, s, scale: (torch.empty_like(s, memory_format=torch.contiguous_format), torch.empty_like(b)))
a_grads = _define("a_grads(Tensor x, Tensor ds, Tensor a, Tensor? draw, float p, ScalarType? dtype=None) -> Tensor",
                  lambda x, ds, a, draw, p, dtype=None: torch.empty_like(a, dtype=dtype, memory_format=torch.contiguous_format))
input_grad = _define("input_grad(Tensor[] dys, Tensor[] ws, Tensor ds, Tensor a, Tensor? draw, float p) -> Tensor",
                     lambda dys, ws, ds, a, draw, p: ds.new_empty(ds.shape[0], a.shape[1]))
