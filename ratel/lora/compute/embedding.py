"""Embeddings with adapters, and heads whose weight is an embedding's.

Tokens look their rows of A up, and B is multiplied by these alone: no weight is formed.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.lora.compute.dora import lengths
from ratel.lora.compute.function import Adapter
from ratel.lora.compute.modules import AdaptedLinear, stand_in


class AdaptedEmbedding(nn.Module):
    """Comes before an embedding's own class, whose forward and attributes stay. ``lora_A`` [r,
    tokens], ``lora_B`` [width, r]; ``lora_magnitude`` [width], of DoRA, or None."""

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    lora_scale: float

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        """The sum in fp32, rounded once. What an embedding multiplies its rows by (Gemma's
        ``embed_scale``) belongs to the adapter's rows, too."""
        y = super().forward(input, *args, **kwargs)
        rows = F.embedding(input, self.lora_A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        added = F.linear(rows, self.lora_B) * self.lora_scale
        times = getattr(self, "embed_scale", None)
        if times is not None:
            added = added * (times.to(added.dtype) if isinstance(times, Tensor) else times)
        result = y + added if self.lora_magnitude is None else (y + added) * self._factors()
        return result.to(y.dtype)

    def _factors(self) -> Tensor:
        return self.lora_magnitude / lengths(self.weight.t(), self.lora_A, self.lora_B, self.lora_scale)


class TiedLinear(AdaptedLinear):
    """A head that has an embedding's weight and adapter: A of the one is B of the other, transposed.
    The parameters are the embedding's own, under the names ``lora_A`` (its B) and ``lora_B`` (its
    A)."""

    def __init__(self, base: nn.Module, embedding: nn.Module, *, scale: float, p: float, graph: str) -> None:
        super().__init__(base, Adapter(a=embedding.lora_B, b=embedding.lora_A, scale=scale), p=p, graph=graph)

    @property
    def adapter(self) -> Adapter:
        return Adapter(a=self.lora_A.t().contiguous(), b=self.lora_B.t().contiguous(), scale=self.scale)


def with_rows(embedding: nn.Module, adapter: Adapter, magnitude: Tensor | None) -> nn.Module:
    """An embedding of a class derived from its own, with an adapter."""
    if embedding.max_norm is not None:
        raise RatelError("has max_norm, which writes to its weight in every forward pass", field="lora_targets",
                         value=type(embedding).__name__, remedy="Exclude it")
    found = stand_in(embedding, _derived(type(embedding)))
    found.lora_A, found.lora_B, found.lora_scale = nn.Parameter(adapter.a), nn.Parameter(adapter.b), adapter.scale
    found.register_parameter("lora_magnitude", None if magnitude is None else nn.Parameter(magnitude))
    return found


@functools.cache
def _derived(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{base.__name__}", (AdaptedEmbedding, base), {"__module__": base.__module__})
