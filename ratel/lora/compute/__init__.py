"""How adapted linears are computed: orders of the products, kernels, dropout that is made again (docs/lora_compute.md)."""

from ratel.lora.compute.function import Adapter, Frozen, adapted_linear, adapted_linears
from ratel.lora.compute.masks import Dropout, mask_key

__all__ = ["Adapter", "Dropout", "Frozen", "adapted_linear", "adapted_linears", "mask_key"]
