"""How adapted linears are computed: orders of the products, kernels, dropout that is made again
(docs/lora_compute.md)."""

from ratel.lora.compute.function import Adapter, Frozen, adapted_linear, adapted_linears
from ratel.lora.compute.layers import adapt_layers
from ratel.lora.compute.masks import Dropout, mask_key
from ratel.lora.compute.modules import AdaptedLinear, Draws, adapt
from ratel.lora.compute.ops import use_kernels

__all__ = ["AdaptedLinear", "Adapter", "Draws", "Dropout", "Frozen", "adapt", "adapt_layers", "adapted_linear", "adapted_linears",
           "mask_key", "use_kernels"]
