"""A model's weights, buffers and files on their way in and out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models.calls.caches import Caches
from ratel.models.calls.tasks import TaskRunner
from ratel.models.checkpoints.beside import Origin, write_beside
from ratel.models.checkpoints.directory import EXTRA_STATE
from ratel.models.checkpoints.export_layout import ExportLayout
from ratel.models.checkpoints.weights import WeightSource, view
from ratel.models.safetensors.stored_bits import StoredBits
from ratel.models.structure.additions import Additions
from ratel.models.structure.guard import Guard
from ratel.models.structure.skeleton import Originals, owners
from ratel.models.structure.unit_layout import Layout
from ratel.planner.shape import ParamSpec, UnitSpec


class Stored:
    """What a model was made from, and what is made of it: units are read from its source, and an
    export, or the module that the user gave, gets what was trained. Held by `Parts`."""

    def __init__(self, module: nn.Module, *, name: str, source: WeightSource, originals: Originals, origin: Origin,
                 additions: Additions | None, guard: Guard, caches: Caches, task_runner: TaskRunner | None) -> None:
        self.originals, self.origin = originals, origin
        self._module, self._name, self._additions = module, name, additions
        self._source = source if additions is None else additions.source(source)
        self._guard, self._caches, self._task_runner = guard, caches, task_runner
        self._layout: Layout | None = None

    def laid_out(self, layout: Layout) -> None:
        """Once it is known which units the parameters are in; only `check_source` and `other_state`
        may come before."""
        self._layout = layout

    @property
    def _laid_out(self) -> Layout:
        assert self._layout is not None, "probe(batch) comes first"
        return self._layout

    def check_source(self) -> None:
        """Refuse missing, wrongly shaped or unreadable weights before any is used. Reads headers
        only.

        Works before the model is probed, too.
        """
        params = dict(self._module.named_parameters())
        self._source.check([
            ParamSpec(name=places[0][2], shape=tuple(params[places[0][2]].shape),
                      aliases=tuple(name for _, _, name in places[1:]))
            for places in owners(self._module).values()])

    def read_unit(self, unit: int | UnitSpec, out: Tensor) -> None:
        """Fill ``out`` (CPU, fp32, ``num_elements``) with the unit's weights in its layout, padding
        zero."""
        spec = self._laid_out.spec.units[unit] if isinstance(unit, int) else unit
        assert out.dtype is torch.float32 and out.device.type == "cpu" and out.numel() == spec.num_elements
        with torch.no_grad():
            self._source.read(spec, out.zero_())

    def bits(self, unit: UnitSpec) -> StoredBits | None:
        """The same as `WeightSource.stored_bits`."""
        return self._source.stored_bits(unit)

    @property
    def import_element_bytes(self) -> int:
        """The same as `WeightSource.element_bytes`."""
        return self._source.element_bytes

    def restore(self, get_unit: Callable[[UnitSpec], Tensor]) -> None:
        """Give the module the user gave its own parameters again, with the weights ``get_unit``
        returns (fp32, unit layout), at `Parts.close`. They keep their dtype and device. One that came
        without weights stays a skeleton, and one that has had additions is as it came.
        """
        if not self.originals.has_weights or self._additions is not None:
            return
        with torch.no_grad():
            for unit in self._laid_out.spec.units:
                flat = get_unit(unit)
                for spec in unit.params:
                    if spec.trainable:
                        self.originals.tensors[spec.name].copy_(view(flat, spec))
            for name, value in self.other_state().items():
                if isinstance(value, Tensor) and value is not self.originals.buffers.get(name):
                    self.originals.buffers[name].copy_(value)

    def export_layout(self, dtype: torch.dtype) -> ExportLayout:
        """What an export has, in weights of that dtype: all of the state dict, as the model's
        checkpoint stores it."""
        with self._guard.lifted():
            return ExportLayout(self._module, self._laid_out.spec.units, self._laid_out.unused, self.other_state(), dtype)

    def other_state(self) -> dict[str, Any]:
        """What the model's state dict has besides parameters, by name: buffers and extra state, on
        the CPU. A buffer that is as it came has the precision it came with."""
        names = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        with self._guard.lifted():
            state = self._module.state_dict()
        return {name: self._as_given(name, value).detach().cpu() if isinstance(value, Tensor) else value
                for name, value in state.items() if name not in names}

    def _as_given(self, name: str, current: Tensor) -> Tensor:
        first = self.originals.buffers.get(name)
        if first is None or first.dtype is current.dtype or not _is_equal(first.to(current.dtype), current):
            return current
        return first

    def set_other_state(self, state: dict[str, Any]) -> None:
        """Give the model what `other_state` gave. Raises RatelError, with nothing changed, if it
        has something else."""
        ours = self.other_state()
        differing = [name for name in ours.keys() ^ state.keys()] or [
            name for name, value in state.items() if isinstance(value, Tensor) and value.shape != ours[name].shape]
        if differing:
            raise RatelError(f"has not the buffers that this model has: {sorted(differing)[0]}", field="state",
                             value=self._name, remedy="Give the model that the state was saved from")
        buffers = dict(self._module.named_buffers(remove_duplicate=False))
        for name, value in state.items():
            path, _, attribute = name.rpartition(".")
            if attribute == EXTRA_STATE:
                self._module.get_submodule(path).set_extra_state(value)
            else:
                with torch.no_grad():
                    buffers[name].copy_(value)

    def write_beside(self, directory: Path, dtype: torch.dtype) -> None:
        """Write what an export has beside its weights: config.json, and the files that lay beside
        the weights it began with."""
        found = self._task_runner.found_problem if self._task_runner is not None else None
        origin = self.origin if found is None else self.origin.with_change("problem_type", found)
        with self._caches.as_given():
            write_beside(origin, self._module, directory, dtype)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, wherever they are: NaN equals itself."""
    return torch.equal(one.cpu().contiguous().view(-1).view(torch.uint8), other.cpu().contiguous().view(-1).view(torch.uint8))
