"""Strings that know of each character where it comes from.

A chat template takes messages apart and joins them again (strips, splits, escapes, puts markers
between). Rendered from these strings, its text still says of every character which field of which
message it was, or that the template wrote it.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

LITERAL = "\0"
"""The origin of what the template writes itself. Even codes are origins; the odd one above each is
the same origin, inside the marks of the template (``{% generation %}``)."""


class Traced(str):
    """``origins`` has one character for each of the string: the code of where it comes from.

    Whatever is done to it in a way that is not below gives a plain string: text of unknown origin,
    never a wrong one.
    """

    __slots__ = ("origins",)
    origins: str

    def __new__(cls, text: str, origins: str) -> "Traced":
        self = super().__new__(cls, text)
        assert len(text) == len(origins)
        self.origins = origins
        return self

    def __str__(self) -> str:
        return self  # str() keeps it: templates convert what they write

    def __reduce__(self) -> Any:
        return Traced, (str.__getitem__(self, slice(None)), self.origins)

    def __add__(self, other: str) -> "Traced":
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Traced":
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: Any) -> "Traced":
        return Traced(str.__mul__(self, count), self.origins * count)

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> "Traced":
        return Traced(str.__getitem__(self, key), self.origins[key])

    def __iter__(self) -> Iterator["Traced"]:
        return map(Traced, str.__iter__(self), self.origins)

    def strip(self, chars: str | None = None, /) -> "Traced":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Traced":
        return self[len(self) - len(str.lstrip(self, chars)):]

    def rstrip(self, chars: str | None = None, /) -> "Traced":
        return self[:len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> "Traced":
        return self[len(self) - len(str.removeprefix(self, prefix)):]

    def removesuffix(self, suffix: str, /) -> "Traced":
        return self[:len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit))

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._located(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = str.partition(self, sep)
        return self[:len(before)], self[len(before):len(before) + len(found)], self[len(self) - len(after):]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, after = str.rpartition(self, sep)
        return self[:len(before)], self[len(before):len(before) + len(found)], self[len(self) - len(after):]

    def replace(self, old: str, new: str, count: Any = -1, /) -> str:
        if not old:
            return str.replace(self, old, new, count)
        return joined(_between(new, self.split(old, count)))

    def join(self, parts: Iterable[str], /) -> str:
        return joined(_between(self, parts))

    def upper(self) -> str:
        return self._changed(str.upper(self))

    def lower(self) -> str:
        return self._changed(str.lower(self))

    def title(self) -> str:
        return self._changed(str.title(self))

    def capitalize(self) -> str:
        return self._changed(str.capitalize(self))

    def _changed(self, text: str) -> str:
        """Character by character; where the number changed (an ``ß`` becomes ``SS``), only if all
        have one origin."""
        if len(text) == len(self):
            return Traced(text, self.origins)
        return Traced(text, self.origins[0] * len(text)) if len(set(self.origins)) == 1 else text

    def _located(self, parts: list[str]) -> list[str]:
        """Parts of this string, in order, with their origins."""
        found, cursor = [], 0
        for part in parts:
            start = str.find(self, part, cursor)
            cursor = start + len(part)
            found.append(self[start:cursor])
        return found


def joined(parts: Iterable[str]) -> str:
    parts = list(parts)
    if not any(isinstance(part, Traced) for part in parts):
        return "".join(parts)
    return Traced("".join(parts), "".join(map(origins_of, parts)))


def origins_of(text: str) -> str:
    return text.origins if isinstance(text, Traced) else LITERAL * len(text)


def formatted(text: str, values: Any) -> str:
    """``text % values`` that keeps origins where all that is filled in is ``%s``."""
    plain = str.__mod__(text, values)
    pieces = (text if isinstance(text, Traced) else Traced(text, LITERAL * len(text))).split("%s")
    filled = values if isinstance(values, tuple) else (values,)
    if len(pieces) != len(filled) + 1:
        return plain
    traced = joined(part for pair in zip(pieces, (*map(str, filled), "")) for part in pair)
    return traced if traced == plain else plain


class _Marked(dict[int, int]):
    def __missing__(self, code: int) -> int:
        return code | 1


def marked(text: str) -> Traced:
    """The same text, inside the template's marks."""
    return Traced("".join((text,)), origins_of(text).translate(_Marked()))


def to_json(value: Any, *, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
            sort_keys: bool = False) -> str:
    """``json.dumps`` that keeps origins."""
    plain = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    item, colon = separators or (", " if indent is None else ",", ": ")
    step = " " * indent if isinstance(indent, int) else indent
    traced = joined(_json_parts(value, ensure_ascii, step, item, colon, sort_keys, ""))
    return traced if traced == plain else plain


def _json_parts(value: Any, ascii_only: bool, step: str | None, item: str, colon: str, sort_keys: bool,
                margin: str) -> Iterator[str]:
    if isinstance(value, str):
        yield _json_string(value, ascii_only)
        return
    if not isinstance(value, (dict, list, tuple)) or not value:
        yield json.dumps(value)
        return
    is_object = isinstance(value, dict)
    inner = None if step is None else "\n" + margin + step
    entries = list(value.items()) if is_object else [(None, entry) for entry in value]
    if is_object and sort_keys:
        entries.sort()
    yield "{" if is_object else "["
    for number, (key, entry) in enumerate(entries):
        yield (item if number else "") + (inner or "")
        if is_object:
            yield _json_string(key if isinstance(key, str) else json.dumps(key), ascii_only)
            yield colon
        yield from _json_parts(entry, ascii_only, step, item, colon, sort_keys, margin + (step or ""))
    yield ("" if inner is None else "\n" + margin) + ("}" if is_object else "]")


def _json_string(text: str, ascii_only: bool) -> str:
    plain = json.dumps(text, ensure_ascii=ascii_only)
    if not isinstance(text, Traced):
        return plain
    if len(plain) == len(text) + 2:
        origins = text.origins
    else:  # an escape has the origin of its character
        origins = "".join(origin * (len(json.dumps(char, ensure_ascii=ascii_only)) - 2)
                          for char, origin in zip(str.__iter__(text), text.origins))
    return Traced(plain, LITERAL + origins + LITERAL)


def _between(separator: str, parts: Iterable[str]) -> Iterator[str]:
    for number, part in enumerate(parts):
        if number:
            yield separator
        yield part
