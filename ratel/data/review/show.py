"""A record as it is trained on: which text is context, which is to be learned, and the tokens at
each border."""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ratel.data.review.survey import Entry, Totals, learned_of, texts_of
from ratel.data.sources.records import Chat, Completion
from ratel.units import format_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLOUR, _GREY, _RED, _PLAIN = "\033[1;32m", "\033[2m", "\033[31m", "\033[0m"
_AROUND = 4
"""Tokens on either side of a border."""


class Viewer:
    """``colour``: targets are green and bold; else they stand between [[ and ]]."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, seq_len: int, colour: bool) -> None:
        self._tokenizer, self._seq_len, self._colour = tokenizer, seq_len, colour

    def to_json(self, entry: Entry) -> dict[str, Any]:
        place: dict[str, Any] = {"file": entry.source.name, "line": entry.error_line}
        if entry.document is None:
            assert entry.error is not None
            return {**place, "problem": str(entry.error), "expected": entry.error.expected}
        document, learned = entry.document, learned_of(entry.document)
        texts = [{"tokens": end - start, "is_cut": end - start > self._seq_len,
                  "parts": self._parts(document.ids[start:end], learned[start:end]),
                  "borders": self._borders(document.ids[start:end], learned[start:end])}
                 for start, end in texts_of(document)]
        return {**place, "kind": _kind(entry), "tokens": len(document), "targets": int(learned.sum()), "texts": texts}

    def to_text(self, entry: Entry) -> str:
        shown = self.to_json(entry)
        head = f"{shown['file']}, line {shown['line']}: "
        if "problem" in shown:
            return self._in(_RED, head + f"{shown['problem']}. {shown['expected']}")
        head += f"{shown['kind']}, {format_count(shown['tokens'], 'token')}, {format_count(shown['targets'], 'target')}"
        if len(shown["texts"]) > 1:
            head += f", in {len(shown['texts'])} texts, because the template rewrites what was said before"
        return "\n".join([head, *(self._text(number, text, len(shown["texts"]))
                                  for number, text in enumerate(shown["texts"], start=1))])

    def _text(self, number: int, text: dict[str, Any], count: int) -> str:
        lines = [self._in(_GREY, f"--- text {number} of {count}, {format_count(text['tokens'], 'token')}")] if count > 1 else []
        if text["is_cut"]:
            lines.append(self._in(_RED, f"longer than a sequence of {self._seq_len} tokens: it is cut"))
        lines.append("".join(self._marked(part["text"], part["is_target"]) for part in text["parts"]))
        for border in text["borders"]:
            before, after = (" ".join(map(_quoted, border[side])) for side in ("before", "after"))
            lines.append(self._in(_GREY, f"  token {border['token']}: {before} | {after}"))
        return "\n".join(lines)

    def _marked(self, text: str, is_target: bool) -> str:
        if self._colour:
            return self._in(_COLOUR, text) if is_target else text
        return f"[[{text}]]" if is_target else text

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colour else text

    def _parts(self, ids: Any, targets: Any) -> list[dict[str, Any]]:
        numbered = groupby(range(len(ids)), key=lambda index: bool(targets[index]))
        return [{"text": self._decode([int(ids[index]) for index in run]), "is_target": is_target}
                for is_target, run in numbered]

    def _borders(self, ids: Any, targets: Any) -> list[dict[str, Any]]:
        return [{"token": index, "before": [self._decode([int(id_)]) for id_ in ids[max(0, index - _AROUND):index]],
                 "after": [self._decode([int(id_)]) for id_ in ids[index:index + _AROUND]]}
                for index in range(1, len(ids)) if targets[index] != targets[index - 1]]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def summary(totals: Totals, seq_len: int) -> str:
    parts = [f"{format_count(totals.records, 'record')}, {format_count(totals.tokens, 'token')}, "
             f"{format_count(totals.targets, 'target')}"]
    if totals.rewritten:
        parts.append(f"{format_count(totals.rewritten, 'conversation')} in several texts, because the template rewrites what was "
                     "said before")
    if totals.cut:
        parts.append(f"{format_count(totals.cut, 'text')} longer than a sequence of {seq_len} tokens, so cut"
                     + (f" ({totals.bare} of them with a prompt, which the later parts do not see)" if totals.bare else ""))
    parts.append(f"{format_count(totals.bad, 'bad line')}" if totals.bad else "no bad line")
    return "; ".join(parts)


def _kind(entry: Entry) -> str:
    return "conversation" if isinstance(entry.record, Chat) else "completion" if isinstance(entry.record, Completion) else "text"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
