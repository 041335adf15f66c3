"""Adapters of every kind, put on the layers of a model that a description names."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.lora.compute.function import Adapter
from ratel.lora.compute.modules import Draws, adapt
from ratel.lora.describe.layers import AdaptedLayer
from ratel.lora.describe.outline import CONV1D, LINEAR


def adapt_layers(root: nn.Module, layers: Sequence[AdaptedLayer], tensors: Mapping[str, Tensor], *, draws: Draws, stage: str = "",
                 graph: str = "auto") -> dict[str, nn.Module]:
    """Put adapters on layers of ``root``. Returns, by each layer's ``key``, the module that now
    stands under its ``name``; the model's own module is as it was, so that putting it back under
    that name takes the adapter off. Parameters of one module share what stands there.

    ``tensors``: fp32, by the names that the parameters get in ``root`` (``AdaptedLayer.added``:
    ``q_proj.lora_A``, ``experts.down_proj_lora_B``, ``q_proj.lora_magnitude``), with ``a_shape``,
    ``b_shape`` and [out]. The base's parameters keep their objects and names, and are frozen.
    ``draws``, ``stage``, ``graph``: as of `adapt`; each layer has the dropout that it names.

    Raises RatelError for a layer that cannot be computed, and for tensors of another layer's shape.
    """
    _refuse(layers)
    made: dict[str, nn.Module] = {}
    for p in sorted({layer.dropout for layer in layers}):
        adapters = {layer.key: _adapter(layer, tensors) for layer in layers if layer.dropout == p}
        made |= adapt(root, adapters, draws=draws, stage=stage, dropout=p, graph=graph)
    return made


def _adapter(layer: AdaptedLayer, tensors: Mapping[str, Tensor]) -> Adapter:
    return Adapter(a=tensors[f"{layer.name}.lora_A"], b=tensors[f"{layer.name}.lora_B"], scale=layer.scale)


def _refuse(layers: Sequence[AdaptedLayer]) -> None:
    for layer in layers:
        if layer.kind not in (LINEAR, CONV1D) or layer.has_magnitude or layer.tied_to:
            raise RatelError("has an adapter of a kind that is not computed yet", field="targets", value=layer.key,
                             remedy="Leave it out of the targets")
