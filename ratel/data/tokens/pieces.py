"""Texts as tokens, and texts that go on where others end.

Many tokenizers put a space before a text (SentencePiece's way: Llama 2, Mistral, T5). Before the
continuation of a text there must be none: then the tokens of both say exactly what was written.

A long text is tokenised in pieces, which takes a tokenizer 200 to 400 bytes a token otherwise.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ratel import interrupt
from ratel.data.tokens.places import Part, Place, parts_of, places_of
from ratel.units import format_bytes, format_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Ids = np.ndarray
"""Token ids, int32 ``[n]``."""

PIECE = 1 << 18
"""Characters of a long text that are tokenised at once."""
LONG = 1 << 20
"""Characters of a text that is tokenised in pieces; if it cannot be, that is said."""
TELLS_AFTER_S = 5.0
_BYTES_A_CHARACTER = 200

_PROBES = ("a", "1", "(", "A b")
_ANCHORS = ("\n", "=", "a", ")")
_NO_IDS = np.zeros(0, dtype=np.int32)


class Pieces:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer

    def first(self, text: str) -> Ids:
        """The tokens of a text that nothing stands before."""
        return self._in_pieces(text, self._alone)

    def next(self, text: str) -> Ids:
        """The tokens of a text that follows another directly: nothing is put before it."""
        return self._in_pieces(text, self._anchored) if text and self._adds_something else self.first(text)

    def after(self, before: str, text: str) -> Ids:
        """The tokens of a text as they are when it is tokenised together with what stands before
        it, whose tokens stay as they are; else as ``next``. Some tokenizers put a space after every
        special token, too."""
        if text and self._adds_something:
            alone, both = self.next(before), self.next(before + text)
            if _begins_with(both, alone):
                return both[len(alone):]
        return self.next(text)

    @cached_property
    def _adds_something(self) -> bool:
        return any(self._anchored(probe).tolist() != self._alone(probe).tolist() for probe in _PROBES)

    @cached_property
    def _anchors(self) -> list[tuple[str, Ids]]:
        return [(anchor, ids) for anchor in _ANCHORS if len(ids := self._alone(anchor))]

    def _alone(self, text: str) -> Ids:
        if not text:
            return _NO_IDS
        return np.array(self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"],
                        dtype=np.int32)

    def _anchored(self, text: str) -> Ids:
        """Tokenised behind another character whose own tokens stay as they are, so that they can be
        taken off."""
        alone = self._alone(text)
        found = None
        for anchor, anchor_ids in self._anchors:
            ids = self._alone(anchor + text)
            if not _begins_with(ids, anchor_ids) or len(ids) == len(anchor_ids):
                continue  # it grew together with the text, or the text with it
            rest = ids[len(anchor_ids):]
            if self._text(ids) == self._text(anchor_ids) + text:
                return rest
            if found is None and self._text(rest).strip() == self._text(alone).strip():
                found = rest  # of a tokenizer that loses something anyway, as case or spaces
        return alone if found is None else found

    def _text(self, ids: Ids) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # -- long texts ----------------------------------------------------------------------------------------------

    @cached_property
    def _places(self) -> list[Place]:
        return places_of(self._tokenizer)

    def _in_pieces(self, text: str, begin: Callable[[str], Ids]) -> Ids:
        """``begin`` makes the tokens of the first part."""
        if len(text) <= LONG:
            return begin(text)
        found, told = [], _Told(text)
        for part in parts_of(text, self._places, PIECE):
            interrupt.check()
            told.before(part.text)
            found.append(self._behind(part) if part.before else begin(part.text))
        return np.concatenate(found)

    def begin(self, text: str, count: int) -> str:
        """So much of a long text as its first ``count`` tokens come from, at least."""
        if len(text) <= LONG:
            return text
        end, found = 0, 0
        for part in parts_of(text, self._places, PIECE):
            end += len(part.text)
            found += len(self._behind(part) if part.before else self._alone(part.text))
            if found >= count:
                break
        return text[:end]

    def _behind(self, part: Part) -> Ids:
        before, both = self._alone(part.before), self._alone(part.before + part.text)
        assert _begins_with(both, before)
        return both[len(before):]


class _Told:
    """What is said while a long text is tokenised."""

    def __init__(self, text: str) -> None:
        self._length, self._done = len(text), 0
        self._last_s = perf_counter()

    def before(self, part: str) -> None:
        """Note that the part is the next one."""
        if len(part) > LONG:
            log.warning("%s of a text are tokenised at once, since no place to cut them is known for this tokenizer: that takes a while "
                        "and about %s of memory", format_count(len(part), "character"), format_bytes(_BYTES_A_CHARACTER * len(part)))
        elif perf_counter() - self._last_s >= TELLS_AFTER_S:
            self._last_s = perf_counter()
            log.warning("a text of %s is tokenised in pieces: %.0f%%", format_count(self._length, "character"), 100 * self._done / self._length)
        self._done += len(part)


def _begins_with(ids: Ids, others: Ids) -> bool:
    return np.array_equal(ids[:len(others)], others)
