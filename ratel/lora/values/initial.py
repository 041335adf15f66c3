"""What an adapter begins with, in peft's ways. Each tensor has a seed of its own, from the run's
seed and the tensor's name, so that neither the order of layers nor where they are changes a bit of
it."""

import math
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor, nn

from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.layers import PARAMETER, AdaptedLayer
from ratel.lora.describe.outline import EMBEDDING


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """A [E*r, in], B [out, r*E], and the magnitudes [out] of DoRA; fp32."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


def initial(layer: AdaptedLayer, config: LoraConfig, seed: int, weight: Tensor | None = None) -> LayerTensors:
    """On the CPU. ``weight``: the parameter as the model has it, which is needed where
    `needs_weight` says so; it is not changed.

    With an init that takes from the base, the layer begins as the base if it goes on with
    `residual` in the place of the weight.
    """
    assert layer.tied_to is None, "a tied layer has the tensors of another"
    if _takes_from_base(layer, config):
        assert weight is not None
        a, b = _principal(layer, config, seed, weight) if config.init != "olora" else _orthogonal(layer, weight)
        start = residual(layer, weight.float(), a, b)
    else:
        a, b = _drawn(layer, config, seed)
        start = weight
    if not layer.has_magnitude:
        return LayerTensors(a=a, b=b)
    assert start is not None
    return LayerTensors(a=a, b=b, magnitude=norms(layer, start, a, b))


def needs_weight(layer: AdaptedLayer, config: LoraConfig) -> bool:
    return layer.has_magnitude or _takes_from_base(layer, config)


def residual(layer: AdaptedLayer, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The weight without what the adapter begins with, rounded to the weight's dtype: the base that
    pissa and olora train on."""
    return as_stored(layer, (as_matrix(layer, weight.float()) - (layer.scale * b) @ a).to(weight.dtype))


def norms(layer: AdaptedLayer, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """For each output, in fp32, the length of its row in W + s B A. DoRA's magnitudes begin as
    these."""
    return torch.linalg.norm(as_matrix(layer, weight.float()) + layer.scale * (b @ a), dim=1)


def as_matrix(layer: AdaptedLayer, weight: Tensor) -> Tensor:
    """[out, in], however it is stored. For layers without experts."""
    return weight.t() if layer.is_transposed else weight


as_stored = as_matrix
"""The other way; the same operation."""


def seed_of(seed: int, name: str) -> int:
    """A seed for one tensor. 63 bits, which every generator takes."""
    return int.from_bytes(sha256(f"ratel-lora:{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _takes_from_base(layer: AdaptedLayer, config: LoraConfig) -> bool:
    """Embeddings begin as always, in peft, too."""
    return config.changes_base and layer.kind not in (EMBEDDING, PARAMETER)


def _drawn(layer: AdaptedLayer, config: LoraConfig, seed: int) -> tuple[Tensor, Tensor]:
    """One half is zero. Of an embedding, which looks A up, it is A."""
    a, b = torch.zeros(layer.a_shape), torch.zeros(layer.b_shape)
    if layer.kind == EMBEDDING:
        nn.init.normal_(b, generator=_generator(seed, layer.b_name))
    elif config.init == "gaussian":
        nn.init.normal_(a, std=1 / layer.rank, generator=_generator(seed, layer.a_name))
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=_generator(seed, layer.a_name))
    return a, b


def _principal(layer: AdaptedLayer, config: LoraConfig, seed: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """pissa: the largest singular values, half of each root on either side."""
    matrix, rank = as_matrix(layer, weight.float()), layer.rank
    if config.svd_steps is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, layer.a_name))
            left, values, right = torch.svd_lowrank(matrix, rank, niter=config.svd_steps)
        right = right.t()
    root = torch.diag(torch.sqrt(values / layer.scale))
    return root @ right, left @ root


def _orthogonal(layer: AdaptedLayer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """olora: the first columns and rows of a QR decomposition."""
    q, r = torch.linalg.qr(as_matrix(layer, weight.float()))
    return r[:layer.rank].contiguous(), q[:, :layer.rank].contiguous()


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, name))
