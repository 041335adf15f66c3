"""Lines with labels: texts to be classified, and words with a label each. Which labels there are is
found in them, or known from the model; whatever does not agree is refused at its line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ratel.config import CLASSIFY
from ratel.data.sources.records import EXPECTED, RecordError, Text, parse_line, read_object, string_of, type_name
from ratel.errors import RatelError
from ratel.models.calls.tasks import MULTI, REGRESSION, SINGLE

Label = str | int | float
_EXPECTED_TEXT = ('Write one JSON object per line, {"text": ..., "label": ...}: the label is a string or a whole number, a list of '
                  'them where several apply, or a number to be predicted')
_EXPECTED_WORDS = 'Write one JSON object per line, {"tokens": [words], "labels": [one for each word]}'
_SHOWN = 8
_STRING, _WHOLE, _NUMBER, _LIST = "a string", "a whole number", "a number", "a list"


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """``label``: the number of the label, one 0 or 1 for each label, or the value to be
    predicted."""

    text: str
    pair: str | None
    label: Label | tuple[Label, ...]


@dataclass(frozen=True, kw_only=True)
class LabelledWords:
    words: tuple[str, ...]
    labels: tuple[Label, ...]


class Labels:
    """The labels of a task. Those that are not known are gathered while a corpus is read through,
    then `settle` numbers them.

    ``known``: names in the order of their numbers. ``problem``: what kind of classification it is,
    where that is known.
    """

    def __init__(self, task: str, *, known: Sequence[str] = (), problem: str | None = None) -> None:
        self._task, self.names, self.problem = task, tuple(known), problem
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._is_known = bool(known)
        self._kind: str | None = None
        """The kind of the first label, or of the first one in a list."""
        self._is_list = False
        self._seen: set[Label] = set()
        self._is_settled = False

    @property
    def are_known(self) -> bool:
        """Whether the model has the labels, so that others are refused."""
        return self._is_known

    # -- reading -------------------------------------------------------------------------------------------------

    def parse(self, line: bytes) -> "LabelledText | LabelledWords":
        """The record on a line. Raises RecordError."""
        is_text = self._task == CLASSIFY
        try:
            fields = read_object(line)
            return self._text(fields) if is_text else self._words(fields)
        except RecordError as error:
            if error.expected is not EXPECTED:
                raise
            raise RecordError(str(error), _EXPECTED_TEXT if is_text else _EXPECTED_WORDS, line=error.line) from None

    def _text(self, fields: dict[str, Any]) -> LabelledText:
        _need(fields, "text", _EXPECTED_TEXT)
        text = string_of(fields, "text")
        if not text.strip():
            raise RecordError('"text" is empty, so there is nothing to classify', "Fill it in or remove the line")
        pair = string_of(fields, "text_pair") if fields.get("text_pair") is not None else None
        _need(fields, "label", _EXPECTED_TEXT)
        label = fields["label"]
        self._check_form(label)
        for item in label if isinstance(label, list) else [label]:
            self._check(item)
        return LabelledText(text=text, pair=pair, label=tuple(label) if isinstance(label, list) else label)

    def _words(self, fields: dict[str, Any]) -> LabelledWords:
        for key in ("tokens", "labels"):
            _need(fields, key, _EXPECTED_WORDS)
            if not isinstance(fields[key], list):
                raise RecordError(f'"{key}" must be a list, not {type_name(fields[key])}', _EXPECTED_WORDS)
        words, labels = fields["tokens"], fields["labels"]
        if not words or not all(isinstance(word, str) for word in words):
            raise RecordError('"tokens" must be a list of strings that is not empty', _EXPECTED_WORDS)
        if len(words) != len(labels):
            raise RecordError(f"{len(words)} words have {len(labels)} labels", _EXPECTED_WORDS)
        for label in labels:
            self._check(label)
        return LabelledWords(words=tuple(words), labels=tuple(labels))

    def _check_form(self, label: Any) -> None:
        is_list = isinstance(label, list)
        if self.problem is not None and is_list != (self.problem == MULTI):
            raise RecordError(f'the model is one for {self.problem}, and "label" is {type_name(label)}',
                              "Give a list of labels for multi_label_classification, else one label")
        if (self._kind is not None or self._is_list) and is_list != self._is_list:
            raise RecordError(f'"label" is {type_name(label)} here, and was {"a list" if self._is_list else self._kind} before',
                              "Write all labels of the data in the same way")
        self._is_list = is_list

    def _check(self, label: Any) -> None:
        kind = _kind_of(label)
        if kind is None or kind == _NUMBER and (self._is_list or self._task != CLASSIFY):
            what = repr(label) if isinstance(label, (int, float)) and not isinstance(label, bool) else type_name(label)
            what = "an empty string" if label == "" else what
            raise RecordError(f"a label cannot be {what}", "Write a string or a whole number")
        if kind == _NUMBER and self.problem not in (None, REGRESSION):
            raise RecordError(f"the label {label!r} is not a whole number, and the model is one for {self.problem}", _EXPECTED_TEXT)
        if self.problem == REGRESSION and kind == _STRING:
            raise RecordError(f"the label {label!r} is not a number, and the model is one for regression", _EXPECTED_TEXT)
        if self._kind is not None and kind != self._kind and _STRING in (kind, self._kind):
            raise RecordError(f"the label {label!r} is {kind}, and one before was {self._kind}",
                              "Write all labels of the data in the same way")
        self._kind = _NUMBER if _NUMBER in (kind, self._kind) else kind
        if self._predicts_number:
            if self._is_known and self.problem is None and len(self.names) > 1:
                raise RecordError(f"the label {label!r} is not a whole number, and the model chooses among labels", _shown(self.names))
        elif self._is_known or self._is_settled:
            self.number(label)
        else:
            self._seen.add(label)

    @property
    def _predicts_number(self) -> bool:
        return self.problem == REGRESSION or self.problem is None and self._kind == _NUMBER

    # -- what they are -------------------------------------------------------------------------------------------

    def settle(self, field: str) -> None:
        """The corpus has been read: give the labels found their numbers, in sorted order, and say
        what kind of task it is."""
        self._is_settled = True
        if self._task == CLASSIFY and self.problem is None:
            self.problem = MULTI if self._is_list else REGRESSION if self._kind == _NUMBER else SINGLE
        if self._is_known or self.problem == REGRESSION:
            return
        self.names = tuple(map(str, sorted(self._seen)))
        self._numbers = {name: number for number, name in enumerate(self.names)}
        if len(self.names) < 2:
            raise RatelError(f"all of it has the same label ({', '.join(self.names) or 'none at all'}), so there is nothing to tell "
                             "apart", field=field, remedy="Give data with two labels or more")

    def number(self, label: Label) -> int:
        """The label's place among the names; a whole number that is no name is the place itself.
        Raises RecordError."""
        found = self._numbers.get(str(label))
        if found is None and isinstance(label, int) and self._is_known and 0 <= label < len(self.names):
            return label
        if found is None:
            whose = "the model's" if self._is_known else "the data's"
            raise RecordError(f"the label {label!r} is none of {whose} {len(self.names)}",
                              _shown(self.names) + (", or name them by id2label in config.json" if self._is_known else ""))
        return found

    def value(self, label: Label | tuple[Label, ...]) -> int | float | list[float]:
        """What a batch holds for it."""
        if isinstance(label, tuple):
            chosen = {self.number(item) for item in label}
            return [float(number in chosen) for number in range(len(self.names))]
        return float(label) if self.problem == REGRESSION else self.number(label)


def parse_text(line: bytes) -> Text | None:
    """The record on a line for `masked-lm`."""
    record = parse_line(line)
    if record is not None and not isinstance(record, Text):
        raise RecordError("tokens are hidden in plain text only, not in prompts or conversations",
                          'Write one JSON object per line, {"text": ...}')
    return record


def _kind_of(label: Any) -> str | None:
    if isinstance(label, str):
        return _STRING if label else None
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
        return None
    return _WHOLE if isinstance(label, int) else _NUMBER


def _need(fields: dict[str, Any], key: str, expected: str) -> None:
    if key not in fields:
        seen = ", ".join(f'"{name}"' for name in list(fields)[:6]) or "no keys at all"
        raise RecordError(f'"{key}" is missing; the object has {seen}', expected)


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"Use one of {', '.join(names[:_SHOWN])}{more}"
