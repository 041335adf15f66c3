"""How each tensor of a model's state comes out of stored ones: copied under another name, or
converted.

transformers has a table of renamings and conversions for each model, and its own functions apply it
here, name by name, in the order in which `from_pretrained` goes through a checkpoint.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ratel.errors import RatelError


@dataclass
class Recipe:
    """One stored tensor that is copied, or several that are put through a conversion. ``first``:
    its (first) product's name, by which a conversion finds the others."""

    first: str
    converter: Any = None
    parts: list[tuple[str, str]] = field(default_factory=list)
    """(name in the file, the conversion's pattern for it)."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    by_name: dict[str, Recipe]
    """Recipes by name in the module's state dict. A recipe with several products is there under
    each of their names."""
    unused: list[str]
    """Stored tensors that the model has no place for, under the names that they would have in
    it."""


def find_recipes(module: nn.Module, stored: Iterable[str]) -> Recipes:
    """Find the place of every stored tensor that `from_pretrained` would put it. What was renamed
    or converted is left with the module, so that transformers can write the tensors as they
    were."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    mapping = get_model_conversion_mapping(module)
    converters = [c for c in mapping if isinstance(c, WeightConverter)]
    renamings = [c for c in mapping if not isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    places = dict.fromkeys(module.state_dict(), True)
    found: dict[str, Recipe] = {}
    unused: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = _place_of(name, module, renamings, converters, places)
        if target in places:
            _add(found, target, name, pattern, by_pattern)
        else:
            unused.append(target)
    for first, recipe in list(found.items()):
        if recipe.converter is not None:
            _add_other_products(first, recipe, found)
    module._weight_conversions = [conversion for conversion in mapping if conversion.was_used()]
    return Recipes(by_name=found, unused=unused)


def _place_of(name: str, module: nn.Module, renamings: list[Any], converters: list[Any],
              places: dict[str, bool]) -> tuple[str, str | None]:
    from transformers.core_model_loading import rename_source_key

    prefix = getattr(module, "base_model_prefix", "")
    target, pattern = rename_source_key(name, renamings, converters, prefix, places)
    if target not in places and name in places:  # its name is right as it is, but for the prefix
        target, pattern = rename_source_key(name, [], [], prefix, places)
    return target, pattern


def _add(found: dict[str, Recipe], target: str, name: str, pattern: str | None, by_pattern: dict[str, Any]) -> None:
    recipe = found.setdefault(target, Recipe(first=target, converter=by_pattern[pattern] if pattern is not None else None))
    if (recipe.converter is None) != (pattern is None):
        raise RatelError(f"{target} is there twice: as {name}, and as {recipe.parts[0][0]}, which is stored otherwise",
                         field="model", value=name, remedy="Remove one of them, or save the model again with transformers")
    if recipe.converter is not None:
        recipe.parts.append((name, pattern))
    elif not recipe.parts:  # of two with one name the first counts
        recipe.parts.append((name, ""))


def _add_other_products(first: str, recipe: Recipe, found: dict[str, Recipe]) -> None:
    """A conversion that splits one stored tensor is named by its first product; the others share
    it."""
    patterns = recipe.converter.target_patterns
    for other in patterns[1:]:
        found.setdefault(first.replace(patterns[0], other, 1), recipe)
