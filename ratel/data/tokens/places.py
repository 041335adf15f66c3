"""Where a long text may be cut so that its parts, tokenised one by one, have the tokens of the
whole (docs/data.md, "Long lines").

A tokenizer works in four stages: added tokens are found, the text between them is normalised,
split, and each split is given to the model by itself. At a place of a kind below none of the first
three looks across, for the kinds of normalisers and splitters listed here: that is tried on words
between every two signs of ASCII. Then the splits of the parts are those of the whole, or at such a
place two of them are one in the whole. The latter is as good where the model is a BPE none of whose
tokens holds such a place inside: all that merges make are tokens, so nothing is ever merged across.
"""

import json
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTER = r"[^\W\d_]"
_NORMALIZERS = {"BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace",
                "Sequence", "Strip", "StripAccents"}
_SPLITTERS = {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Sequence", "Split",
              "Whitespace", "WhitespaceSplit"}
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}
_BLANKS = re.compile(r"(\\[snrt]| |\[(\\[snrt]| )+\])([+*]|\{\d+,?\d*\})?")
"""A regular expression that matches blanks only."""
_BLANK_SYMBOLS = str.maketrans("Ġ▁Ċ", "  \n")
"""How vocabularies write blanks."""
_SIGNS = [*string.punctuation, "1", "\n", "«", "“"]
_LETTERS = "aÉжλאحकあ語한"


@dataclass(frozen=True, kw_only=True)
class Place:
    """``cut`` finds such places, each beside a letter; ``before``: a text that ends as what stands
    before one; ``probe``: a text with some, for `str.format`."""

    cut: re.Pattern[str]
    before: str
    probe: str

    def last(self, text: str, start: int, end: int) -> int | None:
        """The last place to cut between ``start`` and ``end``."""
        reach = 1 << 10
        while True:
            low = max(start + 1, end - reach)
            found = [match.start() for match in self.cut.finditer(text, low, end)]
            if found or low == start + 1:
                return found[-1] if found else None
            reach *= 8

    def next(self, text: str, start: int) -> int | None:
        found = self.cut.search(text, start)
        return None if found is None else found.start()


WORDS = Place(cut=re.compile(rf"(?<={_LETTER})(?= {_LETTER})"), before="a", probe="{}ab cd{} Ef gh{}")
LINES = Place(cut=re.compile(rf"(?<=\S\n)(?={_LETTER})"), before="a\n", probe="{}ab\ncd{}\nEf\nGh{} x")
"""After one line break. Many splitters part the last one of several from the others, but not where
a text ends."""
SIGNS = Place(cut=re.compile(rf"(?<={_LETTER})(?=[。，、！？；：])"), before="a", probe="{}語。好{}，Ab、é！{}")
"""Before a sign of Chinese or Japanese, which have no spaces."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """``text`` begins at a place; ``before`` is what to put before it."""

    text: str
    before: str


def parts_of(text: str, places: list[Place], size: int) -> Iterator[Part]:
    """The parts of a text, of about ``size`` characters each, and more where there is no place."""
    start, before = 0, ""
    while start < len(text):
        end, next_before = _end_of_part(text, start, places, size)
        yield Part(text=text[start:end], before=before)
        start, before = end, next_before


def _end_of_part(text: str, start: int, places: list[Place], size: int) -> tuple[int, str]:
    whole = len(text), ""
    if len(text) - start <= size:
        return whole
    ends = [(end, place.before) for place in places if (end := place.last(text, start, start + size)) is not None]
    if ends:
        return max(ends)
    return min(((end, place.before) for place in places if (end := place.next(text, start + size - 1)) is not None), default=whole)


def places_of(tokenizer: "PreTrainedTokenizerBase") -> list[Place]:
    """The kinds of places at which texts may be cut for this tokenizer; none where that cannot be
    shown."""
    if not _is_plain(tokenizer):
        return []
    backend = tokenizer.backend_tokenizer
    stages = json.loads(backend.to_str())
    if not _is_known(stages):
        return []
    return [place for place in (WORDS, LINES, SIGNS)
            if not any(_crosses(token, place) for token in stages["added_tokens"]) and _holds(place, backend, stages["model"])]


def _is_plain(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """All that it does to a text is done by the library of that name."""
    from transformers import PreTrainedTokenizerFast

    names = [name for name in ("__call__", "_encode_plus", "_batch_encode_plus") if hasattr(PreTrainedTokenizerFast, name)]
    return (isinstance(tokenizer, PreTrainedTokenizerFast)
            and all(getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name) for name in names))


def _is_known(stages: dict[str, Any]) -> bool:
    return (all(one["type"] in _NORMALIZERS and _replaces_no_letters(one) for one in _stages_in(stages["normalizer"]))
            and all(one["type"] in _SPLITTERS for one in _stages_in(stages["pre_tokenizer"]))
            and stages["model"].get("type") in _MODELS and not stages["model"].get("dropout"))


def _stages_in(stage: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The stage, and those that it is a sequence of."""
    if stage is not None:
        yield stage
        for part in stage.get("normalizers", stage.get("pretokenizers", [])):
            yield from _stages_in(part)


def _replaces_no_letters(stage: dict[str, Any]) -> bool:
    """There is a letter at every place, so what has none does not reach across. Of expressions
    those of blanks are known."""
    if stage["type"] != "Replace":
        return True
    pattern = stage["pattern"]
    return _BLANKS.fullmatch(pattern["Regex"]) is not None if "Regex" in pattern else not any(map(str.isalpha, pattern["String"]))


def _crosses(token: dict[str, Any], place: Place) -> bool:
    """An added token may take the blanks beside it, too."""
    content = token["content"]
    takes_blanks = token["lstrip"] and content[:1].isalpha() or token["rstrip"] and content[-1:].isalpha()
    return takes_blanks or place.cut.search(content.translate(_BLANK_SYMBOLS)) is not None


def _holds(place: Place, backend: Any, model: dict[str, Any]) -> bool:
    probe = "".join(place.probe.format(left, right, right) for left in _SIGNS for right in _SIGNS)
    probe += "".join(place.probe.format(left, right, left) for left in _LETTERS for right in _LETTERS)
    parts = [_splits_behind(backend, part.before, part.text) for part in _every_part(probe, place)]
    joints = None if None in parts else _joints(_splits(backend, probe), parts)
    return joints is not None and (not joints or _never_merges(joints, model))


def _every_part(text: str, place: Place) -> Iterator[Part]:
    cuts = [0, *(match.start() for match in place.cut.finditer(text)), len(text)]
    for start, end in zip(cuts, cuts[1:]):
        yield Part(text=text[start:end], before=place.before if start else "")


def _splits(backend: Any, text: str) -> list[str]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [text] if backend.pre_tokenizer is None else [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _splits_behind(backend: Any, before: str, text: str) -> list[str] | None:
    """The pieces into which a text is split behind another one. None where the other one's pieces
    then change."""
    alone, both = _splits(backend, before) if before else [""], _splits(backend, before + text)
    *whole, last = alone
    if both[:len(whole)] != whole or not both[len(whole):] or not both[len(whole)].startswith(last):
        return None
    rest = both[len(whole)][len(last):]
    return [*([rest] if rest else []), *both[len(alone):]]


def _joints(whole: list[str], parts: list[list[str]]) -> set[tuple[str, str]] | None:
    """Where splits of the whole are made of the last one of a part and the first one of the next:
    the characters there. None where they differ in anything else."""
    flat = [(split, number == 0) for part in parts for number, split in enumerate(part)]
    at, joints = 0, set()
    for split in whole:
        found, at = flat[at][0] if at < len(flat) else "", at + 1
        while found != split and at < len(flat) and flat[at][1]:
            joints.add((found[-1], flat[at][0][0]))
            found, at = found + flat[at][0], at + 1
        if found != split:
            return None
    return joints if at == len(flat) else None


def _never_merges(joints: set[tuple[str, str]], model: dict[str, Any]) -> bool:
    """The character on one side is always the same there, and no token has it so beside another.
    The model knows it, too: else two unknown characters could become one token."""
    if model["type"] != "BPE" or any(model.get(key) for key in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")):
        return False
    for side in (1, 0):
        edges = {joint[side] for joint in joints}
        if len(edges) == 1 and edges <= model["vocab"].keys():
            edge = re.escape(edges.pop())
            inside = re.compile(f"[^{edge}]{edge}" if side else f"{edge}[^{edge}]")
            return not any(map(inside.search, model["vocab"]))
    return False
