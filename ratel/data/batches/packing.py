"""Documents into sequences of one length, boundaries kept.

A sequence begins with the document that waits longest; then the longest that still fits is added,
again and again. If none fits, plain text is cut to fill the rest, and its remainder begins the next
sequence; without plain text the rest is padding. So plain text fills sequences without a gap, and a
prompt is never parted from its answer unless both together are longer than a sequence.

For models that cannot keep documents apart every sequence holds one, or a part of one, and padding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ratel.data.batches.encode import Document

NO_LOSS = -100
_POOL_DOCUMENTS = 64
_POOL_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A document, or what is left of it: tokens from ``start`` on."""

    number: int
    start: int
    document: Document

    @property
    def end(self) -> int:
        """Where the next text of the same document begins, or the document ends."""
        return next((start for start in self.document.starts if start > self.start), len(self.document))

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence. int64 [seq_len] each; ``labels`` is not shifted, and ``NO_LOSS`` where nothing
    is to be learned."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray
    """0 in the padding behind the last document."""

    @property
    def num_targets(self) -> int:
        return int((self.labels != NO_LOSS).sum())


class Packer:
    def __init__(self, draw: Callable[[], tuple[int, Document] | None], *, seq_len: int, pad_id: int,
                 pool: list[Piece] | None = None, alone: bool = False) -> None:
        """``draw`` gives the next document and its number, None at the end. ``pool`` continues an
        earlier packer. ``alone``: one document in a sequence."""
        self._draw = draw
        self._seq_len = seq_len
        self._pad_id = pad_id
        self._alone = alone
        self._pool = list(pool or ())

    @property
    def waiting(self) -> list[tuple[int, int]]:
        """Number and start of each piece drawn and not yet in a row: with these the packer can be
        built again."""
        return [(piece.number, piece.start) for piece in self._pool]

    def next_row(self) -> Row | None:
        """The next sequence; None when all documents are in one."""
        self._refill()
        if not self._pool:
            return None
        row = Row(input_ids=np.full(self._seq_len, self._pad_id, dtype=np.int64),
                  labels=np.full(self._seq_len, NO_LOSS, dtype=np.int64),
                  position_ids=np.zeros(self._seq_len, dtype=np.int64),
                  attention_mask=np.zeros(self._seq_len, dtype=np.int64))
        used = self._place(self._pool.pop(0), row, 0)
        if self._alone:
            row.position_ids[:] = np.arange(self._seq_len)  # padding is no document of its own
            return row
        while used < self._seq_len and (piece := self._take(self._seq_len - used)):
            used = self._place(piece, row, used)
        row.position_ids[used:] = np.arange(self._seq_len - used)
        return row

    def _refill(self) -> None:
        waiting = sum(map(len, self._pool))
        while not self._pool or len(self._pool) < _POOL_DOCUMENTS and waiting < _POOL_ROWS * self._seq_len:
            drawn = self._draw()
            if drawn is None:
                return
            number, document = drawn
            self._pool += [Piece(number=number, start=start, document=document) for start in document.starts]
            waiting += len(document)

    def _place(self, piece: Piece, row: Row, used: int) -> int:
        """Write a piece at ``used``, as much as there is room for; the remainder waits at the
        front."""
        length = min(len(piece), self._seq_len - used)
        span, part = slice(used, used + length), slice(piece.start, piece.start + length)
        ids, targets = piece.document.ids[part], piece.document.targets[part]
        row.input_ids[span] = ids
        row.labels[span] = np.where(targets, ids, NO_LOSS)
        row.labels[used] = NO_LOSS  # What would predict it belongs to another document, or another sequence.
        row.position_ids[span] = np.arange(length)
        row.attention_mask[span] = 1
        if length < len(piece):
            self._pool.insert(0, Piece(number=piece.number, start=piece.start + length, document=piece.document))
        return used + length

    def _take(self, room: int) -> Piece | None:
        fitting = [index for index, piece in enumerate(self._pool) if len(piece) <= room]
        if fitting:
            return self._pool.pop(max(fitting, key=lambda index: len(self._pool[index])))
        # Cutting off a single token would only lose a target on either side of the cut.
        cuttable = (index for index, piece in enumerate(self._pool) if room > 1 and not piece.document.whole)
        index = next(cuttable, None)
        return None if index is None else self._pool.pop(index)
