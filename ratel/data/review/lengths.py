"""How long the texts of some files are, as a run with these options would learn from them: made
into tokens once, then kept."""

import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ratel import probe_cache
from ratel.data.batches.encode import Document
from ratel.data.batches.packing import Packer
from ratel.data.review.survey import Survey, open_survey, texts_of
from ratel.data.sources.files import DataArgument
from ratel.data.tokens.tokenizer import fingerprint
from ratel.planner.pricing.lengths import Lengths

_METHOD = 1
"""Raised when texts are counted otherwise: what is kept is then not used."""
_PACKED = 20_000
"""Texts that are packed to find out how full rows get: two seconds of Python. More differ by less
than 1%."""


@dataclass(frozen=True)
class TextLengths:
    """``counts``: (tokens, must it stay whole, texts of the kind). ``bad``: lines that are no
    record."""

    counts: tuple[tuple[int, bool, int], ...]
    bad: int = 0

    @property
    def lengths(self) -> Lengths:
        return Lengths.of((tokens, number) for tokens, _, number in self.counts)

    def packed_rows(self, seq_len: int) -> int:
        """Rows of ``seq_len`` tokens that a run packs them into. It is asked of the packer itself,
        with texts in an order of their own, so that the order of the files does not matter."""
        every = self._shuffled()
        sample = every[:_PACKED]
        packer = Packer(_drawn(sample), seq_len=seq_len, pad_id=0)
        rows = sum(1 for _ in iter(packer.next_row, None))
        tokens = sum(length for length, _ in sample)
        return max(1, round(rows * self.lengths.tokens / tokens))

    def _shuffled(self) -> list[tuple[int, bool]]:
        """All texts, or as many of each kind as a sample of that size has on average."""
        thinned = max(1.0, self.lengths.rows / _PACKED)
        every, owed = [], 0.0
        for tokens, whole, number in self.counts:
            owed += number / thinned
            taken = int(owed + 0.5)
            every += [(tokens, whole)] * taken
            owed -= taken
        random.Random(0).shuffle(every)
        return every


def text_lengths(data: DataArgument | None, *, model: str | None, tokenizer: str | None, seq_len: int) -> TextLengths:
    """Raises RatelError for files that cannot be read."""
    survey = open_survey(data, model=model, tokenizer=tokenizer, seq_len=seq_len)
    key = {"lengths": _METHOD, "tokenizer": fingerprint(survey.tokenizer, renders=True), "seq_len": seq_len,
           "files": [_identity(source.name, source.num_bytes) for source in survey.sources]}
    found = probe_cache.load(key, _from_json)
    if found is None:
        found = _count(survey)
        probe_cache.store(key, {"counts": found.counts, "bad": found.bad})
    return found


def _identity(name: str, num_bytes: int) -> list[Any]:
    """What is held in memory under a name has no time at which it was changed."""
    if not os.path.exists(name):
        return [name, num_bytes]
    return [os.path.abspath(name), num_bytes, os.stat(name).st_mtime_ns]


def _count(survey: Survey) -> TextLengths:
    counts: Counter[tuple[int, bool]] = Counter()
    bad = 0
    for entry in survey.entries:
        if entry.document is None:
            bad += 1
            continue
        for start, end in texts_of(entry.document):
            counts[end - start, entry.document.whole] += 1
    return TextLengths(tuple((tokens, whole, number) for (tokens, whole), number in sorted(counts.items())), bad)


def _from_json(content: dict[str, Any]) -> TextLengths:
    return TextLengths(tuple((int(tokens), bool(whole), int(number)) for tokens, whole, number in content["counts"]), int(content["bad"]))


def _drawn(texts: Iterable[tuple[int, bool]]) -> Any:
    numbered = enumerate(texts)

    def draw() -> tuple[int, Document] | None:
        number, text = next(numbered, (None, None))
        if text is None:
            return None
        tokens, whole = text
        return number, Document(ids=np.zeros(tokens, dtype=np.int32), targets=np.ones(tokens, dtype=bool), whole=whole)

    return draw
