"""Whether a session would compute with the state that `from_pretrained` loads: tensor by tensor,
from outside."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ratel.models.checkpoints.weights import round_half_up, view
from ratel.models.load import load
from ratel.models.parts import Parts


def compare_loading(directory: "str | Path", dtype: torch.dtype = torch.float32) -> list[str]:
    """Every difference between the two, each in a line; none if they are equal. For models that fit
    in memory twice.

    Compared are the names of the state dict, values and dtypes of parameters and of all buffers,
    extra state, and which parameters are one. Raises RatelError for a directory that Ratel refuses.
    """
    parts = load(directory, dtype=dtype, device=torch.device("cpu"))
    try:
        parts.stored.check_source()
        theirs = type(parts.module).from_pretrained(directory, dtype=dtype, local_files_only=True)
        return [*_compare(_parameters_of(parts), dict(theirs.named_parameters(remove_duplicate=False)), "parameter"),
                *_compare(dict(parts.module.named_buffers()), dict(theirs.named_buffers()), "buffer"),
                *_compare_state(parts, theirs), *_compare_ties(parts.module, theirs)]
    finally:
        parts.close()


def _parameters_of(parts: Parts) -> dict[str, Tensor]:
    """The parameters as the model computes with them, under every name they have."""
    found: dict[str, Tensor] = {}
    current = dict(parts.module.named_parameters(remove_duplicate=False))
    for unit in (*parts.spec.units, *([parts.unused] if parts.unused else [])):
        master = torch.empty(unit.num_elements)
        parts.stored.read_unit(unit, master)
        for param in unit.params:
            value = view(master, param)
            if current[param.name].dtype is torch.bfloat16:
                value = round_half_up(value.contiguous())
            found |= dict.fromkeys((param.name, *param.aliases), value)
    return found


def _compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], kind: str) -> list[str]:
    found = [f"{kind} {name} is in one of them only" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = ours[name].detach(), theirs[name].detach()
        if one.dtype is not other.dtype or one.shape != other.shape:
            found.append(f"{kind} {name} is {one.dtype} {list(one.shape)}, in transformers {other.dtype} {list(other.shape)}")
        elif not torch.equal(one, other):
            found.append(f"{kind} {name} differs in {int((one != other).sum()):,} of {one.numel():,} elements")
    return found


def _compare_state(parts: Parts, theirs: nn.Module) -> list[str]:
    """Names of all that is in the state dict, and the values that are neither parameters nor
    buffers."""
    ours, other = parts.stored.other_state(), theirs.state_dict()
    tensors = {name for name, _ in [*theirs.named_parameters(remove_duplicate=False), *theirs.named_buffers(remove_duplicate=False)]}
    extra = {name: value for name, value in other.items() if name not in tensors}
    return [f"extra state {name} differs" for name, value in extra.items() if not _same(ours.get(name), value)]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


def _compare_ties(ours: nn.Module, theirs: nn.Module) -> list[str]:
    one, other = _ties(ours), _ties(theirs)
    return [f"{', '.join(sorted(names))} are one tensor in {'Ratel' if names in one else 'transformers'} only"
            for names in one ^ other]


def _ties(module: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = defaultdict(set)
    for name, param in module.named_parameters(remove_duplicate=False):
        names[id(param)].add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}
