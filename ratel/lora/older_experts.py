"""Adapters for each expert alone, as peft stores them with transformers before 5, as adapters of
the fused parameters.

gate and up of an expert become one: A of both, one above the other, and B of both, as the blocks of
a diagonal. The expert is slowest in A and fastest in B.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ratel.lora.layers import PREFIX, AdaptedLayer
from ratel.lora.older_names import older_names_of
from ratel.lora.targets import Targets

_BLOCK, _BLOCK_NOW = ".block_sparse_moe.", ".mlp."
"""Of Mixtral, what holds the experts."""

Read = Callable[[str], Tensor]


def with_fused(names: Mapping[str, tuple[int, ...]], targets: Targets, read: Read) -> dict[str, Callable[[], Tensor]]:
    """Names as the model has them -> how to get the tensor. ``names``: those in a file. Experts of
    which one has no adapter stay under their own names. Raises RuntimeError where the parts of one
    tensor do not fit together."""
    sources = {_present(name, targets): name for name in names}
    found: dict[str, Callable[[], Tensor]] = {name: lambda source=source: read(source) for name, source in sources.items()}
    for layer in targets.layers:
        parts = _parts(layer, targets)
        for letter, name, fuse in (("A", layer.a_name, _fused_a), ("B", layer.b_name, _fused_b)):
            single = [[f"{part}.lora_{letter}.weight" for part in parts_of_one] for parts_of_one in parts]
            if single and all(part in sources for parts_of_one in single for part in parts_of_one):
                chosen = [[found.pop(part) for part in parts_of_one] for parts_of_one in single]
                found[name] = lambda chosen=chosen, fuse=fuse: fuse([[get() for get in one] for one in chosen])
    return found


def _present(name: str, targets: Targets) -> str:
    is_there = any(_BLOCK in f".{module.name}." for module in targets.outline.modules)
    return name if is_there else name.replace(_BLOCK, _BLOCK_NOW)


def _parts(layer: AdaptedLayer, targets: Targets) -> list[list[str]]:
    """Of each expert, what its matrices were called before they were fused; none for a layer that
    never was."""
    older = older_names_of(targets.outline.model_type)
    before = [name for name, now in older.parameters.items() if now == layer.parameter] if older and layer.is_stack else []
    return [[f"{PREFIX}{layer.name}.{expert}.{name}" for name in before] for expert in range(layer.experts)] if before else []


def _fused_a(experts: list[list[Tensor]]) -> Tensor:
    return torch.cat([part for parts in experts for part in parts])


def _fused_b(experts: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.block_diag(*parts) for parts in experts], dim=2).flatten(1)
