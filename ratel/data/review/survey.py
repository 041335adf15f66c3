"""Every record of some files with its line, as it is trained on or with what is wrong with it."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ratel.data.batches.encode import Document, Encoder
from ratel.data.sources.bundled import bundled_sources
from ratel.data.sources.corpus import plain
from ratel.data.sources.files import MIN_TEXT_BYTES, DataArgument, LineError, Source, find_sources, scan_jsonl, scan_text
from ratel.data.sources.records import Record, RecordError, Text, decode, parse_line
from ratel.data.tokens.tokenizer import check_vocab, load_tokenizer, tokenizer_source
from ratel.errors import RatelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One record: with its ``document``, or with an ``error``. ``line``: its first one. ``offset``:
    of its byte."""

    source: Source
    line: int
    offset: int
    record: Record | None = None
    document: Document | None = None
    error: RecordError | None = None

    @property
    def error_line(self) -> int:
        return self.line + (self.error.line if self.error else 0)


@dataclass(frozen=True, kw_only=True)
class Survey:
    tokenizer: "PreTrainedTokenizerBase"
    sources: tuple[Source, ...]
    entries: Iterator[Entry]


def open_survey(data: DataArgument | None, *, model: str | None, tokenizer: str | None, seq_len: int, first_line: int = 1) -> Survey:
    """A survey of the records as a run with these options would learn from them; without ``data``
    of the bundled text."""
    sources = bundled_sources() if data is None else find_sources(data)
    if first_line > 1 and len(sources) > 1:
        raise RatelError("there are several files", field="--line", value=first_line, remedy="Name one of them")
    found = load_tokenizer(tokenizer_source(tokenizer, model))
    vocab_size = None if model is None else _vocab_size(Path(model))
    if vocab_size is not None:
        check_vocab(found, vocab_size)
    encoder = Encoder(found, vocab_size=vocab_size)
    return Survey(tokenizer=found, sources=sources, entries=survey(sources, encoder.encode, text_bytes=max(MIN_TEXT_BYTES, 4 * seq_len),
                                                  first_line=first_line))


def survey(sources: Sequence[Source], encode: Callable[[Any], Any], *, text_bytes: int = MIN_TEXT_BYTES, first_line: int = 1,
           parse: Callable[[bytes], Any] = parse_line) -> Iterator[Entry]:
    """All records in the order of the files; blank ones are passed over. ``first_line``: of the
    first file."""
    for source in sources:
        records = _lines(source, parse, first_line) if source.suffix == ".jsonl" else _texts(source, text_bytes, first_line)
        for entry in records:
            yield entry if entry.error is not None else _encoded(entry, encode)
        first_line = 1


@dataclass(kw_only=True)
class Totals:
    """``cut``: texts longer than a sequence, ``bare``: those of them that have a prompt, which
    parts of the answer lose. ``rewritten``: conversations whose template changes what was said
    before, so that they are several texts."""

    records: int = 0
    texts: int = 0
    tokens: int = 0
    targets: int = 0
    cut: int = 0
    bare: int = 0
    rewritten: int = 0
    bad: int = 0

    def add(self, entry: Entry, seq_len: int) -> None:
        document = entry.document
        if document is None:
            self.bad += 1
            return
        lengths = [end - start for start, end in texts_of(document)]
        self.records += 1
        self.texts += len(lengths)
        self.tokens += len(document)
        self.targets += int(learned_of(document).sum())
        cut = sum(length > seq_len for length in lengths)
        self.cut += cut
        self.bare += cut * document.whole
        self.rewritten += len(lengths) > 1


def texts_of(document: Document) -> list[tuple[int, int]]:
    """Where each text of a document begins and ends."""
    return list(zip(document.starts, (*document.starts[1:], len(document))))


def learned_of(document: Document) -> np.ndarray:
    """A document's targets, without the first token of each text: nothing comes before it that
    would predict it."""
    learned = document.targets.copy()
    learned[list(document.starts)] = False
    return learned


def _vocab_size(directory: Path) -> int | None:
    try:
        config = json.loads((directory / "config.json").read_bytes())
        size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def _encoded(entry: Entry, encode: Callable[[Any], Any]) -> Entry:
    try:
        return Entry(source=entry.source, line=entry.line, offset=entry.offset, record=entry.record,
                     document=encode(entry.record))
    except RecordError as error:
        return Entry(source=entry.source, line=entry.line, offset=entry.offset, record=entry.record, error=error)


def _lines(source: Source, parse: Callable[[bytes], Any], first_line: int) -> Iterator[Entry]:
    with source.open() as file:
        try:
            for offset, number, line in scan_jsonl(file):
                if number < first_line:
                    continue
                try:
                    record = parse(line)
                except RecordError as error:
                    yield Entry(source=source, line=number, offset=offset, error=error)
                    continue
                if record is not None:
                    yield Entry(source=source, line=number, offset=offset, record=record)
        except LineError as error:  # the rest cannot be told apart into lines
            yield Entry(source=source, line=error.number, offset=0, error=error.error)


def _texts(source: Source, text_bytes: int, first_line: int) -> Iterator[Entry]:
    bad = _bad_lines(source)
    if bad:
        yield from bad
        return
    with source.open() as file:
        starts = list(scan_text(file, text_bytes, 0))
    with source.open() as file:
        line = 1 + file.read(starts[0] if starts else 0).count(b"\n")
        for start, end in zip(starts, (*starts[1:], source.num_bytes)):
            data = file.read(end - start)
            record: Text | None = plain(data)
            if record is not None and line + data.rstrip(b"\n").count(b"\n") >= first_line:
                yield Entry(source=source, line=line, offset=start, record=record)
            line += data.count(b"\n")


def _bad_lines(source: Source) -> list[Entry]:
    found = []
    with source.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                decode(line)
            except RecordError as error:
                found.append(Entry(source=source, line=number, offset=0, error=RecordError(str(error), error.expected)))
    return found
