"""Rotary frequencies that are chosen by length ("longrope": Phi-3 128k, Phi-3.5, Phi-4-mini).

transformers takes the long factors for a call in which any position lies beyond the length of
pretraining, and the short ones otherwise, and writes what it has chosen to a buffer. That buffer is
no state: every forward writes it before it reads it, from its positions alone. What must not decide
is how a batch is cut into micro-batches: the longest document of the whole batch does.
"""

from typing import Any

import torch
from torch import Tensor, nn

NAME = "longrope"


class LongRope:
    """The rotary modules of a model that choose so; there may be none."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = [_Frequencies(module, kind, rope) for module in root.modules() for kind, rope in _choosing(module)]

    def __bool__(self) -> bool:
        return bool(self._modules)

    def begin(self, batch: Any) -> None:
        """Choose for this batch of token ids, of which any rows may pass the model together from
        now on."""
        if not self._modules:
            return
        positions = batch.get("position_ids")
        length = batch["input_ids"].shape[-1] if positions is None else int(positions.max()) + 1
        for frequencies in self._modules:
            frequencies.choose(length)

    def close(self) -> None:
        for frequencies in self._modules:
            frequencies.choose(0)


class _Frequencies:
    """The frequencies of one module, or of one kind of its layers. Where the long ones are chosen
    they stand in the place of the short ones as well, so that whichever the module's own code asks
    for is long."""

    def __init__(self, module: nn.Module, kind: str | None, rope: dict[str, Any]) -> None:
        self._module, self._kind = module, kind
        self._name = "original_inv_freq" if kind is None else f"{kind}_original_inv_freq"
        self._limit = rope["original_max_position_embeddings"]
        self._short: Tensor = getattr(module, self._name)
        self._long: Tensor | None = None

    def choose(self, length: int) -> None:
        setattr(self._module, self._name, self._made_long() if length > self._limit else self._short)

    def _made_long(self) -> Tensor:
        if self._long is None:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            self._long, _ = ROPE_INIT_FUNCTIONS[NAME](self._module.config, self._short.device, seq_len=self._limit + 1,
                                                      layer_type=self._kind)
        return self._long


def chosen_buffers(root: nn.Module) -> set[str]:
    """Names of the buffers that such modules write to."""
    names = {id(module): name for name, module in root.named_modules()}
    return {f"{names[id(module)]}.{'' if kind is None else kind + '_'}inv_freq"
            for module in root.modules() for kind, _ in _choosing(module)}


def _choosing(module: nn.Module) -> list[tuple[str | None, dict[str, Any]]]:
    """Kinds of layers (None: all) for which a module chooses, with their settings."""
    kinds, settings = getattr(module, "rope_type", None), getattr(getattr(module, "config", None), "rope_parameters", None)
    if kinds == NAME and hasattr(module, "original_inv_freq"):
        return [(None, settings)]
    if not isinstance(kinds, dict):
        return []
    return [(kind, settings[kind]) for kind, name in kinds.items() if name == NAME and hasattr(module, f"{kind}_original_inv_freq")]
