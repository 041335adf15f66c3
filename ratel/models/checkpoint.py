"""Weights in a Hugging Face directory: safetensors files, read unit by unit.

Checkpoints differ from modules: names with or without the base model's prefix, tied weights written once, experts
written one by one that the module holds in one tensor. transformers has a table of these conversions, and it is used
here for one parameter at a time: on the meta device to check everything from the headers, on tensors to read.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models.safetensors_files import StoredTensor, TensorFiles, model_files
from ratel.models.stored_bits import Run, StoredBits
from ratel.models.weights import view
from ratel.plan.shape import ParamSpec, UnitSpec


log = logging.getLogger(__name__)


@dataclass
class Recipe:
    """How some parameters come out of stored tensors: one copied, or several put through a conversion."""

    converter: Any = None
    parts: list[tuple[str, str]] = field(default_factory=list)
    """(name in the file, the conversion's pattern for it)."""


class CheckpointSource:
    """The weights of ``module``'s parameters in ``directory``."""

    def __init__(self, directory: Path, module: nn.Module) -> None:
        self._directory, self._module = directory, module
        self._files = TensorFiles(model_files(directory))
        self._names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self._recipes = self._find_recipes()

    def check(self, params: Iterable[ParamSpec]) -> None:
        missing, wrong = [], []
        for param in params:
            found = self._shape_of(param)
            if found is None:
                missing.append(param.name)
            elif tuple(found) != param.shape:
                wrong.append(f"{param.name} is {list(found)}, the model needs {list(param.shape)}")
        if missing:
            raise RatelError(f"the weights lack {_few(missing)}", field="model", value=self._directory,
                             remedy="Check that the files are complete and belong to this config.json")
        if wrong:
            raise RatelError(f"weights of the wrong shape: {_few(wrong)}", field="model", value=self._directory,
                             remedy="Check that the files belong to this config.json")

    @property
    def element_bytes(self) -> int:
        """Pages of the files count as ours while they are mapped, and conversions make tensors of them."""
        return 8 if any(recipe.converter is not None for recipe in self._recipes.values()) else 4

    def read(self, unit: UnitSpec, out: Tensor) -> None:
        for param in unit.params:
            name = self._stored_name(param)
            assert name is not None, param.name
            recipe = self._recipes[name]
            if recipe.converter is None:
                self._files.read_into(recipe.parts[0][0], out[param.offset : param.end])
            else:
                view(out, param).copy_(self._produce(name, self._files.read))
        self._files.close()

    def stored_bits(self, unit: UnitSpec) -> StoredBits | None:
        runs = []
        for param in sorted(unit.params, key=lambda p: p.offset):
            recipe = self._recipes[self._stored_name(param)]
            stored = self._files.tensors[recipe.parts[0][0]]
            if recipe.converter is not None or stored.dtype is not torch.bfloat16:
                return None
            runs.append(Run(file=stored.file, offset=stored.offset, begin=param.offset, end=param.end))
        return StoredBits(runs)

    def _shape_of(self, param: ParamSpec) -> tuple[int, ...] | None:
        name = self._stored_name(param)
        if name is None:
            return None
        return tuple(self._produce(name, lambda stored: _outline(self._files.tensors[stored])).shape)

    def _stored_name(self, param: ParamSpec) -> str | None:
        """Tied weights may be stored under any of their names."""
        return next((name for name in (param.name, *param.aliases) if name in self._recipes), None)

    def _produce(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        recipe = self._recipes[name]
        if recipe.converter is None:
            return get(recipe.parts[0][0])
        converter = copy.deepcopy(recipe.converter)
        for stored, pattern in recipe.parts:
            converter.add_tensor(name, stored, pattern, get(stored))
        try:
            produced = converter.convert(name, model=self._module, config=self._module.config)
        except Exception as error:
            raise RatelError(f"the stored tensors cannot be converted to {name}: {error}", field="model",
                             value=self._directory, remedy="Check that the files are complete") from error
        tensor = produced.get(name)
        if tensor is None:
            raise RatelError(f"the stored tensors do not give {name}", field="model", value=self._directory,
                             remedy="Save the model again with transformers' save_pretrained")
        return tensor[0] if isinstance(tensor, list) else tensor

    def _find_recipes(self) -> dict[str, Recipe]:
        recipes: dict[str, Recipe] = {}
        unused: list[str] = []
        renamings, converters = _conversions(self._module)
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        for stored in sorted(self._files.tensors, key=_natural):
            name, pattern = self._rename(stored, renamings, converters)
            if name not in self._names:
                unused.append(stored)
                continue
            recipe = recipes.setdefault(name, Recipe())
            if pattern is None:
                recipe.converter, recipe.parts = None, [(stored, "")]
                continue
            recipe.converter = by_pattern[pattern]
            recipe.parts.append((stored, pattern))
        for first, recipe in list(recipes.items()):
            if recipe.converter is not None:
                self._add_other_products(first, recipe, recipes)
        self._tell_of(unused)
        return recipes

    def _tell_of(self, unused: list[str]) -> None:
        """Some checkpoints hold what a model has no place for, such as rotary frequencies; a config.json with too few layers
        looks the same."""
        if not unused:
            return
        known = [*(getattr(self._module, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
        buffers = {name for name, _ in self._module.named_buffers()}
        strange = [name for name in unused if self._with_prefix(name) not in buffers and not any(re.search(k, name) for k in known)]
        if strange:
            log.warning("%s: of the weights %s are not used: config.json has no place for them", self._directory, _few(strange))

    def _add_other_products(self, first: str, recipe: Recipe, recipes: dict[str, Recipe]) -> None:
        """A conversion that splits one stored tensor is named by its first product; the others share it."""
        patterns = recipe.converter.target_patterns
        for other in patterns[1:]:
            recipes.setdefault(first.replace(patterns[0], other, 1), recipe)

    def _rename(self, stored: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        """The parameter a stored tensor belongs to, and the conversion's pattern if it needs one."""
        name, pattern = stored, None
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in converters:
            name, pattern = converter.rename_source_key(name)
            if pattern is not None:
                break
        name = self._with_prefix(name)
        if name not in self._names and self._with_prefix(stored) in self._names:
            return self._with_prefix(stored), None
        return name, pattern

    def _with_prefix(self, name: str) -> str:
        prefix = getattr(self._module, "base_model_prefix", "")
        if name in self._names or not prefix:
            return name
        candidates = (f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return next((c for c in candidates if c in self._names), name)


def _conversions(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and conversions for this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = get_model_conversion_mapping(module)
    return ([c for c in found if not isinstance(c, WeightConverter)],
            [c for c in found if isinstance(c, WeightConverter)])


def _outline(stored: StoredTensor) -> Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Order in which expert 2 comes before expert 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def _few(items: list[str], limit: int = 4) -> str:
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
