"""The tensors of a trained model under the names and in the shapes that its checkpoint had them.

Servers read checkpoints as their authors published them: experts one by one, older names.
transformers can turn a state dict back into that (what `save_pretrained` does), and is asked to
here, first in outline, so that everything is known before anything is made, then for a few
parameters at a time.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ratel.models.safetensors.writer import Outline

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are turned back together: one, or those that a conversion needs at once."""

    names: tuple[str, ...]
    outlines: dict[str, Outline]
    """The tensors that they become."""


class Originals:
    """The stored tensors of a model whose state dict has these parameters and buffers."""

    def __init__(self, module: nn.Module, outlines: dict[str, Outline], *, reverts: bool = True) -> None:
        self._module = module
        self._conversions = _reverse_conversions(module) if reverts and hasattr(module, "base_model_prefix") else None
        try:
            self.groups = self._groups_of(outlines)
        except Exception as error:  # of conversions that have no way back
            log.warning("%s: exported under the names of the module, since transformers cannot turn them into its checkpoint's "
                        "(%s: %s)", type(module).__name__, type(error).__name__, error)
            self._conversions = None
            self.groups = self._groups_of(outlines)

    def convert(self, group: Group, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the group's parameters become."""
        found = self._revert(tensors)
        assert {name: Outline.of(tensor) for name, tensor in found.items()} == group.outlines, group.names
        return found

    def _groups_of(self, outlines: dict[str, Outline]) -> list[Group]:
        groups = []
        for names in _needed_together(outlines, self._conversions):
            found = self._revert({name: _empty(outlines[name]) for name in names})
            groups.append(Group(names=names, outlines={name: Outline.of(tensor) for name, tensor in found.items()}))
        return groups

    def _revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._conversions is None:
            return tensors
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self._module, tensors)


def _reverse_conversions(module: nn.Module) -> list[Any] | None:
    """The conversions of more than names, as `revert_weight_conversion` will find them; None where
    it has nothing to do."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    conversions = getattr(module, "_weight_conversions", None)
    if conversions is None:
        conversions = [c for c in get_model_conversion_mapping(module, add_legacy=False) if not isinstance(c, PrefixChange)]
    if not conversions:
        return None
    return [c.reverse_transform() for c in reversed(conversions) if isinstance(c, WeightConverter)]


def _needed_together(names: Iterable[str], converters: list[Any] | None) -> Iterator[tuple[str, ...]]:
    """Names of one product, as transformers groups them."""
    groups: dict[tuple[int, str], list[str]] = {}
    for name in names:
        target, used = name, -1
        for number, converter in enumerate(converters or []):
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                used = number
                break
        groups.setdefault((used, target if used >= 0 else name), []).append(name)
    return map(tuple, groups.values())


def _empty(outline: Outline) -> Tensor:
    return torch.empty(outline.shape, dtype=outline.dtype, device="meta")
