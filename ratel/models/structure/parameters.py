"""The parameters of units: views of flat buffers that come and go."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ratel.planner.shape import UnitSpec


class UnitParameters:
    """A module's parameters by unit. They are placeholders, but while their unit is attached."""

    def __init__(self, module: nn.Module, units: Sequence[UnitSpec], dtype: torch.dtype) -> None:
        by_name = dict(module.named_parameters())
        self._units, self._dtype = units, dtype
        self._params = [[(by_name[p.name], p, _strides(p.shape)) for p in unit.params] for unit in units]
        self._placeholders = [[param.data for param, _, _ in entries] for entries in self._params]
        for entries in self._params:
            for param, spec, _ in entries:
                param.requires_grad_(spec.trainable)

    def dtype_of(self, unit: UnitSpec) -> torch.dtype:
        """The dtype in which the unit's parameters compute."""
        return torch.float32 if unit.fp32 else self._dtype

    def attach(self, unit: int, flat: Tensor | None) -> None:
        """Make the unit's parameters views of ``flat`` (1-D, compute dtype, on the device); None:
        placeholders."""
        if flat is None:
            for (param, _, _), empty in zip(self._params[unit], self._placeholders[unit]):
                param.data = empty
            return
        assert flat.dtype is self.dtype_of(self._units[unit]) and flat.numel() >= self._units[unit].num_elements
        start = flat.storage_offset()
        for param, spec, strides in self._params[unit]:
            param.data = flat.as_strided(spec.shape, strides, start + spec.offset)

    def take_grads(self, unit: int) -> list[Tensor | None]:
        """The gradients that autograd has left on the unit's trained parameters, in its order; none
        is left there."""
        grads = []
        for param, spec, _ in self._params[unit]:
            if spec.trainable:
                grads.append(param.grad)
                param.grad = None
        return grads

    def storages(self, units: Iterable[int]) -> set[int]:
        """What tells the memory of the units' parameters from other memory, as `storage_of` gives
        it."""
        return {storage_of(param) for unit in units for param, _, _ in self._params[unit]}


def storage_of(tensor: Tensor) -> int:
    """Which memory the tensor is a view of."""
    return tensor.untyped_storage()._cdata


def _strides(shape: Iterable[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
