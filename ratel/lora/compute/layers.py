"""Adapters of every kind, put on the layers of a model that a description names."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.lora.compute.dora import DoraLinear
from ratel.lora.compute.embedding import TiedLinear, with_rows
from ratel.lora.compute.experts import with_parameters
from ratel.lora.compute.function import Adapter
from ratel.lora.compute.modules import AdaptedLinear, Draws, adapt
from ratel.lora.describe.layers import PARAMETER, AdaptedLayer
from ratel.lora.describe.outline import EMBEDDING


def adapt_layers(root: nn.Module, layers: Sequence[AdaptedLayer], tensors: Mapping[str, Tensor], *, draws: Draws,
                 stage: str = "", graph: str = "auto") -> dict[str, nn.Module]:
    """Put adapters on layers of ``root``. Returns, by each layer's ``key``, the module that now
    stands under its ``name``; the model's own module is as it was, so that putting it back under
    that name takes the adapter off. Parameters of one module share what stands there.

    ``tensors``: fp32, by the names that the parameters get in ``root`` (``AdaptedLayer.added``:
    ``q_proj.lora_A``, ``experts.down_proj_lora_B``, ``q_proj.lora_magnitude``), with ``a_shape``,
    ``b_shape`` and [out]. A tied layer takes those of its embedding, which stands in ``root`` or is
    among ``layers``. The base's parameters keep their objects and names, and are frozen.
    ``draws``, ``stage``, ``graph``: as of `adapt`; each layer has the dropout that it names.

    Raises RatelError for a layer that cannot be computed, and for tensors of another layer's shape.
    """
    for layer in layers:
        _check(root, layer, tensors)
    linears = [layer for layer in layers if _is_plain(layer)]
    made: dict[str, nn.Module] = {}
    for p in sorted({layer.dropout for layer in linears}):
        adapters = {layer.key: _adapter(layer, tensors) for layer in linears if layer.dropout == p}
        made |= adapt(root, adapters, draws=draws, stage=stage, dropout=p, graph=graph)
    for name, of_module in _by_module(layer for layer in layers if not _is_plain(layer)).items():
        module = _made(root, of_module, tensors, graph)
        _put(root, name, module)
        if isinstance(module, AdaptedLinear):
            draws.add(module, stage, (name,))
        made |= {layer.key: module for layer in of_module}
    return made


def _is_plain(layer: AdaptedLayer) -> bool:
    """Whether it is a linear with A and B of its own, and nothing else."""
    return layer.kind not in (EMBEDDING, PARAMETER) and not layer.has_magnitude and layer.tied_to is None


def _by_module(layers: Iterable[AdaptedLayer]) -> dict[str, list[AdaptedLayer]]:
    """Those that have another's tensors come last."""
    found: dict[str, list[AdaptedLayer]] = {}
    for layer in sorted(layers, key=lambda layer: layer.tied_to is not None):
        found.setdefault(layer.name, []).append(layer)
    return found


def _made(root: nn.Module, layers: list[AdaptedLayer], tensors: Mapping[str, Tensor], graph: str) -> nn.Module:
    first, base = layers[0], root.get_submodule(layers[0].name)
    if first.kind == PARAMETER:
        return with_parameters(base, layers, tensors)
    if first.tied_to is not None:
        return TiedLinear(base, root.get_submodule(first.tied_to), scale=first.scale, p=first.dropout, graph=graph)
    magnitude = tensors[f"{first.name}.lora_magnitude"] if first.has_magnitude else None
    if first.kind == EMBEDDING:
        return with_rows(base, _adapter(first, tensors), magnitude)
    assert magnitude is not None
    return DoraLinear(base, _adapter(first, tensors), magnitude, p=first.dropout)


def _adapter(layer: AdaptedLayer, tensors: Mapping[str, Tensor]) -> Adapter:
    return Adapter(a=tensors[f"{layer.name}.lora_A"], b=tensors[f"{layer.name}.lora_B"], scale=layer.scale)


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
    for own, parameter in module.named_parameters(recurse=False):
        if "lora_" not in own:
            parameter.requires_grad_(False)


def _check(root: nn.Module, layer: AdaptedLayer, tensors: Mapping[str, Tensor]) -> None:
    weight = root.get_submodule(layer.name)._parameters[layer.parameter]
    matrix = (layer.in_features, layer.out_features) if layer.is_transposed else (layer.out_features, layer.in_features)
    expected = {layer.weight: (layer.experts, *matrix) if layer.is_stack else matrix}
    expected |= {own: layer.file_shapes[in_file] for own, in_file in layer.added.items()}
    found = {name: tuple(weight.shape if name == layer.weight else tensors[name].shape) for name in expected}
    for name, shape in found.items():
        if shape != expected[name]:
            raise RatelError(f"has the shape {list(shape)}, and a layer of {layer.out_features} x {layer.in_features} of rank "
                             f"{layer.rank} has {list(expected[name])}", field="adapter", value=name,
                             remedy="Use an adapter that was made for this model")
