"""Running a model's code on tensors that have a shape and no memory, and counting what they would
hold at once.

Weights are on PyTorch's meta device. What is small and made of whole numbers (tokens, positions,
masks) is computed on the CPU as always: models look at it. Where the two meet, the CPU's tensor
loses its values.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten

META = torch.device("meta")
_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class ShapesOnly(TorchDispatchMode):
    """``live_bytes`` are held now, ``peak_bytes`` at most since ``restart``; since then, too,
    ``values_matter`` if an operation needed values that are not there.

    Only what is made inside counts, each storage once, until nothing refers to it. With
    ``attention_scratch`` the backward of attention takes, while it runs, what CUDA's kernel
    allocates unseen: the gradient of the queries in fp32.
    """

    def __init__(self, *, attention_scratch: bool) -> None:
        super().__init__()
        self._scratch = attention_scratch
        self._held: dict[int, weakref.ref] = {}
        self.live_bytes = self.peak_bytes = 0
        self.values_matter = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = self._run(func, args, kwargs, tensors)
        if not func.is_view:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._hold(tensor)
        if self._scratch and func._schema.name == f"{_ATTENTION}_backward":
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + 4 * args[1].numel())
        return result

    def restart(self) -> None:
        self.peak_bytes, self.values_matter = self.live_bytes, False

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        if any(t.device == META for t in tensors):
            # Copying a tensor without values into one with values leaves that as it is.
            if func is aten.copy_.default and args[0].device != META:
                return args[0]
            args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": META}
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            # The values matter (nonzero, item, ...). With zeros for all, a router sends every token
            # to one expert.
            self.values_matter = True
            args, kwargs = tree_map_only(Tensor, _zeros, (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": torch.device("cpu")}
            return tree_map_only(Tensor, lambda t: _without_values(t) if t.is_floating_point() else t, func(*args, **kwargs))

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        num_bytes = storage.nbytes()

        def release(ref: weakref.ref) -> None:
            del self._held[key]
            self.live_bytes -= num_bytes

        self._held[key] = weakref.ref(storage, release)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class FusedAttention(TorchFunctionMode):
    """The attention that GPUs take. On the meta device PyTorch would take the attention that writes
    all scores down; no GPU's default does."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
           is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    # The kernels read the keys and values of a group of heads once; their gradients have the shapes
    # of the tensors given.
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, attn_mask=attn_mask,
                                                            scale=scale)[0]


def _without_values(tensor: Tensor) -> Tensor:
    if tensor.device == META:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device == META else tensor

