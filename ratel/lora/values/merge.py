"""Weights with their adapter added, one at a time, with the rounding that peft's merge has.

peft adds the product, in fp32, to the weight of a Linear or Conv1D and rounds the sum once. Of
embeddings and of parameters it rounds the product to the weight's dtype first. DoRA's sum is
rounded once.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.lora.describe.layers import PARAMETER, AdaptedLayer
from ratel.lora.describe.outline import EMBEDDING
from ratel.lora.describe.targets import Targets
from ratel.lora.values.initial import LayerTensors, as_stored


@torch.no_grad()
def merged(layer: AdaptedLayer, weight: Tensor, tensors: LayerTensors) -> Tensor:
    """A new tensor of the weight's shape and dtype. What it takes beside is the product: four bytes
    for each element. Raises RatelError where the sum is not finite."""
    added = _product(layer, tensors)
    if layer.has_magnitude:
        assert tensors.magnitude is not None
        result = (_factors(layer, weight, added, tensors.magnitude) * (weight + added)).to(weight.dtype)
    else:
        if layer.kind in (EMBEDDING, PARAMETER):
            added = added.to(weight.dtype)
        result = weight.clone().add_(added)
    if not torch.isfinite(result).all():
        raise RatelError("is not finite with its adapter added", field="adapter", value=layer.weight,
                         remedy="Use an adapter of an earlier step; this one has diverged")
    return result


def unties(targets: Targets) -> bool:
    """Whether an embedding and a head that are one parameter are two after merging: one of them has
    an adapter, or was trained as a whole, and the other not. Such a model is stored with both
    weights, and with `tie_word_embeddings` false."""
    outline = targets.outline
    changed = [*targets.layers, *targets.full]
    return bool(outline.tied) and any(part.name in (*outline.tied, outline.embedding) for part in changed) and not any(
        part.tied_to for part in changed)


def merged_parameter(targets: Targets, name: str, weight: Callable[[], Tensor], tensors: Callable[[AdaptedLayer], LayerTensors],
                     full: Mapping[str, Tensor]) -> Tensor:
    """The parameter ``name`` of the merged model. ``full``: those that were trained as a whole."""
    if name in full:
        return full[name]
    layer = targets.by_weight.get(name)
    return weight() if layer is None else merged(layer, weight(), tensors(layer))


def _product(layer: AdaptedLayer, tensors: LayerTensors) -> Tensor:
    a, b = tensors.a.float(), tensors.b.float()
    if not layer.is_stack:
        return as_stored(layer, b @ a) * layer.scale
    a_eri, b_ore = a.view(layer.experts, layer.rank, -1), b.view(-1, layer.rank, layer.experts)
    return torch.einsum("ore,eri->eio" if layer.is_transposed else "ore,eri->eoi", b_ore, a_eri) * layer.scale


def _factors(layer: AdaptedLayer, weight: Tensor, added: Tensor, magnitude: Tensor) -> Tensor:
    """For each output, as the weight is stored, the magnitude over the length of the sum."""
    lengths = torch.linalg.norm(as_stored(layer, weight + added), dim=1)
    return (magnitude.float() / lengths).view(1, -1) if layer.is_transposed else (magnitude.float() / lengths).view(-1, 1)
