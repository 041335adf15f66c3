"""What a value from a file must be: small checks that are put together to say what a whole file
must be.

A check takes a value and its place (``units[3].name``) and raises SchemaError, one line with both,
if the value is another. Numbers have limits everywhere: what is larger than any file or machine is
damage, and would only fail later.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], None]

LARGEST = (1 << 63) - 1
"""What a position in a file may be."""


class SchemaError(ValueError):
    """A value is not what stands at its place in such a file."""


def check(value: Any, what: Check, where: str = "") -> Any:
    """The value, if it is ``what``. Raises SchemaError."""
    what(value, where)
    return value


def whole(low: int = 0, high: int = LARGEST) -> Check:
    """A whole number; true and false are none."""

    def look(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(where, "a whole number", value)
        if not low <= value <= high:
            raise _wrong(where, f"a whole number from {low} to {high}", value)

    return look


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Check:
    """A finite number; ``above``: more than ``low``."""

    def look(value: Any, where: str) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not _is_finite(value):
            raise _wrong(where, "a number", value)
        if not low <= value <= high or (above and value == low):
            raise _wrong(where, f"a number {'above' if above else 'of at least'} {low:g}"
                                f"{'' if high == math.inf else f', of at most {high:g}'}", value)

    return look


def text(pattern: str = r"[\s\S]*", expected: str = "a text") -> Check:
    """``pattern``: a regular expression for all of it; ``expected`` says the same in words."""
    compiled = re.compile(pattern)

    def look(value: Any, where: str) -> None:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise _wrong(where, expected, value)

    return look


def boolean(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)


def anything(value: Any, where: str) -> None:
    """Accept what nobody relies on."""


def one_of(*choices: Any) -> Check:
    def look(value: Any, where: str) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _wrong(where, " or ".join(map(repr, choices)), value)

    return look


def nullable(inner: Check) -> Check:
    def look(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return look


def listing(item: Check, *, least: int = 0, most: int | None = None) -> Check:
    def look(value: Any, where: str) -> None:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, "a list", value)
        if len(value) < least or (most is not None and len(value) > most):
            raise SchemaError(f"{where or 'it'} has {len(value)} entries, not {_counts(least, most)}")
        for index, entry in enumerate(value):
            item(entry, f"{where}[{index}]")

    return look


def mapping(key: Check, value: Check) -> Check:
    """An object with keys of one kind."""

    def look(found: Any, where: str) -> None:
        if not isinstance(found, dict):
            raise _wrong(where, "an object", found)
        for name, entry in found.items():
            key(name, f"a key of {where or 'it'}")
            value(entry, _join(where, name))

    return look


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None, *, is_open: bool = False) -> Check:
    """An object with these keys and, unless ``is_open``, no others."""
    known = {**required, **(optional or {})}

    def look(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        for name in required:
            if name not in value:
                raise SchemaError(f"{_join(where, name)} is missing")
        for name, entry in value.items():
            if name in known:
                known[name](entry, _join(where, name))
            elif not is_open:
                raise SchemaError(f"{_join(where, name)} is not known (given: {shown(entry)})")

    return look


def shown(value: Any, limit: int = 60) -> str:
    """A value in a message, however long or deep it is."""
    try:
        words = repr(value)
    except (RecursionError, ValueError):  # ValueError: a number of more digits than Python writes
        words = f"a huge {type(value).__name__}"
    return words if len(words) <= limit else words[: limit - 3] + "..."


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float can be
        return False


def _wrong(where: str, expected: str, value: Any) -> SchemaError:
    return SchemaError(f"{where or 'it'} must be {expected}, not {shown(value)}")


def _join(where: str, name: str) -> str:
    return f"{where}.{shown(name).strip(chr(39))}" if where else shown(name).strip("'")


def _counts(least: int, most: int | None) -> str:
    if most is None:
        return f"at least {least}"
    return str(least) if least == most else f"{least} to {most}"
