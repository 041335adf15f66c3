"""The door through which every file comes in: regular files only, no more than a limit of them, and
JSON that says one thing.

A named pipe would wait for a writer, a device may have no end, and both may take the place of a
file between a look and the opening. So a file is looked at, opened without waiting, and looked at
again. Errors are OSErrors, which whoever reads handles anyway: `strerror` says what is wrong.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ratel.schema import shown

StrPath = str | os.PathLike[str]

SMALL_FILE_BYTES = 256 << 20
"""More bytes than any configuration, index or manifest has: that of a model of a thousand layers
takes a few MB."""

_DEEPEST = 100
"""Levels of lists and objects. No file of a model or a run has twenty; Python's own limit differs
from version to version, and what is just below it at the door is above it for whoever goes through
the value."""

_PIECE_BYTES = 1 << 20

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
          stat.S_IFDIR: "a directory"}


class NotRegularError(OSError):
    """A pipe, socket, device or directory where a file is expected."""


class JsonError(ValueError):
    """The content is not JSON, or JSON that readers could take for different things. One line,
    which names the place."""


def open_regular(path: StrPath) -> BinaryIO:
    """The file, to be read. Links are followed. Raises OSError, also for whatever is not a regular
    file."""
    return open(descriptor_of(path), "rb")


def descriptor_of(path: StrPath) -> int:
    """The same as `open_regular`, for who reads at positions."""
    _require_regular(os.stat(path), path)  # opening alone can do something to a device
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: StrPath, limit_bytes: int = SMALL_FILE_BYTES) -> bytes:
    """All that is in a file. Raises OSError, also for one that is larger than ``limit_bytes``."""
    content = bytearray()
    with open_regular(path) as file:
        while piece := file.read(_PIECE_BYTES):
            content += piece
            if len(content) > limit_bytes:
                raise OSError(errno.EFBIG, f"it has more than {limit_bytes:,} bytes, and is no file of this kind", os.fspath(path))
    return bytes(content)


def read_text(path: StrPath) -> str:
    """The text of a file in UTF-8. Raises OSError and JsonError."""
    return _decoded(read_regular(path))


def read_json(path: StrPath, *, allow_infinity: bool = False) -> Any:
    """What a file says as JSON. Raises OSError and JsonError."""
    return parse_json(read_regular(path), allow_infinity=allow_infinity)


def parse_json(content: bytes | str, *, allow_infinity: bool = False) -> Any:
    """JSON as the standard has it, with each key once and without halves of characters.
    ``allow_infinity``: with what Python writes for numbers that are none. Raises JsonError for
    anything else, however deep or long."""
    text = content if isinstance(content, str) else _decoded(content)
    try:
        value = json.loads(text, object_pairs_hook=_each_once, parse_constant=None if allow_infinity else _refuse_constant)
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise JsonError("its JSON is nested too deeply") from None
    except JsonError:
        raise
    except ValueError:  # of Python itself, which reads 4300 digits at most
        raise JsonError("a number in it has too many digits") from None
    if text.count("[") + text.count("{") > _DEEPEST:
        _refuse_deep(value)
    if "\\u" in text:
        _refuse_half_characters(value)
    return value


def refuse_odd_entries(directory: Path, depth: int = 2) -> None:
    """Raise NotRegularError for a pipe, socket or device among the files of a directory: for
    readers that are not ours, and open what they find by its name."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        try:
            mode = entry.stat().st_mode
        except OSError:
            continue  # a link to nowhere, which whoever wants it reports
        if stat.S_ISDIR(mode) and depth > 1 and not entry.is_symlink():
            refuse_odd_entries(Path(entry.path), depth - 1)
        elif not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise _not_regular(mode, entry.path)


def _require_regular(found: os.stat_result, path: StrPath) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _not_regular(found.st_mode, path)


def _not_regular(mode: int, path: StrPath) -> NotRegularError:
    kind = _KINDS.get(stat.S_IFMT(mode), "no file")
    return NotRegularError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"it is {kind}, not a regular file",
                           os.fspath(path))


def _decoded(content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8: byte 0x{content[error.start]:02x} at position {error.start}") from None
    if text.startswith("\ufeff"):
        raise JsonError("it begins with a byte-order mark: save it as UTF-8 without one")
    return text


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise JsonError(f"the key {shown(first_twice(pairs))} stands twice in one object")
    return found


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        entries = (entry for each in level for entry in (each.values() if isinstance(each, dict) else each))
        level = [entry for entry in entries if isinstance(entry, (dict, list))]
        if not level:
            return
    raise JsonError("its JSON is nested too deeply")


def first_twice(pairs: list[tuple[str, Any]]) -> str:
    """The first key of an object that has stood there before."""
    seen: set[str] = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))


def _refuse_constant(name: str) -> Any:
    raise JsonError(f"{name} is no number of JSON")


def _refuse_half_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise JsonError("it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
