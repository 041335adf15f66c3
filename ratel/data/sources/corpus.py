"""Documents by number: an index of byte offsets, built in one pass, over files that need not fit in
memory."""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from ratel.data.sources.documents import digest
from ratel.data.sources.files import MAX_LINE_BYTES, MIN_TEXT_BYTES, LineError, Source, scan_jsonl, scan_text, text_digest
from ratel.data.sources.records import Chat, Record, RecordError, Text, decode, parse_line
from ratel.data.sources.skipping import SkippedLines
from ratel.errors import RatelError
from ratel.units import GIB, format_bytes, format_count

CHECKED_BYTES = GIB
"""How much of a corpus is checked record by record before training starts (some seconds). What lies
beyond is checked as it is read, with the same message; checking all of a terabyte first would cost
an hour."""


class Corpus:
    """Documents of some files, read by number in any order.

    Holds 16 bytes per document. Raises RatelError, naming file and line, for anything that is not
    as documented.
    """

    def __init__(self, sources: Sequence[Source], *, text_bytes: int = MIN_TEXT_BYTES, field: str = "data",
                 parse: Callable[[bytes], Any] = parse_line, checked_bytes: float | None = None,
                 skipped: SkippedLines | None = None) -> None:
        """``text_bytes``: size that documents of plain text are gathered to (see ``scan_text``).
        ``parse``: what a line of a .jsonl file is read by; it raises RecordError.
        ``checked_bytes``: how much is checked record by record now, None: a gigabyte. ``skipped``:
        takes bad lines, which are then no documents; None: they are errors."""
        self.field, self.skipped = field, skipped
        self.sources = tuple(sources)
        self.has_chat = False
        self._text_bytes = text_bytes
        self.parse, self.max_checked_bytes = parse, CHECKED_BYTES if checked_bytes is None else checked_bytes
        self._checked_bytes = 0
        offsets, digests = array("Q"), array("Q")
        self._first = [0]
        for source in self.sources:
            self._index(source, offsets, digests)
            self._first.append(len(offsets))
        self._offsets = np.frombuffer(offsets, dtype=np.uint64) if offsets else np.zeros(0, dtype=np.uint64)
        self.digests = np.frombuffer(digests, dtype=np.uint64) if digests else np.zeros(0, dtype=np.uint64)
        """A digest of each document's bytes."""
        if not len(self):
            raise RatelError("there is no text in it", field=field, value=self._names(),
                             remedy="Give files that have at least one document that is not blank")

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def num_bytes(self) -> int:
        return sum(source.num_bytes for source in self.sources)

    def read(self, number: int) -> Record | None:
        """The same as `record`, but a bad document is a RatelError, too, which names its line."""
        try:
            return self.record(number)
        except RecordError as error:
            raise self.error(number, error) from error

    def record(self, number: int) -> Record | None:
        """The record of a document; None where it turns out to be blank. Raises RecordError for a
        bad one, RatelError for a file that is gone or has other contents than when the corpus was
        opened."""
        source, start = self._locate(number)
        try:
            with source.open() as file:
                file.seek(start)
                if source.suffix == ".jsonl":
                    content = file.readline(MAX_LINE_BYTES + 1)
                else:  # documents end well within this; the rest of a longer stretch is blank lines
                    content = file.read(min(self._end(number) - start, 6 * self._text_bytes))
        except OSError as error:
            raise RatelError(f"cannot be read: {error.strerror}", field=self.field, value=source.name,
                             remedy="Put the files back as they were; then --resume goes on from the last saved state") from error
        if self._digest(source, content) != self.digests[number]:
            raise RatelError(f"was changed while it was read: at byte {start:,} there is another document", field=self.field,
                             value=source.name, remedy="Leave the files alone during a run; --resume goes on from the last saved "
                                                       "state if the documents learned from are still there")
        return self.parse(content) if source.suffix == ".jsonl" else plain(content)

    def skips(self, number: int, error: RecordError) -> bool:
        """Whether a bad document is passed over; it is noted then."""
        if self.skipped is None:
            return False
        source, start = self._locate(number)
        self.skipped.add(source.name, start, error)
        return True

    def _digest(self, source: Source, content: bytes) -> int:
        return digest(content.rstrip(b"\r\n")) if source.suffix == ".jsonl" else text_digest(content, self._text_bytes)

    def error(self, number: int, error: RecordError) -> RatelError:
        """What is wrong with a document as a RatelError, with its line (counted now, not stored for
        each)."""
        source, start = self._locate(number)
        line = 1 + error.line
        with source.open() as file:
            while start > 0 and (block := file.read(min(start, 1 << 20))):
                line += block.count(b"\n")
                start -= len(block)
        return self.line_error(source, line, error)

    def describe(self) -> str:
        files = self._names() if len(self.sources) <= 2 else f"{len(self.sources)} files"
        skipped = f", {format_count(len(self.skipped), 'bad line')} skipped" if self.skipped else ""
        return f"{format_count(len(self), 'document')} ({format_bytes(self.num_bytes)}) in {files}{skipped}"

    def _names(self) -> str:
        names = [source.name for source in self.sources[:3]]
        return ", ".join(names) + (f" and {len(self.sources) - 3} more" if len(self.sources) > 3 else "")

    def _index(self, source: Source, offsets: array, digests: array) -> None:
        check_until = max(0, self.max_checked_bytes - self._checked_bytes)
        skip = None if self.skipped is None else partial(self.skipped.add, source.name)
        try:
            with source.open() as file:
                if source.suffix == ".jsonl":
                    self._index_jsonl(scan_jsonl(file, skip), check_until, offsets, digests, skip)
                else:
                    self._index_text(source, file, check_until if skip is None else 0, offsets, digests)
        except LineError as error:
            raise self.line_error(source, error.number, error.error) from None
        self._checked_bytes += source.num_bytes

    def _index_text(self, source: Source, file: BinaryIO, check_until: float, offsets: array, digests: array) -> None:
        first = len(offsets)
        offsets.extend(scan_text(file, self._text_bytes, check_until))
        ends = [*offsets[first + 1 :], source.num_bytes]
        for start, end in zip(offsets[first:], ends):
            file.seek(start)
            digests.append(text_digest(file.read(min(end - start, 6 * self._text_bytes)), self._text_bytes))

    def _index_jsonl(self, lines: Iterator[tuple[int, int, bytes]], check_until: float, offsets: array, digests: array,
                     skip: Callable[[int, RecordError, int], None] | None) -> None:
        for offset, number, line in lines:
            if offset < check_until:
                try:
                    record = self.parse(line)
                except RecordError as error:
                    if skip is None:
                        raise LineError(number, error) from None
                    skip(offset, error, number)
                    continue
                if record is None:
                    continue
                self.has_chat |= isinstance(record, Chat)
            offsets.append(offset)
            digests.append(digest(line.rstrip(b"\r\n")))

    def _locate(self, number: int) -> tuple[Source, int]:
        assert 0 <= number < len(self)
        return self.sources[bisect_right(self._first, number) - 1], int(self._offsets[number])

    def _end(self, number: int) -> int:
        which = bisect_right(self._first, number) - 1
        return int(self._offsets[number + 1]) if number + 1 < self._first[which + 1] else self.sources[which].num_bytes

    def line_error(self, source: Source, line: int, error: RecordError) -> RatelError:
        return RatelError(f"{source.name}, line {line}: {error}", field=self.field,
                          remedy=f"{error.expected}; or give --skip-bad-lines to pass over such lines")


def plain(data: bytes) -> Text | None:
    text = decode(data).replace("\r\n", "\n").strip("\n")
    return Text(text=text) if text.strip() else None
