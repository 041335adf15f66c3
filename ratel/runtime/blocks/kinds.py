"""Which blocks are alike, which arguments are of one form, and whether a second run may leave
things out."""

from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from ratel.models.parts import TRIAL_ERRORS
from ratel.models.structure.inputs import BlockCall, leaves
from ratel.runtime.blocks.op_trace import OpTrace
from ratel.runtime.blocks.profile import inner_numbers
from ratel.runtime.blocks.replay import Diverged, Program, Recorder, poisoned, replay

Kind = tuple
"""Equal for blocks with the same submodules, settings and parameters."""

Form = tuple
"""Equal for arguments with the same shapes, strides and options."""

_POSITION = ("idx", "index", "layer_id", "layer_number")
"""Words in the name of a setting that says which block this is, not what kind of block."""


def kind_of(block: nn.Module) -> Kind:
    return tuple((name, type(child), _settings(child), _parameters(child)) for name, child in block.named_modules())


def form_of(hidden: Tensor, call: BlockCall) -> Form:
    return tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x if isinstance(x, (int, float, str)) else
                 type(x) for x in (hidden, *leaves((call.args, call.kwargs))))


def is_exact(trace: OpTrace, block: nn.Module, run: Callable[[], Tensor], seed: Callable[[], None]) -> bool:
    """Whether second runs with nothing kept and with everything kept let autograd save the bits
    that a full one does, and leave the random generators where it does. ``seed`` sets those;
    ``run`` runs ``block`` with a graph.

    What is not made holds NaN here, so that a kernel that reads it unseen, launched past PyTorch's
    dispatcher, shows.
    """
    numbers = inner_numbers(trace)
    try:
        seed()
        expected = _fingerprint(run, trace)
        if not _agrees(expected, block, run, seed, Program.make(trace, {}), {}):
            return False
        everything, kept = Program.make(trace, numbers), {}
        seed()
        recorder = Recorder(everything, kept.__setitem__)
        with saved_tensors_hooks(lambda tensor: None, lambda packed: packed), recorder:
            run()
        results = {name: kept[name] + recorder.extras[name] for name in numbers}
        return _agrees(expected, block, run, seed, everything, results)
    except torch.OutOfMemoryError:
        raise
    except (Diverged, *TRIAL_ERRORS):
        return False


def _agrees(expected: list[Tensor], block: nn.Module, run: Callable[[], Tensor], seed: Callable[[], None],
            program: Program, results: dict[str, list[Any]]) -> bool:
    seed()
    found = _fingerprint(lambda: replay(program, results, block, run, poisoned), program.trace)
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def _fingerprint(run: Callable[[], Tensor], trace: OpTrace) -> list[Tensor]:
    """Sums over the bits of what autograd saves, where all of them are set; then the states of the
    generators."""
    sums: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: sums.append(_bit_sum(tensor)), lambda packed: packed):
        device = run().device
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    if len(sums) != len(trace.has_all_bits):
        raise Diverged(f"{len(sums)} saved tensors in place of {len(trace.has_all_bits)}")
    return [*compress(sums, trace.has_all_bits), *states]


def _bit_sum(tensor: Tensor) -> Tensor:
    with _disable_current_modes():  # a hook runs inside the modes of the run that it watches
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        return (flat.view(torch.int32) if flat.numel() % 4 == 0 else flat).sum(dtype=torch.int64)


def _settings(module: nn.Module) -> tuple:
    return tuple(sorted((name, value) for name, value in vars(module).items() if isinstance(value, (int, float, str))
                        and not any(word in name for word in _POSITION)))


def _parameters(module: nn.Module) -> tuple:
    return tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters(recurse=False))
