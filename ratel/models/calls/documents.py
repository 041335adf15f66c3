"""Keeping documents apart that share a sequence: ``position_ids`` that restart at 0 mark where one
begins.

The mask functions of transformers see restarts and mask attention accordingly, each kind of layer
by its own window, if a model hands them the positions. Here they are shown to them in every model.
For models that make no mask by these functions one is made here, if they take one. Whether
documents are apart then is not concluded but tried (`ratel.models.checks.family`).
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

OWN, MADE = "own", "made"
"""How documents are kept apart: by masks that the model makes itself, or by one that is made
here."""

_FUNCTIONS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate")


class MaskFunctions:
    """The mask functions of transformers that the code of a model calls, by where it finds them."""

    def __init__(self, module: nn.Module) -> None:
        from transformers import masking_utils

        functions = [getattr(masking_utils, name) for name in _FUNCTIONS if hasattr(masking_utils, name)]
        sources = {type(child).__module__ for child in module.modules()}
        self._places: list[tuple[ModuleType, str, Callable]] = [
            (sys.modules[source], name, value) for source in sorted(sources) if source in sys.modules
            for name, value in vars(sys.modules[source]).items() if any(value is function for function in functions)]

    @contextmanager
    def shown(self, position_ids: Tensor) -> Iterator[None]:
        """Inside they see these positions where the model does not hand them any."""
        for source, name, function in self._places:
            setattr(source, name, _showing(function, position_ids))
        try:
            yield
        finally:
            for source, name, function in self._places:
                setattr(source, name, function)


def _showing(function: Callable, position_ids: Tensor) -> Callable:
    names = list(inspect.signature(function).parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
        embeds = given.get("inputs_embeds", given.get("input_embeds"))
        if given.get("position_ids") is None and embeds is not None and embeds.shape[1] == position_ids.shape[-1]:
            if _hides_nothing(given.get("attention_mask")):
                return function(**{**given, "position_ids": position_ids, "attention_mask": None})
        return function(*args, **kwargs)

    return call


def _hides_nothing(attention_mask: Any) -> bool:
    """Some models make a mask of ones where none is given, and restarts are looked for only where
    there is none."""
    return attention_mask is None or isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and bool(attention_mask.all())


def restarts(position_ids: Tensor) -> bool:
    """Whether any row holds more than one document. Free for a CPU tensor; waits for the device
    otherwise."""
    return bool((position_ids[:, 1:] != position_ids[:, :-1] + 1).any())


def document_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """``[batch, 1, query, key]``, to be added to attention scores: causal, and within a
    document."""
    document = torch.zeros_like(position_ids)
    document[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).cumsum(-1)
    length = position_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    seen = causal & (document[:, :, None] == document[:, None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
