"""Which documents a run had, to go on with data that was changed: those learned from must still be
there, wherever they lie."""

import base64
import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ratel.reading import read_json
from ratel.schema import SchemaError, anything, check, listing, record, text, whole

MOST_LISTED = 10_000_000
"""A larger corpus has no list kept of it: 8 bytes a document would become a file of 100 MB and
more."""

_PACKED = text("[A-Za-z0-9+/=]*", "base64")
_LIST = record({"content": text("[0-9a-f]{32}"), "documents": whole(1, MOST_LISTED), "digests": _PACKED,
                "held_out": listing(whole(0, MOST_LISTED))})
_FILE = record({"lists": listing(_LIST, most=4)}, {"ratel": anything})


def digest(content: bytes) -> int:
    """64 bits of a document's bytes."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def digest_of_all(digests: np.ndarray) -> str:
    return hashlib.blake2b(digests.astype("<u8").tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class DocumentList:
    """``digests``: uint64, by number. ``held_out``: the numbers that are evaluated on, in the order
    in which they are."""

    digests: np.ndarray
    held_out: tuple[int, ...]

    @property
    def content(self) -> str:
        return digest_of_all(self.digests)

    def to_json(self) -> dict[str, Any]:
        packed = base64.b64encode(zlib.compress(self.digests.astype("<u8").tobytes(), 1)).decode()
        return {"content": self.content, "documents": len(self.digests), "digests": packed, "held_out": list(self.held_out)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "DocumentList":
        """Raises SchemaError if it is not what was written."""
        size = 8 * found["documents"]
        try:
            data = zlib.decompressobj().decompress(base64.b64decode(found["digests"], validate=True), size + 1)
        except (ValueError, zlib.error) as error:
            raise SchemaError(f"the digests cannot be unpacked ({error})") from None
        digests = np.frombuffer(data, dtype="<u8") if len(data) == size else np.zeros(0, np.uint64)
        if digest_of_all(digests) != found["content"] or any(number >= len(digests) for number in found["held_out"]):
            raise SchemaError("the digests are not those that were written")
        return cls(digests=digests, held_out=tuple(found["held_out"]))


def read_lists(path: Path) -> dict[str, DocumentList]:
    """The lists of documents by content; none where the file is missing or damaged: whoever needs
    one says so."""
    try:
        lists = [DocumentList.from_json(found) for found in check(read_json(path), _FILE)["lists"]]
    except (OSError, ValueError):
        return {}
    return {one.content: one for one in lists}


def find(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The number of a document that has it, for each digest, no document twice; -1 where there is
    none (left)."""
    order = np.argsort(among, kind="stable")
    ranks = np.empty(len(wanted), dtype=np.int64)
    by_value = np.argsort(wanted, kind="stable")
    ordered = wanted[by_value]
    ranks[by_value] = np.arange(len(wanted)) - np.searchsorted(ordered, ordered, side="left")
    at = np.searchsorted(among[order], wanted, side="left") + ranks
    inside = np.minimum(at, len(among) - 1)
    return np.where((at < len(among)) & (among[order][inside] == wanted), order[inside], -1)


def pack_numbers(numbers: Iterable[int], size: int) -> str:
    """A set of numbers below ``size``, as text: a bit for each."""
    bits = np.zeros(size, dtype=bool)
    bits[list(numbers)] = True
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()


def unpack_numbers(packed: str, size: int) -> frozenset[int]:
    """The set that `pack_numbers` made a text of. Raises SchemaError."""
    try:
        limit = (size + 7) // 8
        data = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), limit + 1)
    except (ValueError, zlib.error) as error:
        raise SchemaError(f"a set of documents cannot be unpacked ({error})") from None
    if len(data) != limit:
        raise SchemaError("a set of documents is of other data")
    return frozenset(np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), count=size)).tolist())


