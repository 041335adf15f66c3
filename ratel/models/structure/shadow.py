"""Running a model in outline: every operator happens, but large tensors have a shape and no memory.

Used to trace a model of any size. A float tensor above a few KiB is a *shadow*: one zero element
expanded to its shape. Operators on shadows compute their output shapes on the meta device and
return shadows, so neither weights nor activations nor time are spent. Autograd works above this
level and records its graph as always. Which parameters an operator touches is seen from their
storages: every placeholder has one of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

Place = tuple[int, bool]
"""How many blocks have run, and whether the next one is under way."""

SHADOW_ELEMENTS = 2048
"""Float tensors above this are shadowed. Below it they are computed, which is exact and cheaper
than a meta call."""


class Shadow(TorchDispatchMode):
    """``touched`` collects the parameters (by index in ``params``) that operators saw since it was
    last replaced."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self._index = {p.untyped_storage().data_ptr(): i for i, p in enumerate(params) if p.numel()}
        self.touched: set[int] = set()
        self._outputs: dict[tuple, Any] = {}
        self.place: Place = (0, False)
        self.given: set[int] = set()
        """Storages that the block which runs was given."""
        self.foreign: set[tuple[Place, Place, int]] = set()
        """What was read that was made elsewhere in this forward and not given: where it is read,
        where it was made, its storage."""
        self._made: dict[int, tuple[StorageWeakRef, Place]] = {}
        """Where each storage was made. A weak reference keeps the address from being used
        again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        self._note_reads(tensors)
        result = self._run(func, args, kwargs, tensors)
        if not func.is_view:
            self._note_made(result)
        return result

    def _note_reads(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()._cdata
            made = self._made.get(storage)
            if made is not None and made[1] != self.place and storage not in self.given:
                self.foreign.add((self.place, made[1], storage))

    def _note_made(self, result: Any) -> None:
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                self._made.setdefault(ref.cdata, (ref, self.place))

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        for tensor in tensors:
            if tensor.device.type != "meta":
                index = self._index.get(tensor.untyped_storage().data_ptr())
                if index is not None:
                    self.touched.add(index)
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        is_small = not any(map(_is_large, tensors))
        if func.is_view or func._schema.is_mutable and is_small and not any(map(_is_part_of_shadow, written)):
            try:
                return func(*args, **kwargs)
            except RuntimeError:
                if not func.is_view:
                    raise
                args, kwargs = tree_map_only(Tensor, _materialise, (args, kwargs))  # view_as_complex looks at strides
                return func(*args, **kwargs)
        if func._schema.is_mutable:
            # Writing to or from a shadow changes nothing: all is zero. Autograd bumps the version
            # above us.
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        try:
            return func(*args, **kwargs) if is_small else self._on_meta(func, args, kwargs, tensors)
        except (RuntimeError, NotImplementedError, IndexError, TypeError):
            # The values matter (nonzero, item, ...), or there is no meta kernel; some of those
            # refuse zero strides.
            args, kwargs = tree_map_only(Tensor, _materialise, (args, kwargs))
            return func(*args, **kwargs)

    def _on_meta(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else tensors[0].device
        flat, form = tree_flatten((args, kwargs))
        key = (func, str(form), *(_outline(x) if isinstance(x, Tensor) else (type(x), str(x)) for x in flat))
        if key not in self._outputs:  # blocks are alike: most of a deep model is found here
            flat = [torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else
                    torch.device("meta") if isinstance(x, torch.device) else x for x in flat]
            meta_args, meta_kwargs = tree_unflatten(flat, form)
            self._outputs[key] = func(*meta_args, **meta_kwargs)
        return tree_map_only(Tensor, lambda t: _zero(t, device), self._outputs[key])


@contextmanager
def assignments_undone(root: nn.Module) -> Iterator[None]:
    """What modules assign to themselves inside is taken back: a buffer that forward moves or
    converts would stay a shadow."""
    before = [(module, dict(module._buffers), dict(vars(module))) for module in root.modules()]
    try:
        yield
    finally:
        for module, buffers, attributes in before:
            _put_back(module._buffers, buffers)
            _put_back(vars(module), attributes)


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Tensors as they were; none that was not there."""
    for name in [name for name, value in now.items() if isinstance(value, Tensor) and name not in before]:
        del now[name]
    now.update({name: value for name, value in before.items() if now.get(name) is not value
                and (isinstance(value, Tensor) or isinstance(now.get(name), Tensor))})


def _is_large(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > SHADOW_ELEMENTS


def _is_part_of_shadow(tensor: Tensor) -> bool:
    """A view of one has few elements perhaps, and all in the same place."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))


def _materialise(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.device.type != "meta" and 0 in tensor.stride() else tensor


def _outline(tensor: Tensor) -> tuple[Any, ...]:
    # Strides are left out: those of a shadow say nothing.
    return tuple(tensor.shape), tensor.dtype


def _zero(meta: Tensor, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=meta.dtype, device=device).expand(meta.shape) if _is_large(meta) else \
        torch.zeros(meta.shape, dtype=meta.dtype, device=device)


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
            found.append(value)
    return found
