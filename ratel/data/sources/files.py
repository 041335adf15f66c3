"""Where text comes from: files and directories found, and each file cut into documents in one
bounded pass."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ratel.data.sources.documents import digest
from ratel.data.sources.records import RecordError, decode
from ratel.errors import RatelError
from ratel.reading import NotRegularError, open_regular
from ratel.units import KIB, MIB

DataArgument = str | os.PathLike | Sequence[str | os.PathLike]
SUFFIXES = (".txt", ".jsonl")
MAX_LINE_BYTES = 64 * MIB
"""A longer line of a .jsonl file is an error: it would have to be in memory as a whole, several
times over."""

_COPY_IT = "Write what comes out of it to a .txt or .jsonl file, and give that: documents are read in random order"

MIN_TEXT_BYTES = 2 * KIB
_HARD_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file, or text held in memory under a name (``data``)."""

    name: str
    suffix: str
    num_bytes: int
    data: bytes | None = None

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data) if self.data is not None else open_regular(self.name)


def find_sources(data: DataArgument, *, field: str = "data") -> tuple[Source, ...]:
    """The files that ``data`` names, directories searched recursively, in sorted order."""
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    if not paths:
        raise RatelError("the list is empty", field=field, remedy="Name a .txt or .jsonl file, or a directory of them")
    found: list[Source] = []
    for path in map(Path, paths):
        found.extend(_sources_of(path, field))
    return tuple(found)


def _sources_of(path: Path, field: str) -> Iterator[Source]:
    if path.is_dir():
        files = sorted(_walk(path))
        if not files:
            raise RatelError("the directory has no .txt or .jsonl file", field=field, value=path,
                             remedy="Put such files there, or name another directory")
    elif path.suffix.lower() in SUFFIXES:
        files = [path]
    elif path.exists():
        if not path.is_file():
            raise RatelError("it is not a regular file", field=field, value=path, remedy=_COPY_IT)
        raise RatelError("not a kind of file that can be read", field=field, value=path,
                         remedy='Give a .txt file, a .jsonl file (one JSON object on a line, as {"text": ...}) or a directory of them')
    else:
        files = [path]
    for file in files:
        yield _file_source(file, field)


def _file_source(path: Path, field: str) -> Source:
    try:
        with open_regular(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
    except NotRegularError as error:
        raise RatelError(error.strerror, field=field, value=path, remedy=_COPY_IT) from error
    except OSError as error:
        missing = "Give a .txt file, a .jsonl file or a directory of them on this machine; nothing is downloaded"
        raise RatelError(f"cannot be opened: {error.strerror}", field=field, value=path, remedy=(
            missing if isinstance(error, FileNotFoundError) else "Check the path and its permissions")) from error
    return Source(name=str(path), suffix=path.suffix.lower(), num_bytes=num_bytes)


def _walk(root: Path) -> Iterator[Path]:
    """Files of a tree. Links to directories are followed, each real directory once, so that a loop
    of links ends."""
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(folder, name)


def scan_jsonl(file: BinaryIO, skip: Callable[[int, RecordError, int], None] | None = None) -> Iterator[tuple[int, int, bytes]]:
    """``(offset, line number, line)`` of every line that is not blank. ``skip`` is told of lines
    that are too long; without it LineError is raised."""
    offset = 0
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            error = RecordError(f"the line is longer than {MAX_LINE_BYTES // MIB} MiB", "Split the record")
            if skip is None:
                raise LineError(number, error)
            skip(offset, error, number)
            while line and not line.endswith(b"\n"):
                offset += len(line)
                line = file.readline(MAX_LINE_BYTES)
        elif not line.isspace():
            yield offset, number, line
        offset += len(line)


def text_digest(content: bytes, target_bytes: int) -> int:
    """The digest of a document of plain text, as `scan_text` cuts it: of its pieces but blank ones,
    which may lie after it."""
    return digest(b"".join(piece for piece in _pieces(io.BytesIO(content), target_bytes) if not piece.isspace()))


def scan_text(file: BinaryIO, target_bytes: int, check_until: float) -> Iterator[int]:
    """Offsets at which the documents of a plain text begin; each ends where the next begins.

    Paragraphs (separated by blank lines) are gathered until a document has ``target_bytes``; it
    then ends at the next blank line. Text without blank lines is cut at four times that, at the end
    of a line, or of a word where there are no lines either. The first ``check_until`` bytes are
    checked to be UTF-8.
    """
    start: int | None = None
    offset = 0
    number = 1
    for piece in _pieces(file, target_bytes):
        if offset < check_until:
            _check_utf8(piece, number)
        blank = piece.isspace()
        if start is not None and (blank and offset - start >= target_bytes
                                  or offset - start >= _HARD_FACTOR * target_bytes):
            start = None
        if start is None and not blank:
            start = offset
            yield offset
        offset += len(piece)
        number += piece.endswith(b"\n")


def _pieces(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """Lines, those longer than ``limit`` in pieces that end after a space or at least between two
    characters."""
    while piece := file.readline(limit):
        if len(piece) == limit and not piece.endswith(b"\n"):
            cut = piece.rfind(b" ") + 1 or _character_boundary(piece)
            file.seek(cut - len(piece), os.SEEK_CUR)
            piece = piece[:cut]
        yield piece


def _character_boundary(piece: bytes) -> int:
    """Length of the longest prefix that does not end inside a UTF-8 character (or all of it, if it
    is not UTF-8)."""
    for back in range(1, 5):
        lead = piece[-back]
        if lead & 0xC0 != 0x80:
            width = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(piece) if width <= back else len(piece) - back
    return len(piece)


def _check_utf8(piece: bytes, number: int) -> None:
    try:
        decode(piece)
    except RecordError as error:
        raise LineError(number, error) from None


class LineError(Exception):
    """A RecordError at a line; the corpus, which knows the file, makes a RatelError of it."""

    def __init__(self, number: int, error: RecordError) -> None:
        super().__init__(number, error)
        self.number, self.error = number, error
