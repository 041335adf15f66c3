"""Adapters of single parameters, fused experts above all: a module keeps its own forward, and reads
an `AdaptedWeight` where it read the parameter.

The sum W + s B A is not formed where the module multiplies by it, whole or one expert at a time: W
and the adapter are multiplied apart, so that no second copy of the experts is made or kept for
backward. What is done to a weight otherwise is done to the sum.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ratel.errors import RatelError
from ratel.lora.compute.function import Adapter, Frozen, adapted_linear
from ratel.lora.compute.modules import stand_in
from ratel.lora.describe.layers import AdaptedLayer

GROUPED_RANKS = 8
"""Grouped products take rows at multiples of 16 bytes: ranks are padded to a multiple of this."""
_OF_W = frozenset(("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_meta", "size", "dim", "stride", "numel",
                   "element_size", "is_contiguous", "is_floating_point"))
"""What is asked of a weight that its values do not answer."""


class AdaptedWeight:
    """W + scale L R, as one reading of a parameter sees it: no tensor, so that nothing can take it
    for W alone. As W is stored, with or without a dimension of experts first: ``base`` [..., rows,
    columns], ``left`` [..., rows, r], ``right`` [..., r, columns]. ``name``: the parameter's, of its
    module."""

    def __init__(self, base: Tensor, left: Tensor, right: Tensor, scale: float, *, wants_grad: bool, name: str) -> None:
        self.base, self.left, self.right, self.scale, self.wants_grad, self.name = base, left, right, scale, wants_grad, name
        self.is_shared = False
        """Whether one reading serves a whole run of the module."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        product = _PRODUCTS.get(_name(func))
        result = product(func, *args, **(kwargs or {})) if product is not None else NotImplemented
        if result is not NotImplemented:
            return result
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, AdaptedWeight) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """The sum, rounded to W's dtype as peft rounds it: of a matrix the product is rounded
        first."""
        self._refuse_loss_of_gradients()
        if self.base.ndim == 2:
            return self.base + ((self.left @ self.right) * self.scale).to(self.base.dtype)
        return torch.baddbmm(self.base, self.left.to(self.base.dtype), self.right.to(self.base.dtype), alpha=self.scale)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._refuse_loss_of_gradients()
        return self.left.to(x.dtype), self.right.to(x.dtype)

    def _refuse_loss_of_gradients(self) -> None:
        """A function that the module calls may compute gradients by itself, which the adapter would
        not see."""
        if self.wants_grad and not torch.is_grad_enabled():
            raise RatelError("is read where no gradients are followed, so that its adapter would get none",
                             field="lora_parameters", value=self.name, remedy="Leave the parameter out")

    def _changed(self, base: Tensor, left: Tensor, right: Tensor) -> "AdaptedWeight":
        return AdaptedWeight(base, left, right, self.scale, wants_grad=self.wants_grad, name=self.name)

    # --- what modules do to weights before they multiply ----------------------------------------------------------

    def __getitem__(self, index: Any) -> "AdaptedWeight | Tensor":
        """One expert, or some."""
        is_experts = isinstance(index, (int, slice)) or (isinstance(index, Tensor) and index.ndim < 2)
        if self.base.ndim < 3 or not is_experts:
            return self.dense()[index]
        index = int(index) if isinstance(index, Tensor) and index.ndim == 0 else index  # views, and one wait for a GPU
        if self.is_shared and isinstance(index, int):
            return self._changed(self.base[index], *self._by_expert[index])
        return self._changed(self.base[index], self.left[index], self.right[index])

    @functools.cached_property
    def _by_expert(self) -> list[tuple[Tensor, Tensor]]:
        """Taken apart once, so that gradients are put together once: an index of its own for each
        expert would fill a gradient of the whole size each time."""
        return list(zip(self.left.unbind(), self.right.unbind(), strict=True))

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator["AdaptedWeight | Tensor"]:
        return (self[index] for index in range(len(self)))

    def transpose(self, dim0: int, dim1: int) -> "AdaptedWeight | Tensor":
        ndim = self.base.ndim
        if {dim0 % ndim, dim1 % ndim} != {ndim - 2, ndim - 1}:
            return self.dense().transpose(dim0, dim1)
        return self._changed(self.base.mT, self.right.mT, self.left.mT)

    def t(self) -> "AdaptedWeight | Tensor":
        return self.transpose(0, 1)

    @property
    def mT(self) -> "AdaptedWeight | Tensor":  # noqa: N802
        return self.transpose(-2, -1)

    @property
    def T(self) -> "AdaptedWeight | Tensor":  # noqa: N802
        return self.transpose(0, 1) if self.base.ndim == 2 else self.dense().permute(2, 1, 0)

    def to(self, *args: Any, **kwargs: Any) -> "AdaptedWeight | Tensor":
        return self if self.base.to(*args, **kwargs) is self.base else self.dense().to(*args, **kwargs)

    def contiguous(self) -> "AdaptedWeight | Tensor":
        return self if self.base.is_contiguous() else self.dense()

    @property
    def requires_grad(self) -> bool:
        return self.wants_grad

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base if name in _OF_W else self.dense(), name)

    def data_ptr(self) -> int:
        """Transformers asks how W is aligned on a CPU. On other devices whoever asks is a kernel."""
        if self.base.device.type != "cpu":
            raise TypeError(f"{self.name} has an adapter: a kernel that takes its address would compute without it")
        return self.base.data_ptr()


def _elementwise(name: str) -> Callable[..., Tensor]:
    return lambda self, *others: getattr(self.dense(), name)(*others)


for _operator in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg"):
    setattr(AdaptedWeight, f"__{_operator}__", _elementwise(f"__{_operator}__"))


# --- products ------------------------------------------------------------------------------------------------------

def _linear(func: Any, input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:  # noqa: A002
    if isinstance(input, AdaptedWeight) or isinstance(bias, AdaptedWeight) or weight.base.ndim != 2:
        return NotImplemented
    return _times(input, weight.t(), bias)


def _matmul(func: Any, input: Any, other: Any) -> Any:  # noqa: A002
    """Also of stacks: a product for each expert."""
    if isinstance(input, AdaptedWeight) and isinstance(other, AdaptedWeight):
        return NotImplemented
    weight, x = (input, other) if isinstance(input, AdaptedWeight) else (other, input)
    if x.ndim < 2 or x.dtype != weight.base.dtype:
        return NotImplemented
    if weight is other:
        if weight.base.ndim == 2:
            return _times(x, weight, None)
        left, right = weight.factors(x)
        return torch.add(func(x, weight.base), func(func(x, left), right), alpha=weight.scale)
    left, right = weight.factors(x)
    return torch.add(func(weight.base, x), func(left, func(right, x)), alpha=weight.scale)


def _times(x: Tensor, weight: AdaptedWeight, bias: Tensor | None) -> Tensor:
    """x W + bias of a matrix, through the operations of adapted linears."""
    weight._refuse_loss_of_gradients()
    adapter = Adapter(a=weight.left.t(), b=weight.right.t(), scale=weight.scale)
    return adapted_linear(x, Frozen(weight=weight.base.t(), bias=bias), adapter)


def _grouped(func: Any, input: Tensor, weight: Any, offs: Tensor | None = None, **options: Any) -> Any:  # noqa: A002
    """Rows sorted by experts, each times its expert's matrix."""
    if isinstance(input, AdaptedWeight) or weight.base.ndim != 3 or any(option is not None for option in options.values()):
        return NotImplemented
    left, right = weight.factors(input)
    padding = -left.shape[-1] % GROUPED_RANKS
    left, right = F.pad(left, (0, padding)).contiguous(), F.pad(right, (0, 0, 0, padding)).contiguous()
    added = func(func(input, left, offs=offs), right, offs=offs)
    return torch.add(func(input, weight.base, offs=offs), added, alpha=weight.scale)


_PRODUCTS: dict[str, Callable[..., Any]] = {
    "linear": _linear, "matmul": _matmul, "__matmul__": _matmul, "mm": _matmul, "bmm": _matmul,
    "_grouped_mm": _grouped, "grouped_mm": _grouped, "transformers.grouped_mm_fallback": _grouped}


def _name(func: Any) -> str:
    """Operations of libraries have the library's name before their own."""
    return str(func) if isinstance(func, (torch._ops.OpOverloadPacket, torch._ops.OpOverload)) else func.__name__


# --- modules -------------------------------------------------------------------------------------------------------

def with_parameters(module: nn.Module, layers: Sequence[AdaptedLayer], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module of the same parameters and of a class derived from its own, with adapters on those
    that ``layers`` name. ``tensors``: as of `adapt_layers`."""
    found = stand_in(module, _reading(type(module), tuple(layer.parameter for layer in layers)))
    for layer in layers:
        for which in ("lora_A", "lora_B"):
            found.register_parameter(f"{layer.parameter}_{which}", nn.Parameter(tensors[f"{layer.key}_{which}"]))
        setattr(found, f"{layer.parameter}_lora_scale", layer.scale)
        setattr(found, f"{layer.parameter}_lora_outputs_last", layer.is_transposed)
    return found


@functools.cache
def _reading(base: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    """One class for all modules alike, so that they are seen to be."""
    own = {parameter: property(functools.partial(_read, parameter=parameter)) for parameter in parameters}
    return type(f"Adapted{base.__name__}", (_Reading, base), {"__module__": base.__module__, **own})


class _Reading(nn.Module):
    """A class that comes before a module's own. In a run of the module each parameter is read once."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        self.__dict__[_RUN] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__.pop(_RUN, None)


_RUN = "_lora_weights"
"""The attribute that holds what has been read, during a run."""


def _read(module: nn.Module, parameter: str) -> AdaptedWeight:
    read = module.__dict__.get(_RUN)
    if read is None:
        return _weight(module, parameter)
    key = parameter, torch.is_grad_enabled()
    if key not in read:
        read[key] = _weight(module, parameter)
        read[key].is_shared = True
    return read[key]


def _weight(module: nn.Module, parameter: str) -> AdaptedWeight:
    """A [E r, i] has the expert slowest, B [o, r E] fastest."""
    held, settings = module._parameters, module.__dict__
    base, a, b = held[parameter], held[f"{parameter}_lora_A"], held[f"{parameter}_lora_B"]
    assert base is not None and a is not None and b is not None
    if base.ndim == 3:
        a, b = a.view(base.shape[0], -1, a.shape[1]), b.view(b.shape[0], -1, base.shape[0]).permute(2, 0, 1)
    left, right = (a.mT, b.mT) if settings[f"{parameter}_lora_outputs_last"] else (b, a)
    wants_grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return AdaptedWeight(base, left, right, settings[f"{parameter}_lora_scale"], wants_grad=wants_grad, name=parameter)
