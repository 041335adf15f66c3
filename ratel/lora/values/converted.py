"""An adapter that was trained on a changed base (pissa, olora), as one for the base as it is
stored.

Training began at W = (W - s B0 A0) + s B0 A0 and ended at (W - s B0 A0) + s B A. So the original
weight and an adapter of twice the rank, [A; A0] and [B, -B0], give what was trained, but for the
rounding of W - s B0 A0 to the weight's dtype.
"""

import math
from dataclasses import replace

import torch

from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.layers import AdaptedLayer
from ratel.lora.describe.targets import Targets
from ratel.lora.values.initial import LayerTensors


def converted_config(config: LoraConfig) -> LoraConfig:
    """Ranks are doubled, and alpha is made what keeps the scale."""
    more = math.sqrt(2) if config.rslora else 2
    return replace(config, init="default", rank=2 * config.rank, alpha=config.alpha * more,
                   rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
                   alpha_pattern={name: alpha * more for name, alpha in config.alpha_pattern.items()})


def converted_targets(targets: Targets) -> Targets:
    """With the same scales to the last bit."""
    config = converted_config(targets.effective)
    layers = tuple(replace(layer, rank=2 * layer.rank, alpha=config.alpha_of(layer.key)) for layer in targets.layers)
    return replace(targets, config=config, effective=config, layers=layers)


def converted_tensors(layer: AdaptedLayer, trained: LayerTensors, initial: LayerTensors) -> LayerTensors:
    """``initial``: what `ratel.lora.values.initial.initial` gave. The magnitudes of DoRA are of the sum,
    and stay."""
    assert layer.experts == 1, "pissa and olora are not for experts"
    a, b = torch.cat([trained.a, initial.a]), torch.cat([trained.b, -initial.b], dim=1)
    return LayerTensors(a=a, b=b, magnitude=trained.magnitude)
