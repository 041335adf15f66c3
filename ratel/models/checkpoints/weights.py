"""Where the weights of a model come from, one unit at a time, as fp32 in the unit's flat layout."""

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models.safetensors.stored_bits import StoredBits
from ratel.planner.shape import ParamSpec, UnitSpec


PIECE_ELEMENTS = 1 << 20
"""How many elements are worked on at once."""
log = logging.getLogger(__name__)


class WeightSource(Protocol):
    element_bytes: int
    """Bytes of memory that `read` takes for each element of a unit, ``out`` included."""

    def check(self, params: Iterable[ParamSpec]) -> None:
        """Raise RatelError if any of these parameters cannot be read. Reads no weights."""

    def read(self, unit: UnitSpec, out: Tensor) -> None:
        """Write the unit's weights into ``out`` (fp32, CPU, ``unit.num_elements``, already
        zero)."""

    def stored_bits(self, unit: UnitSpec) -> StoredBits | None:
        """A way to read the unit in parts, where all of its weights are bf16 in files; else
        None."""


def view(flat: Tensor, param: ParamSpec) -> Tensor:
    """The parameter inside a flat plane of its unit."""
    return flat[param.offset:param.end].view(param.shape)


def round_half_up(master: Tensor) -> Tensor:
    """The bf16 numbers that are the upper halves (`hi`) of fp32 masters."""
    return ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def round_ties_to_even(master: Tensor) -> None:
    """Change masters in place, so that the upper half of each master is what PyTorch rounds it to
    (ties go to even; `hi` rounds them up): a number half way between two of bf16 that goes down is
    made the next smaller fp32. fp16 weights have many of them."""
    for begin in range(0, master.numel(), PIECE_ELEMENTS):
        bits = master[begin : begin + PIECE_ELEMENTS].view(torch.int32)
        bits.sub_(((bits & 0x1FFFF) == 0x8000).to(torch.int32))


class TensorSource:
    """Weights held in memory: the parameters of a module the user gave, under their first names."""

    element_bytes = 4

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def check(self, params: Iterable[ParamSpec]) -> None:
        for param in params:
            assert tuple(self.tensors[param.name].shape) == param.shape, param.name

    def read(self, unit: UnitSpec, out: Tensor) -> None:
        for param in unit.params:
            view(out, param).copy_(self.tensors[param.name])

    def stored_bits(self, unit: UnitSpec) -> None:
        return None


class FreshSource:
    """Weights initialised as the model would initialise them, from a seed and the unit's name.

    A unit's weights do not depend on which other units were read before, nor on where any of them
    lives.
    """

    element_bytes = 4

    def __init__(self, root: nn.Module, seed: int) -> None:
        self._root, self._seed = root, seed

    def check(self, params: Iterable[ParamSpec]) -> None:
        if hasattr(self._root, "_init_weights"):
            return
        names = {name for p in params for name in (p.name, *p.aliases)}
        for prefix, module in self._root.named_modules():
            own = [n for n, p in module._parameters.items() if p is not None and _join(prefix, n) in names]
            if own and not callable(getattr(module, "reset_parameters", None)):
                raise RatelError("the parameter has no values (it is on the meta device) and its module has no "
                                 "reset_parameters() to give it some", field="model", value=_join(prefix, own[0]),
                                 remedy="Define reset_parameters(), or build the module on the CPU")

    def read(self, unit: UnitSpec, out: Tensor) -> None:
        params = dict(self._root.named_parameters())
        chosen = {id(params[p.name]) for p in unit.params}
        before = [(params[p.name], params[p.name].data) for p in unit.params]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # Not torch.manual_seed: that would reseed the GPU, too.
            torch.default_generator.manual_seed((self._seed * 0x9E3779B1 + zlib.crc32(unit.name.encode())) % 2**64)
            try:
                for spec in unit.params:
                    params[spec.name].data = view(out, spec)
                self._initialise(chosen)
            finally:
                for param, data in before:
                    param.data = data

    def stored_bits(self, unit: UnitSpec) -> None:
        return None

    def _initialise(self, chosen: set[int]) -> None:
        if not hasattr(self._root, "_init_weights"):
            for module in self._root.modules():
                if any(id(p) in chosen for p in module._parameters.values()):
                    module.reset_parameters()
            return
        from transformers.initialization import guard_torch_init_functions

        # The flag makes transformers' initialisers pass a tensor by: a parent may touch more than
        # its own unit.
        for param in self._root.parameters():
            param._is_hf_initialized = id(param) not in chosen
        with guard_torch_init_functions():
            for module, initialise in _initialisers(self._root, self._root._init_weights, chosen):
                initialise(module)
        for param in self._root.parameters():
            param._is_hf_initialized = False


class WithFreshHead:
    """A checkpoint of another class of the model. What it lacks of the units that follow the
    blocks, or has in another shape, is initialised from the seed."""

    def __init__(self, stored: WeightSource, fresh: FreshSource, name: str) -> None:
        self._stored, self._fresh, self._name = stored, fresh, name
        self._absent: frozenset[str] = frozenset()

    @property
    def absent(self) -> frozenset[str]:
        """The parameters that are not in the checkpoint, once `complete` was called."""
        return self._absent

    @property
    def element_bytes(self) -> int:
        return self._stored.element_bytes

    def complete(self, units: Iterable[UnitSpec]) -> None:
        """These units may be incomplete in the checkpoint."""
        self._absent = frozenset(p.name for unit in units for p in unit.params if not self._stored.has(p))
        if self._absent:
            log.warning("%s: initialised from the seed, since the weights are of another class: %s", self._name,
                        ", ".join(sorted(self._absent)))

    def check(self, params: Iterable[ParamSpec]) -> None:
        self._stored.check([param for param in params if param.name not in self._absent])

    def read(self, unit: UnitSpec, out: Tensor) -> None:
        if self._lacks_some(unit):
            self._fresh.read(unit, out)
        self._stored.read(replace(unit, params=tuple(p for p in unit.params if p.name not in self._absent)), out)

    def stored_bits(self, unit: UnitSpec) -> StoredBits | None:
        return None if self._lacks_some(unit) else self._stored.stored_bits(unit)

    def _lacks_some(self, unit: UnitSpec) -> bool:
        return any(param.name in self._absent for param in unit.params)


def _initialisers(module: nn.Module, initialise: Callable[[nn.Module], None],
                  chosen: set[int]) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
    """Modules around the chosen parameters, each with the `_init_weights` of the innermost model it
    is in.

    Children come first: some models initialise a grandchild again in its grandparent (GPT-2's
    residual scaling).
    """
    for child in module.children():
        if any(id(p) in chosen for p in child.parameters()):
            yield from _initialisers(child, getattr(child, "_init_weights", initialise), chosen)
    yield module, initialise


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
