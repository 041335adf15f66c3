"""How documents become the rows of batches: what a dataset leaves to the task that it is for."""

from collections.abc import Callable, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ratel.data.batches.encode import Document, Encoder
from ratel.data.batches.packing import Packer, Piece, Row
from ratel.data.tokens.tokenizer import pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]
Draw = Callable[[], tuple[int, Any] | None]
"""The next document and its number; None at the end."""


class RowMaker(Protocol):
    """Makes rows of the documents that it draws."""

    @property
    def waiting(self) -> list[tuple[int, int]]:
        """Number and start of each piece drawn and not yet in a row: with these it can be made
        again."""

    def next_row(self) -> Any:
        """The next row, with its ``num_targets``; None when all documents are in one."""


class Form(Protocol):
    """Encodes records, makes rows of them, and batches of rows."""

    tells: dict[str, Any]
    """What else a position must agree with to be taken up again, as JSON values."""

    def encode(self, record: Any) -> Any:
        """The record as tokens: something with a length. Raises RecordError."""

    def size(self, document: Any) -> int:
        """How many of the tokens of sequences a document takes up."""

    def rows(self, draw: Draw, pool: list[Piece], epoch: Callable[[], int]) -> RowMaker:
        """``pool``: pieces that come first. ``epoch``: which one the document drawn last is of."""

    def collate(self, rows: Sequence[Any]) -> Batch: ...


class Packed:
    """The form for learning the next token: documents share sequences of one length, or are alone
    in them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, seq_len: int, vocab_size: int | None, alone: bool = False,
                 marks_padding: bool = False, today: date | None = None) -> None:
        """``marks_padding``: batches say where it is, for whoever counts tokens."""
        self._alone = alone
        self._keys = ("input_ids", "labels", "position_ids", *(["attention_mask"] if marks_padding else []))
        self.tells: dict[str, Any] = {"one_document": True} if alone else {}
        self._encoder = Encoder(tokenizer, vocab_size=vocab_size, today=today)
        self._seq_len, self._pad_id = seq_len, pad_id(tokenizer)

    def encode(self, record: Any) -> Document:
        return self._encoder.encode(record)

    def size(self, document: Document) -> int:
        return len(document)

    def rows(self, draw: Draw, pool: list[Piece], epoch: Callable[[], int]) -> Packer:
        return Packer(draw, seq_len=self._seq_len, pad_id=self._pad_id, pool=pool, alone=self._alone)

    def collate(self, rows: Sequence[Row]) -> Batch:
        return {name: torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
                for name in self._keys}
