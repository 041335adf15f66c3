"""The header of a safetensors file, held to every rule of the format.

    8 bytes        length of the header, little-endian
    header         JSON: {"__metadata__": {text: text}, NAME: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    data           the tensors' bytes, without gap or overlap, to the end of the file

What is accepted here the safetensors library accepts too, with the same tensors
(tests/models/safetensors/test_header.py). The reverse has one exception: a key that stands twice,
of which the library takes the last, is refused.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.reading import JsonError, descriptor_of
from ratel.schema import SchemaError, shown

BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64, "C64": 64}
"""Bits of one element of each dtype of the format."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit. A larger number at the start of a file means that it is something
else."""

METADATA = "__metadata__"
REMEDY = "Download or save the files again"
_MAX_DEPTH = 127
_WORD = 1 << 64
_FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor. ``begin`` and ``end``: bytes in the file."""

    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path, field: str = "model") -> Header:
    """Raises RatelError, under the name of the option ``field``, for a file that is not as the
    format says."""
    try:
        descriptor = descriptor_of(path)
        try:
            return _read(descriptor)
        finally:
            os.close(descriptor)
    except _CutOff as error:
        raise RatelError(f"the file is cut off: {error}", field=field, value=path, remedy=REMEDY) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RatelError(f"not a readable safetensors file: {reason}", field=field, value=path, remedy=REMEDY) from error


class _CutOff(ValueError):
    """A file shorter than its header says; the most usual damage, which is given its own words."""


def _read(descriptor: int) -> Header:
    num_bytes = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise ValueError(f"it has {len(prefix)} bytes")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > min(MAX_HEADER_BYTES, num_bytes - 8):
        raise ValueError("its header is longer than the file, or than any")
    content = b""
    while len(content) < header_bytes:
        piece = os.pread(descriptor, header_bytes - len(content), 8 + len(content))
        if not piece:
            raise ValueError("it became shorter while it was read")
        content += piece
    return _checked(_parse(content), 8 + header_bytes, num_bytes)


def _checked(header: dict[str, Any], data_begin: int, num_bytes: int) -> Header:
    metadata = header.pop(METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SchemaError(f"{METADATA} must be an object of texts, not {shown(metadata)}")
    found = sorted(((name, _entry(name, value)) for name, value in header.items()), key=lambda pair: pair[1][2:])
    cursor, tensors = 0, {}
    for name, (dtype_name, shape, begin, end) in found:
        if begin != cursor or end < begin:
            raise SchemaError(f"{name!r} begins at byte {begin} of the data and ends at {end}, but what comes before it ends "
                              f"at {cursor}")
        if end - begin != _size(name, dtype_name, shape):
            raise SchemaError(f"{name!r} has {end - begin} bytes, its shape needs {_size(name, dtype_name, shape)}")
        cursor = end
        tensors[name] = Entry(dtype_name=dtype_name, shape=shape, begin=data_begin + begin, end=data_begin + end)
    if data_begin + cursor > num_bytes:
        raise _CutOff(f"{num_bytes:,} of {data_begin + cursor:,} bytes")
    if data_begin + cursor < num_bytes:
        raise SchemaError(f"{num_bytes - data_begin - cursor:,} bytes follow the last tensor")
    return Header(tensors={name: tensors[name] for name in header}, metadata=metadata)


def _entry(name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    if isinstance(value, list) and len(value) == len(_FIELDS):
        value = dict(zip(_FIELDS, value))  # another spelling that the library takes
    if not isinstance(value, dict) or not all(key in value for key in _FIELDS):
        raise SchemaError(f"{name!r} must be an object with {', '.join(_FIELDS)}, not {shown(value)}")
    dtype_name, shape, offsets = (value[key] for key in _FIELDS)
    if not isinstance(dtype_name, str) or dtype_name not in BITS:
        raise SchemaError(f"{name!r} has the unknown dtype {shown(dtype_name)}")
    if not isinstance(shape, list) or not all(map(_is_word, shape)):
        raise SchemaError(f"{name!r} has the shape {shown(shape)}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_word, offsets)):
        raise SchemaError(f"{name!r} has the data_offsets {shown(offsets)}, not two positions")
    return dtype_name, tuple(shape), offsets[0], offsets[1]


def _is_word(value: Any) -> bool:
    return type(value) is int and 0 <= value < _WORD


def _size(name: str, dtype_name: str, shape: tuple[int, ...]) -> int:
    """Bytes. A product that overflows 64 bits is no size, even where a zero comes after."""
    count = 1
    for factor in (*shape, BITS[dtype_name]):
        count *= factor
        if count >= _WORD:
            raise SchemaError(f"{name!r} has the shape {shown(list(shape))}, which no file can hold")
    if count % 8:
        raise SchemaError(f"{name!r} ends within a byte")
    return count // 8


def _parse(content: bytes) -> dict[str, Any]:
    """JSON as the library's parser reads it, which is stricter than Python's."""
    try:
        header = json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_int=_whole, parse_float=_float,
                            parse_constant=_no_number)
        depth = _depth(header)
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # halves of surrogate pairs are no characters
    except RecursionError:
        raise JsonError("its header is nested too deeply") from None
    except UnicodeError as error:
        raise JsonError(f"its header is not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"its header is not JSON: {error.msg} at character {error.pos}") from None
    if depth > _MAX_DEPTH:
        raise JsonError("its header is nested too deeply")
    if not isinstance(header, dict):
        raise SchemaError(f"its header must be an object, not {shown(header)}")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise JsonError(f"its header has {key!r} twice")
        found[key] = value
    return found


def _whole(digits: str) -> int | float:
    """Beyond 64 bits, and -0, it is a float to the library, and no size."""
    if len(digits) > 20 or digits == "-0":
        return _float(digits)
    value = int(digits)
    return value if -(1 << 63) <= value < _WORD else float(value)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise JsonError("its header has a number that is out of range")
    return value


def _no_number(name: str) -> Any:
    raise JsonError(f"its header has {name}, which is no JSON")


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0
