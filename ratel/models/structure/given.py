"""What a block is given and what it remembers. It runs twice in a step: the second run must find
both as the first did."""

import inspect
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models.structure.inputs import leaves

_PAST = re.compile(r"past(_key_values?|_kvs?)?$|layer_past|kv_cache")
_DEPTH, _NODES = 6, 20_000
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward"}

TensorPicture = Callable[[Tensor], Any]


class Given:
    """The arguments of one call of a block. Caches among them are refused at once, changes of them
    afterwards."""

    def __init__(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._block = block
        self._arguments = named_arguments(block, args, kwargs)
        for name, value in self._arguments.items():
            _refuse_cache(name, value)
        self._before = self._pictures()

    @property
    def storages(self) -> set[int]:
        """The storages of all tensors that can be reached from the arguments."""
        found: set[int] = set()
        picture(list(self._arguments.values()), lambda tensor: found.add(tensor.untyped_storage()._cdata))
        return found

    def _pictures(self) -> dict[str, Any]:
        return {name: picture(value, _Same) for name, value in self._arguments.items()}

    def refuse_changes(self) -> None:
        after = self._pictures()
        for name, before in self._before.items():
            if after[name] != before:
                raise changed_argument(self._block, name, self._arguments[name])


def changed_argument(block: nn.Module, name: str, value: Any) -> RatelError:
    return RatelError(f"a block ({type(block).__name__}) changes what it is given, and it runs again in backward, when it would "
                      "be given the changed one", field="model", value=f"{name} ({type(value).__name__})",
                      remedy="Let the block make a new one and return it, or keep it outside the blocks")


def named_arguments(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the names that ``forward`` has for them."""
    names = [p.name for p in inspect.signature(block.forward).parameters.values()
             if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"argument {number}" for number in range(len(names), len(args))]
    return {**dict(zip(names, args)), **kwargs}


def _refuse_cache(name: str, value: Any) -> None:
    parts = list(leaves(value))
    is_cache = any(base.__name__.endswith(("Cache", "CacheLayer")) for part in parts for base in type(part).__mro__)
    is_past = _PAST.search(name) and any(isinstance(part, Tensor) for part in parts)
    if is_cache or is_past:
        raise RatelError("a block is given a cache of keys and values; run again in backward, it would read what its first run "
                         "wrote, which has no gradient", field="model", value=f"{name} ({type(value).__name__})",
                         remedy="Call the model with use_cache=False and without past keys and values")


def state_of(module: nn.Module, of_tensor: TensorPicture | None = None, without: Iterable[nn.Module] = ()) -> dict[str, Any]:
    """What a module and those inside have besides parameters: a picture of every attribute and
    buffer, by name.

    ``without``: modules that do not count, nor those inside them.
    """
    found: dict[str, Any] = {}
    painter = _Painter(of_tensor or content_of)
    left_out = {id(inner) for outer in without for inner in outer.modules()}
    for path, child in module.named_modules():
        if id(child) in left_out:
            continue
        attributes = {name: value for name, value in vars(child).items() if name not in _OF_EVERY_MODULE}
        for name, value in (*attributes.items(), *child._buffers.items()):
            found[f"{path}.{name}" if path else name] = painter.picture(value)
    return found


def changed_names(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [name for name in after if name not in before or before[name] != after[name]]


def refuse_changing(before: dict[str, Any], after: dict[str, Any], module: nn.Module, what: str) -> None:
    changed = changed_names(before, after)
    if changed:
        raise RatelError(f"{what}, and it runs twice in a step (again in backward)", field="model",
                         value=f"{changed[0]} of {type(module).__name__}",
                         remedy="Keep running values outside the model, or let them depend on the arguments alone")


def outline_of(tensor: Tensor) -> Any:
    """The picture of a tensor of what is run in outline, where large tensors have no values."""
    has_values = tensor.numel() == 1 and not tensor.is_floating_point() and tensor.device.type != "meta"
    return tensor.shape, tensor.dtype, int(tensor) if has_values else None


def content_of(tensor: Tensor) -> Any:
    """Equal for equal bits; on a GPU, where sums come in any order, for equal norms."""
    tensor = tensor.detach()
    if tensor.device.type == "meta" or tensor.is_sparse or not tensor.numel():
        return tensor.shape, tensor.dtype
    if tensor.device.type == "cpu" or not tensor.is_floating_point():
        return tensor.shape, tensor.dtype, bit_sum(tensor)
    return tensor.shape, tensor.dtype, f"{float(torch.linalg.vector_norm(tensor, dtype=torch.float32)):.2e}"


def bit_sum(tensor: Tensor) -> tuple[int, ...]:
    """A sum of all bits, and of some by their places, so that what has moved counts, too."""
    bits = tensor.contiguous().view(-1).view(torch.uint8)
    words = bits.view(torch.int32) if bits.numel() % 4 == 0 else bits
    parts = (words, words[::2], words[::3], words[::7], words[: len(words) // 2])
    return tuple(int(part.sum(dtype=torch.int64)) for part in parts)


def picture(value: Any, of_tensor: TensorPicture) -> Any:
    """Compares equal to a later picture if nothing that can be reached from the value has changed,
    as far as can be seen."""
    return _Painter(of_tensor).picture(value)


class _Same:
    """A tensor by its identity and the number of writes to it. It is kept alive, so that no other
    gets its address."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._tensor is self._tensor and other._version == self._version


class _Painter:
    def __init__(self, of_tensor: TensorPicture) -> None:
        self._of_tensor = of_tensor
        self._seen: dict[int, Any] = {}
        """Kept alive, so that no other object gets the number of one of them."""
        self._nodes = 0

    def picture(self, value: Any) -> Any:
        """What an earlier picture of this painter has is only named."""
        self._nodes = 0
        return self.paint(value, _DEPTH)

    def paint(self, value: Any, depth: int) -> Any:
        self._nodes += 1
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if value is None or isinstance(value, (bool, int, str, bytes, complex)):
            return value
        if isinstance(value, float):
            return repr(value)  # a NaN is not equal to itself
        if depth == 0 or self._nodes > _NODES or id(value) in self._seen or isinstance(value, (nn.Module, type)):
            return type(value).__name__
        self._seen[id(value)] = value
        return type(value).__name__, self._paint_inside(value, depth - 1)

    def _paint_inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, (list, tuple, deque)):
            return [self.paint(item, depth) for item in value]
        if isinstance(value, Mapping):
            return [(str(key), self.paint(item, depth)) for key, item in value.items()]
        if isinstance(value, (set, frozenset)):
            return sorted(map(str, value))
        if hasattr(value, "__array_interface__"):
            return value.shape, hash(value.tobytes())
        return [(name, self.paint(item, depth)) for name, item in _attributes(value).items()]


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    held = {name: getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)
            and name not in ("__dict__", "__weakref__")}
    return {**held, **getattr(value, "__dict__", {})}
