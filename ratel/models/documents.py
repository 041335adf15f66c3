"""Keeping documents apart that share a sequence: ``position_ids`` that restart at 0 mark where one begins.

Most models of transformers see the restarts themselves and mask attention accordingly. For the others a mask is made
here, if they take one. Models with a recurrent state carry it over, whatever the mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers, as configurations name them, in which a mask decides what a token sees."""


@contextmanager
def watch_packing() -> Iterator[list[bool]]:
    """Collects whether transformers' masking looked for restarts during the forwards inside, and found any."""
    from transformers import masking_utils

    seen: list[bool] = []
    original = masking_utils.find_packed_sequence_indices

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        seen.append(found is not None)
        return found

    masking_utils.find_packed_sequence_indices = watched
    try:
        yield seen
    finally:
        masking_utils.find_packed_sequence_indices = original


def attends_only(module: nn.Module) -> bool:
    """Whether tokens meet in attention alone: no recurrence, no convolution over time."""
    config = module.config.get_text_config() if hasattr(module, "config") else None
    kinds = set(getattr(config, "layer_types", None) or ())
    return kinds <= ATTENTION_KINDS and not any(isinstance(m, nn.Conv1d) for m in module.modules())


def restarts(position_ids: Tensor) -> bool:
    """Whether any row holds more than one document. Free for a CPU tensor; waits for the device otherwise."""
    return bool((position_ids[:, 1:] != position_ids[:, :-1] + 1).any())


def document_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """``[batch, 1, query, key]``, to be added to attention scores: causal, and within a document."""
    document = torch.zeros_like(position_ids)
    document[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).cumsum(-1)
    length = position_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    seen = causal & (document[:, :, None] == document[:, None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
