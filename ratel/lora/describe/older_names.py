"""Targets of models with experts, under the names that they had before transformers 5 fused the
experts.

peft takes `w1` of Mixtral, or `gate_proj` of Qwen3-MoE, for the fused parameter that it is a part
of now, and `all-linear` for what was a Linear then: experts and routers are among the targets. gate
and up are one parameter: an adapter for both is one of twice the rank and twice alpha.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ratel.lora.describe.config import ALL_LINEAR, LoraConfig
from ratel.lora.describe.layers import PREFIX, AdaptedLayer
from ratel.lora.describe.outline import ModelOutline


@dataclass(frozen=True, kw_only=True)
class OlderNames:
    """``parameters``: an older name -> the parameter that it is, or is a part of, now."""

    parameters: Mapping[str, str]
    fused: tuple[str, ...]

    @property
    def fused_into(self) -> str:
        return self.parameters[self.fused[0]]


_MIXTRAL = OlderNames(fused=("w1", "w3"), parameters={"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj",
                                                      "w2": "down_proj"})
_QWEN = OlderNames(fused=("gate_proj", "up_proj"), parameters={"gate": "gate.weight", "gate_proj": "gate_up_proj",
                                                               "up_proj": "gate_up_proj", "down_proj": "down_proj"})
_FAMILIES = {"mixtral": _MIXTRAL, "qwen2_moe": _QWEN}


def older_names_of(model_type: str | None) -> OlderNames | None:
    """transformers' own table says which models' experts were stored as Mixtral's or as
    Qwen2-MoE's."""
    if model_type is None:
        return None
    from transformers import conversion_mapping

    table = {**getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    return _FAMILIES.get(table.get(model_type, ""))


def with_present_names(config: LoraConfig, outline: ModelOutline, linear: Iterable[str],
                       matches: Mapping[str, bool]) -> LoraConfig:
    """The same adapter with names that the model has now. ``linear``: what `all-linear` means;
    ``matches``: for a pattern, which of `possible_names` it fits. Raises RatelError for one half of
    what is fused."""
    older = older_names_of(outline.model_type)
    if older is None or config.targets is None:
        return config
    targets = set(_listed(config, outline, older, linear, matches))
    if not targets:
        return config
    found = {target: name for target in targets for name in older.parameters if target == name or target.endswith(f".{name}")}
    config = replace(config, targets=tuple(sorted(targets - found.keys())),
                     parameters=tuple(sorted({*config.parameters, *(older.parameters[name] for name in found.values())})))
    halves = {name for name in found.values() if name in older.fused}
    if halves and len(halves) < len(older.fused):
        both = " and ".join(older.fused)
        config.refuse("targets", f"has one of {both}, which are one parameter in the model ({older.fused_into})",
                      ", ".join(sorted(halves)), "Give both, or neither")
    if halves:
        pattern = rf".*\.{re.escape(older.fused_into)}"
        config = replace(config, rank_pattern={**config.rank_pattern, pattern: len(older.fused) * config.rank},
                         alpha_pattern={**config.alpha_pattern, pattern: len(older.fused) * config.alpha})
    return config


def possible_names(outline: ModelOutline) -> dict[str, str]:
    """Names that a regular expression may mean, with the last parts that stand for them: modules,
    parameters, and the experts' matrices as they were called before."""
    names = [module.name for module in outline.modules]
    names += [f"{module.name}.{parameter}" for module in outline.modules for parameter in module.parameters]
    found = {name: name.rpartition(".")[2] for name in names}
    older = older_names_of(outline.model_type)
    for before, now in (older.parameters if older else {}).items():
        found |= {f"{module.name}.{before}": before for module in outline.modules if now in module.parameters}
    return found


def _listed(config: LoraConfig, outline: ModelOutline, older: OlderNames, linear: Iterable[str],
            matches: Mapping[str, bool]) -> Iterable[str]:
    if config.targets == ALL_LINEAR:
        return {name.rpartition(".")[2] for name in linear} | older.parameters.keys()
    if isinstance(config.targets, str):
        return {leaf for name, leaf in possible_names(outline).items() if matches[name]}
    return config.targets or ()


# --- the tensors of single experts -----------------------------------------------------------------------------------
#
# peft stores an adapter for each expert alone with transformers before 5. gate and up of an expert
# become one: A of both, one above the other, and B of both, as the blocks of a diagonal. The expert
# is slowest in A and fastest in B.

_BLOCK, _BLOCK_NOW = ".block_sparse_moe.", ".mlp."
"""What holds the experts of Mixtral, in older versions of transformers and now."""


def with_fused(names: Iterable[str], layers: Iterable[AdaptedLayer], outline: ModelOutline,
               read: Callable[[str], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Names as the model has them -> how to get the tensor. ``names``: those in a file. Experts of
    which one has no adapter stay under their own names. Raises RuntimeError where the parts of one
    tensor do not fit together."""
    has_older_block = any(_BLOCK in f".{module.name}." for module in outline.modules)
    sources = {name if has_older_block else name.replace(_BLOCK, _BLOCK_NOW): name for name in names}
    found: dict[str, Callable[[], Tensor]] = {name: lambda source=source: read(source) for name, source in sources.items()}
    for layer in layers:
        parts = _parts(layer, outline)
        for letter, name, fuse in (("A", layer.a_name, _fused_a), ("B", layer.b_name, _fused_b)):
            single = [[f"{part}.lora_{letter}.weight" for part in parts_of_one] for parts_of_one in parts]
            if single and all(part in sources for parts_of_one in single for part in parts_of_one):
                chosen = [[found.pop(part) for part in parts_of_one] for parts_of_one in single]
                found[name] = lambda chosen=chosen, fuse=fuse: fuse([[get() for get in one] for one in chosen])
    return found


def _parts(layer: AdaptedLayer, outline: ModelOutline) -> list[list[str]]:
    """For each expert, what its matrices were called before they were fused; none for a layer that
    never was."""
    older = older_names_of(outline.model_type)
    if older is None or not layer.is_stack:
        return []
    before = [name for name, now in older.parameters.items() if now == layer.parameter]
    return [[f"{PREFIX}{layer.name}.{expert}.{name}" for name in before] for expert in range(layer.experts)] if before else []


def _fused_a(experts: list[list[Tensor]]) -> Tensor:
    return torch.cat([part for parts in experts for part in parts])


def _fused_b(experts: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.block_diag(*parts) for parts in experts], dim=2).flatten(1)
