"""What one option may be: readers that make one kind of flag text, TOML values and Python objects,
and refuse the rest."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.units import MIB, parse_bytes, parse_rate

Reader = Callable[[Any, str], Any]
"""Takes a value and the name of its option."""

MOST_COUNTED = 10**12
"""The most of anything that a run counts: a larger number is a slip of the hand."""
MOST_AT_ONCE = 2**31 - 1
"""Rows, positions: an index of 32 bits is what libraries use for them."""
MOST_TOKENS = 2**36
"""The most tokens of one step. A batch is in memory as a whole, with 24 bytes a token: 1.5 TiB."""
MOST_SEED = 2**128 - 1
MOST_THREADS = 4096
MOST_FP32 = 3e38


def number_reader(kind: type, low: float, high: float | None = None, *, above: bool = False, below: bool = False) -> Reader:
    """A reader of an int or float in ``[low, high]``; ``above``/``below`` exclude that end."""
    high = high if high is not None else MOST_COUNTED if kind is int else MOST_FP32

    def read(value: Any, flag: str) -> Any:
        try:
            number = kind(str(value).replace("_", "")) if not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None or not math.isfinite(number):
            raise RatelError("not a whole number" if kind is int else "not a number", field=flag, value=repr(value))
        if number < low or (above and number == low):
            raise RatelError(f"must be {'above' if above else 'at least'} {low:g}", field=flag, value=number)
        if number > high or (below and number == high):
            raise RatelError(f"must be {'below' if below else 'at most'} {high:{',' if kind is int else 'g'}}", field=flag, value=number)
        return number

    return read


def choice_reader(*choices: str) -> Reader:
    def read(value: Any, flag: str) -> str:
        if value not in choices:
            raise RatelError("not one of the choices", field=flag, value=value, remedy=f"Use {' or '.join(choices)}")
        return str(value)

    return read


def auto_or(reader: Reader) -> Reader:
    return lambda value, flag: "auto" if value == "auto" else reader(value, flag)


def optional(reader: Reader) -> Reader:
    return lambda value, flag: None if value is None else reader(value, flag)


def text_option(value: Any, flag: str) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise RatelError("must be a name or a path", field=flag, value=repr(value))
    check_name(value, flag)
    return os.fspath(value)


def check_name(path: str | os.PathLike[str], flag: str) -> None:
    """Libraries that a run writes files with at its end, and JSON, know no other names."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise RatelError("has a name that is not UTF-8", field=flag, value=shown,
                         remedy="Rename it, or go there by a link whose name is") from None


def switch(value: Any, flag: str) -> bool:
    if not isinstance(value, bool):
        raise RatelError("must be true or false", field=flag, value=repr(value))
    return value


def directories_reader(twice: str) -> Reader:
    """A reader of directories, from ``"/mnt/a,/mnt/b"`` or a list; the same one twice would be two
    stripes on one device."""

    def read(value: Any, flag: str) -> tuple[str, ...]:
        dirs = names(value, flag)
        if len({os.path.realpath(path) for path in dirs}) < len(dirs):
            raise RatelError(twice, field=flag, value=",".join(dirs))
        return dirs

    return read


def names(value: Any, flag: str) -> tuple[str, ...]:
    """Names, from ``"a,b"`` or a list."""
    return tuple(text_option(part.strip() if isinstance(part, str) else part, flag) for part in _listed(value))


def _listed(value: Any) -> "list[Any] | tuple[Any, ...]":
    return value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]


def names_or_text(value: Any, flag: str) -> str | tuple[str, ...]:
    """A list of names; a text as it is, for whoever knows whether it is one."""
    return text_option(value, flag) if isinstance(value, str) else names(value, flag)


def by_pattern(read: Reader) -> Reader:
    """A reader of numbers by regular expression, from ``"PATTERN=N,PATTERN=N"`` or a table."""

    def read_all(value: Any, flag: str) -> dict[str, Any]:
        pairs = value.items() if isinstance(value, dict) else [part.rpartition("=")[::2] for part in names(value, flag)]
        if any(not isinstance(pattern, str) or not pattern for pattern, _ in pairs):
            raise RatelError("must be numbers by pattern", field=flag, value=repr(value), remedy="Write it like q_proj=8,layers.0.*=32")
        return {pattern: read(number, flag) for pattern, number in pairs}

    return read_all


def layer_numbers(value: Any, flag: str) -> tuple[int, ...]:
    read = number_reader(int, 0)
    return tuple(read(part, flag) for part in _listed(value))


def adapter(value: Any, flag: str) -> "int | str | dict[str, Any]":
    """A rank, the directory of an adapter, or a description as JSON has it."""
    if isinstance(value, dict):
        return value
    if isinstance(value, (str, os.PathLike)) and not str(value).isdigit():
        return text_option(value, flag)
    return number_reader(int, 1)(value, flag)


def betas_reader(value: Any, flag: str) -> tuple[float, float]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        raise RatelError("must be two numbers", field=flag, value=repr(value), remedy="Write it like 0.9,0.999")
    read = number_reader(float, 0, 1, below=True)
    return read(parts[0], flag), read(parts[1], flag)


def router_loss(value: Any, flag: str) -> float | str:
    return value if value in ("auto", "off") else number_reader(float, 0, above=True)(value, flag)


_NO_BUDGET = 2048
"""What is given as a number of bytes may be anything a program computes; not so little."""


def _check_unit(value: Any, number: float, flag: str, counted: str, meant: str) -> None:
    """A bare number that is next to nothing was meant in a larger unit."""
    bare = value.strip() if isinstance(value, str) else str(value)
    if bare.isdigit() and 0 < number < (MIB if isinstance(value, str) else _NO_BUDGET):
        raise RatelError(f"is {number:.0f} {counted}", field=flag, value=value, remedy=f"Write the unit: {bare}{meant}")


def size(value: Any, flag: str) -> int:
    num_bytes = 0 if isinstance(value, bool) else parse_bytes(value, field=flag)
    _check_unit(value, num_bytes, flag, "bytes", "GiB")
    if num_bytes == 0:
        raise RatelError("must be above 0", field=flag, value=value, remedy="Leave it out to take it from the machine")
    return num_bytes


def rate(value: Any, flag: str) -> float:
    rate_bps = parse_rate(value, field=flag)
    _check_unit(value, rate_bps, flag, "bytes a second", "GB/s")
    if rate_bps == 0:
        raise RatelError("must be above 0", field=flag, value=value, remedy="Leave it out for no cap")
    return rate_bps


def check_can_write(path: str | os.PathLike[str] | None, flag: str) -> None:
    """Before the work that comes before what is written there."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise RatelError("cannot be written: its directory does not exist", field=flag, value=path)
