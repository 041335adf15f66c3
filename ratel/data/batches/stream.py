"""The endless stream of training sequences, and a position in it that can be written down and taken
up again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ratel.data.batches.forms import Form
from ratel.data.batches.order import Permutation
from ratel.data.batches.packing import Piece
from ratel.data.sources.corpus import Corpus
from ratel.data.sources.documents import pack_numbers, unpack_numbers
from ratel.data.sources.records import RecordError
from ratel.errors import RatelError
from ratel.schema import SchemaError, check, listing, record, text, whole


@dataclass(frozen=True, kw_only=True)
class Position:
    """Before which sequence the stream stands: next document of the epoch, and the pieces drawn but
    not yet packed."""

    epoch: int = 0
    cursor: int = 0
    waiting: tuple[tuple[int, int], ...] = ()
    learned: frozenset[int] = frozenset()
    """The documents of this epoch that came before its cursor was set to 0 again, because the data
    was changed then."""

    def to_dict(self, size: int) -> dict[str, Any]:
        """The position as JSON values. ``size``: how many documents the corpus has."""
        learned = {"learned": pack_numbers(self.learned, size)} if self.learned else {}
        return {"epoch": self.epoch, "cursor": self.cursor, "waiting": [list(piece) for piece in self.waiting], **learned}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], size: int) -> "Position":
        """The position that `to_dict` wrote. Raises SchemaError."""
        check(dict(state), record({"epoch": whole(0, 1 << 40), "cursor": whole(0, size),
                                   "waiting": listing(listing(whole(), least=2, most=2), most=1 << 20)}, {"learned": text()}, is_open=True), "data")
        if any(number >= size for number, _ in state["waiting"]):
            raise SchemaError("data.waiting names documents that there are not")
        return cls(epoch=state["epoch"], cursor=state["cursor"],
                   waiting=tuple((number, start) for number, start in state["waiting"]),
                   learned=unpack_numbers(state["learned"], size) if "learned" in state else frozenset())


_LONG = 1 << 20
"""Tokens. A document of more takes seconds to be made, and more than one reader of the same place
asks for it."""


class Reader:
    """Documents of a corpus by number, as tokens."""

    def __init__(self, corpus: Corpus, form: Form) -> None:
        self.corpus, self.form = corpus, form
        self._last_long: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self.corpus)

    def load(self, number: int) -> Any:
        """None for a document that is blank, or bad where those are skipped."""
        last = self._last_long  # read once: another thread may put a new one there
        if last is not None and last[0] == number:
            return last[1]
        try:
            record = self.corpus.record(number)
            document = None if record is None else self.form.encode(record)
            if document is not None and len(document) > _LONG:
                self._last_long = number, document
            return document
        except RecordError as error:
            if self.corpus.skips(number, error):
                return None
            raise self.corpus.error(number, error) from error


class RowStream:
    """Sequences over epochs without end, each epoch in an order of its own that the seed fixes."""

    def __init__(self, reader: Reader, *, held_out: frozenset[int], seed: int, position: Position = Position()) -> None:
        assert len(held_out) < len(reader)
        self._reader = reader
        self._held_out = held_out
        self._seed = seed
        self._epoch, self._cursor, self._learned = position.epoch, position.cursor, position.learned
        self._order = self._permutation()
        self._rows = reader.form.rows(self._draw, [self._piece(number, start) for number, start in position.waiting],
                                      lambda: self._epoch)

    @property
    def position(self) -> Position:
        return Position(epoch=self._epoch, cursor=self._cursor, waiting=tuple(self._rows.waiting), learned=self._learned)

    def next_row(self) -> Any:
        """The next sequence that has a target; others (all prompt, say) would be computed for
        nothing."""
        row = self._rows.next_row()
        first_epoch = self._epoch  # after a row: of a few documents the packer's first one draws many epochs at once
        while True:
            assert row is not None
            if row.num_targets:
                return row
            if self._epoch > first_epoch + 1:
                raise self._nothing_to_learn()
            row = self._rows.next_row()

    def next_number(self) -> int:
        """The next document of the order, those held out and those that the epoch has had passed
        over."""
        while True:
            if self._cursor == len(self._reader):
                self._epoch, self._cursor, self._learned = self._epoch + 1, 0, frozenset()
                self._order = self._permutation()
            number = self._order[self._cursor]
            self._cursor += 1
            if number not in self._held_out and number not in self._learned:
                return number

    def _draw(self) -> tuple[int, Any]:
        first_epoch = self._epoch
        while self._epoch <= first_epoch + 1:
            number = self.next_number()
            document = self._reader.load(number)
            if document is not None:
                return number, document
        raise self._nothing_to_learn()

    def _permutation(self) -> Permutation:
        return Permutation(len(self._reader), (self._seed, self._epoch))

    def _piece(self, number: int, start: int) -> Piece:
        document = self._reader.load(number)
        if document is None or start >= len(document):
            raise RatelError("the position to resume from does not lie in this data", field="data",
                             remedy="Resume with the files that the run was started with")
        return Piece(number=number, start=start, document=document)

    def _nothing_to_learn(self) -> RatelError:
        return RatelError("no sequence has a token to learn", field=self._reader.corpus.field,
                          remedy="Give documents of more than one token")
