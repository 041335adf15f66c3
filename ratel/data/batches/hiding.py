"""Hiding tokens for `masked-lm`: of a text's tokens 15 percent are targets; of these 80 percent
become the mask token, 10 percent some token of the vocabulary, and the others stay.

Which ones depends on the seed, the epoch, the document and the place in it alone, by a hash of them
that is ours: a run that is resumed hides what it would have hidden, whatever version of a library
it meets.
"""

from typing import TYPE_CHECKING

import numpy as np

from ratel.data.batches.packing import NO_LOSS
from ratel.errors import RatelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS, MASKED, RANDOM = 0.15, 0.8, 0.1
_MASK = (1 << 64) - 1


class Hiding:
    """Special tokens are never targets. Raises RatelError for a tokenizer without a mask token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", seed: int) -> None:
        if tokenizer.mask_token_id is None:
            raise RatelError("the tokenizer has no mask token, which stands for the tokens that are hidden", field="model",
                             remedy='Set "mask_token" in its tokenizer_config.json, or train for another task')
        self._mask_id, self._vocab_size, self._seed = tokenizer.mask_token_id, len(tokenizer), seed
        self._special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int32)

    def hide(self, ids: np.ndarray, key: tuple[int, ...], start: int) -> tuple[np.ndarray, np.ndarray]:
        """``ids`` int32 ``[n]`` of a document's tokens from ``start`` on, with some of them hidden;
        and int32 ``[n]`` what they were, `NO_LOSS` elsewhere."""
        places = np.arange(start, start + len(ids), dtype=np.uint64)
        chance, fate, other = (uniform(places, (self._seed, *key, stream)) for stream in range(3))
        is_target = (chance < TARGETS) & ~np.isin(ids, self._special)
        hidden = np.where(is_target & (fate < MASKED), self._mask_id, ids)
        is_random = is_target & (fate >= MASKED) & (fate < MASKED + RANDOM)
        hidden = np.where(is_random, (other * self._vocab_size).astype(np.int32), hidden)
        return hidden.astype(np.int32), np.where(is_target, ids, NO_LOSS).astype(np.int32)


def uniform(places: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """A number for each place (uint64) in ``[0, 1)`` that the key fixes: the finalizer of
    splitmix64, twice for each part."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(state ^ np.uint64(part & _MASK))
        return (_mix(_mix(places ^ state)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
