"""Batches for tasks: one document a row, padded, with its label, its words' labels or hidden
tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ratel.config import CLASSIFY, MASKED_LM
from ratel.data.batches.encode import check_ids
from ratel.data.batches.forms import Batch, Draw
from ratel.data.batches.hiding import Hiding
from ratel.data.batches.packing import NO_LOSS, Piece
from ratel.data.sources.labelled import LabelledText, LabelledWords, Labels
from ratel.data.sources.records import Text
from ratel.data.tokens.pieces import Pieces
from ratel.data.tokens.tokenizer import affixes, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PADDED_TO = 64
"""Batches are as long as their longest row, rounded up to a multiple of this: what a block does is
learned once per length."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as tokens. ``labels``: of the record, or of each token; None where tokens are
    still to be hidden."""

    ids: np.ndarray
    types: np.ndarray | None = None
    labels: Any = None
    starts: tuple[int, ...] = (0,)
    """Where texts begin, as in `Document`: an example is one text."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        return int((self.labels != NO_LOSS).sum()) if isinstance(self.labels, np.ndarray) and self.labels.ndim else 1


class Examples:
    """The form of data with labels, and of text for `masked-lm`.

    Texts are cut to ``seq_len`` tokens, special ones included, a pair at the longer of the two
    first; text for `masked-lm` is not, but goes on in a row of its own. ``takes_types``: the model
    tells the texts of a pair apart by ``token_type_ids``.
    """

    def __init__(self, task: str, tokenizer: "PreTrainedTokenizerBase", labels: Labels | None, *, seq_len: int, vocab_size: int,
                 takes_types: bool, seed: int) -> None:
        self._task, self._tokenizer, self._labels = task, tokenizer, labels
        self._seq_len, self._vocab_size, self._takes_types = seq_len, vocab_size, takes_types
        self._pad_id, self._pieces = pad_id(tokenizer), Pieces(tokenizer)
        self._hiding = Hiding(tokenizer, seed) if task == MASKED_LM else None
        self._prefix, self._suffix = affixes(tokenizer)
        self.tells = {"task": task, "labels": list(labels.names) if labels is not None else [],
                      "problem": labels.problem if labels is not None else None}

    # -- records -------------------------------------------------------------------------------------------------

    def encode(self, record: "LabelledText | LabelledWords | Text") -> Example:
        if isinstance(record, LabelledText):
            found = self._classified(record)
        elif isinstance(record, LabelledWords):
            found = self._tagged(record)
        else:
            found = Example(ids=self._pieces.first(record.text))
        check_ids(found.ids, self._tokenizer, self._vocab_size)
        return found

    def _classified(self, record: LabelledText) -> Example:
        text = record.text if record.pair is not None else self._pieces.begin(record.text, self._seq_len)
        out = self._cut(text, record.pair)
        label = np.asarray(self._labels.value(record.label))
        return Example(ids=self._ids(out), types=self._types(out),
                       labels=label.astype(np.float32 if label.dtype.kind == "f" else np.int64))

    def _tagged(self, record: LabelledWords) -> Example:
        """A word's label is that of its first token; its other tokens and the special ones have
        none."""
        out = self._cut(list(record.words), is_split_into_words=True)
        labels = np.full(len(out["input_ids"]), NO_LOSS, dtype=np.int64)
        before = None
        for place, word in enumerate(out.word_ids()):
            if word is not None and word != before:
                labels[place] = self._labels.number(record.labels[word])
            before = word
        return Example(ids=self._ids(out), types=self._types(out), labels=labels)

    def _cut(self, *texts: Any, **options: Any) -> Any:
        return self._tokenizer(*texts, truncation=True, max_length=self._seq_len, return_token_type_ids=self._takes_types,
                               return_attention_mask=False, verbose=False, **options)

    def _ids(self, out: Any) -> np.ndarray:
        return np.array(out["input_ids"], dtype=np.int32)

    def _types(self, out: Any) -> np.ndarray | None:
        return np.array(out["token_type_ids"], dtype=np.int64) if self._takes_types else None

    def size(self, document: Example) -> int:
        return max(1, -(-len(document) // self._room)) * self._seq_len

    # -- rows ----------------------------------------------------------------------------------------------------

    def rows(self, draw: Draw, pool: list[Piece], epoch: Callable[[], int]) -> "OneEach":
        return OneEach(draw, pool, self._row, self._room, epoch)

    @property
    def _room(self) -> int:
        """Tokens of a document that a row has room for: all of one that was cut already."""
        return self._seq_len - (len(self._prefix) + len(self._suffix) if self._hiding is not None else 0)

    def _row(self, piece: Piece, epoch: int) -> Example:
        if self._hiding is None:
            return piece.document
        ids = piece.document.ids[piece.start : piece.start + self._room]
        hidden, labels = self._hiding.hide(ids, (epoch, piece.number), piece.start)
        before, after = (np.array(part, dtype=np.int32) for part in (self._prefix, self._suffix))
        return Example(ids=np.concatenate([before, hidden, after]),
                       labels=np.concatenate([np.full_like(before, NO_LOSS), labels, np.full_like(after, NO_LOSS)]))

    # -- batches -------------------------------------------------------------------------------------------------

    def collate(self, rows: Sequence[Example]) -> Batch:
        longest = max(map(len, rows))
        length = min(self._seq_len, -(-longest // _PADDED_TO) * _PADDED_TO)
        batch = {"input_ids": self._padded([row.ids for row in rows], length, self._pad_id),
                 "attention_mask": self._padded([np.ones(len(row), dtype=np.int64) for row in rows], length, 0)}
        if self._takes_types:
            batch["token_type_ids"] = self._padded([np.zeros(len(row), dtype=np.int64) if row.types is None else row.types
                                                    for row in rows], length, 0)
        labels = [row.labels for row in rows]
        batch["labels"] = (torch.from_numpy(np.stack(labels)) if self._task == CLASSIFY
                           else self._padded(labels, length, NO_LOSS))
        return batch

    def _padded(self, rows: Sequence[np.ndarray], length: int, value: int) -> torch.Tensor:
        out = np.full((len(rows), length), value, dtype=np.int64)
        for row, line in zip(rows, out):
            line[: len(row)] = row
        return torch.from_numpy(out)


class OneEach:
    """A row for each document, or for each ``room`` tokens of it."""

    def __init__(self, draw: Draw, pool: list[Piece], make: Callable[[Piece, int], Example], room: int,
                 epoch: Callable[[], int]) -> None:
        self._draw, self._make, self._room, self._epoch = draw, make, room, epoch
        self._rest = list(pool)

    @property
    def waiting(self) -> list[tuple[int, int]]:
        return [(piece.number, piece.start) for piece in self._rest]

    def next_row(self) -> Example | None:
        piece = self._rest.pop() if self._rest else self._next_piece()
        if piece is None:
            return None
        if len(piece) > self._room:
            self._rest.append(Piece(number=piece.number, start=piece.start + self._room, document=piece.document))
        return self._make(piece, self._epoch())

    def _next_piece(self) -> Piece | None:
        drawn = self._draw()
        return None if drawn is None else Piece(number=drawn[0], start=0, document=drawn[1])
