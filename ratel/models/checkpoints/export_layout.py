"""What an export of a model has: every tensor's name, shape and dtype, known before the first is
made, and what it is made from."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ratel.models.checkpoints.dtypes import planned_in_fp32
from ratel.models.checkpoints.original import Group, Originals
from ratel.models.checkpoints.other_state import as_tensors
from ratel.models.safetensors.writer import Outline
from ratel.planner.shape import ParamSpec, UnitSpec, lay_out

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UnitToExport:
    spec: UnitSpec
    stored_names: dict[str, str]
    """The one of a parameter's names that is stored, by its name in the unit."""
    groups: tuple[Group, ...]

    @property
    def outlines(self) -> dict[str, Outline]:
        return {name: outline for group in self.groups for name, outline in group.outlines.items()}


class ExportLayout:
    """``units``: in their order. ``unused``: of parameters that no stage uses, as many together as
    have to be."""

    def __init__(self, module: nn.Module, units: Iterable[UnitSpec], unused: UnitSpec | None, other: dict[str, Any],
                 dtype: torch.dtype) -> None:
        self._kept = planned_in_fp32(module, dtype)
        self._dtype = dtype
        names = {param.name: _stored_name(module, param) for unit in [*units, *([unused] if unused else [])] for param in unit.params}
        ignored = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
        tensors = {name: tensor for name, tensor in as_tensors(other).items() if name not in ignored}
        self._outlines = {names[param.name]: Outline(shape=param.shape, dtype=self._dtype_for(names[param.name]))
                          for unit in [*units, *([unused] if unused else [])] for param in unit.params}
        everything = {**{name: o for name, o in self._outlines.items() if name not in ignored},
                      **{name: Outline.of(tensor) for name, tensor in tensors.items()}}
        self._originals = _originals(module, everything, [frozenset(names[p.name] for p in unit.params) for unit in units],
                                     frozenset(tensors))
        groups = {name: group for group in self._originals.groups for name in group.names}
        self.units = [_to_export(unit, names, groups) for unit in units]
        self.unused = [_to_export(part, names, groups) for part in _parts_of(unused, names, groups)]
        self.other = _to_export(lay_out(-1, "other", "other", ()), {}, {})
        self.other = replace(self.other, groups=tuple({id(groups[name]): groups[name] for name in tensors}.values()))

    def dtype_of(self, name: str) -> torch.dtype:
        return self._outlines[name].dtype

    def completed(self, unit: UnitToExport, held: dict[str, Tensor], missing: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors of the groups all of whose parameters are ``held`` with nothing
        ``missing``; they are taken out."""
        waiting = {unit.stored_names[name] for name, count in missing.items() if count}
        for group in unit.groups:
            if all(name in held and name not in waiting for name in group.names):
                yield from self._originals.convert(group, {name: held.pop(name) for name in group.names}).items()

    def convert_other(self, other: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        tensors = as_tensors(other)
        for group in self.other.groups:
            yield from self._originals.convert(group, {name: tensors[name] for name in group.names}).items()

    def _dtype_for(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._kept else self._dtype


def _stored_name(module: nn.Module, param: ParamSpec) -> str:
    """The name under which transformers stores tied weights: not one that is tied to another."""
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    return next((name for name in (param.name, *param.aliases) if name not in tied), param.name)


def _originals(module: nn.Module, outlines: dict[str, Outline], units: list[frozenset[str]], other: frozenset[str]) -> Originals:
    """The tensors as the checkpoint had them; under the module's names, which transformers reads as
    well, where what would have to be converted together is not together in memory, or transformers
    cannot turn it back."""
    found = Originals(module, outlines)
    homes = {name: number for number, names in enumerate([other, *units]) for name in names}
    stored = [name for group in found.groups for name in group.outlines]
    if len(stored) == len(set(stored)) and all(len({homes.get(name) for name in group.names}) == 1 for group in found.groups):
        return found
    log.warning("%s: exported under the names of the module: its checkpoint's cannot be had one unit at a time",
                type(module).__name__)
    return Originals(module, outlines, reverts=False)


def _to_export(unit: UnitSpec, names: dict[str, str], groups: dict[str, Group]) -> UnitToExport:
    own = {param.name: names[param.name] for param in unit.params}
    return UnitToExport(spec=unit, stored_names=own,
                        groups=tuple({id(groups[name]): groups[name] for name in own.values() if name in groups}.values()))


def _parts_of(unit: UnitSpec | None, names: dict[str, str], groups: dict[str, Group]) -> Iterator[UnitSpec]:
    """A unit that is read for the export alone need not be in memory as a whole."""
    by_name = {names[param.name]: param for param in unit.params} if unit else {}
    for group in {id(groups[name]): groups[name] for name in by_name if name in groups}.values():
        yield lay_out(-1, f"unused {group.names[0]}", "unused", [by_name[name] for name in group.names])
