"""Quantities as people write them: ``24GiB``, ``3.2GB/s``, ``90s``."""

import re

from ratel.errors import RatelError
from ratel.schema import LARGEST, shown

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_BYTE_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": TIB, "tib": TIB, "tb": 10**12,
}
_LIKE_THIS = "Write it like 24GiB, 500GB or 1.5TiB"
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int | float, *, field: str = "size") -> int:
    """Bytes of ``"24GiB"``, ``"1.5 TB"``, ``"512M"`` (binary) or a plain number of bytes."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if text < 0:
            raise RatelError("a size cannot be negative", field=field, value=text, remedy=_LIKE_THIS)
        return _limited(text, text, field)
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise RatelError("not a size", field=field, value=shown(text), remedy=_LIKE_THIS)
    return _limited(float(match[1]) * _BYTE_UNITS[match[2].lower()], text, field)


def _limited(num_bytes: float, text: object, field: str) -> int:
    if not num_bytes <= LARGEST:
        raise RatelError("is more than any machine has", field=field, value=shown(text), remedy=_LIKE_THIS)
    return int(num_bytes)


def parse_rate(text: str | int | float, *, field: str = "rate") -> float:
    """Bytes per second of ``"3.2GB/s"`` or a plain number of bytes per second."""
    if isinstance(text, str):
        text = text.strip().removesuffix("/s")
    return float(parse_bytes(text, field=field))


def format_bytes(num_bytes: float) -> str:
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{int(num_bytes)} B"


def format_seconds(seconds: float) -> str:
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h {int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m {int(seconds % 60):02d}s"
    if seconds >= 1:
        return f"{seconds:.2f}s"
    return f"{seconds * 1e6:.0f}us" if 0 < seconds < 1e-3 else f"{seconds * 1e3:.1f}ms"


def align_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def format_count(number: int, noun: str) -> str:
    """A number with its noun: ``1 step``, ``2,000 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
