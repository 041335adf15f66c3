"""Texts as tokens, and texts that go on where others end.

Many tokenizers put a space before a text (SentencePiece's way: Llama 2, Mistral, T5). Before the continuation of a text
there must be none: then the tokens of both say exactly what was written.
"""

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", "1", "(", "A b")
_ANCHORS = ("\n", "=", "a", ")")


class Pieces:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer

    def first(self, text: str) -> list[int]:
        """The tokens of a text that nothing stands before."""
        if not text:
            return []
        return list(self._tokenizer(text, add_special_tokens=False, return_attention_mask=False,
                                    verbose=False)["input_ids"])

    def next(self, text: str) -> list[int]:
        """The tokens of a text that follows another directly: nothing is put before it."""
        return self._anchored(text) if text and self._adds_something else self.first(text)

    def after(self, before: str, text: str) -> list[int]:
        """The tokens of a text as they are when it is tokenised together with what stands before it, whose tokens stay as
        they are; else as ``next``. Some tokenizers put a space after every special token, too."""
        if text and self._adds_something:
            alone, both = self.next(before), self.next(before + text)
            if both[:len(alone)] == alone:
                return both[len(alone):]
        return self.next(text)

    @cached_property
    def _adds_something(self) -> bool:
        return any(self._anchored(probe) != self.first(probe) for probe in _PROBES)

    @cached_property
    def _anchors(self) -> list[tuple[str, list[int]]]:
        return [(anchor, ids) for anchor in _ANCHORS if (ids := self.first(anchor))]

    def _anchored(self, text: str) -> list[int]:
        """Tokenised behind another character whose own tokens stay as they are, so that they can be taken off."""
        alone = self.first(text)
        found = None
        for anchor, anchor_ids in self._anchors:
            ids = self.first(anchor + text)
            if ids[:len(anchor_ids)] != anchor_ids or len(ids) == len(anchor_ids):
                continue  # it grew together with the text, or the text with it
            rest = ids[len(anchor_ids):]
            if self._text(ids) == self._text(anchor_ids) + text:
                return rest
            if found is None and self._text(rest).strip() == self._text(alone).strip():
                found = rest  # of a tokenizer that loses something anyway, as case or spaces
        return alone if found is None else found

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
