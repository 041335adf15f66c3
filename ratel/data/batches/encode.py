"""Records as tokens: which ids, which of them are targets, and whether they may be cut."""

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import numpy as np

from ratel.data.chat import ChatEncoder
from ratel.data.sources.records import Chat, Completion, Record, RecordError, Text
from ratel.data.tokens.pieces import Pieces
from ratel.data.tokens.tokenizer import eos_id, prefix_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Document:
    """Tokens of one record, closed by EOS. ``ids`` int32 [n]; ``targets`` bool [n]: is this token
    to be learned?"""

    ids: np.ndarray
    targets: np.ndarray
    whole: bool
    """The targets need their beginning (a prompt): cut only what is longer than a sequence."""

    starts: tuple[int, ...] = (0,)
    """Where texts begin that know nothing of each other: more than one of a conversation that its
    template rewrites."""

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Deterministic: one record gives the same tokens always, which is what makes a position
    resumable. ``today`` is for templates that write the date."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, vocab_size: int | None = None, today: date | None = None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._prefix = prefix_ids(tokenizer)
        self._eos = eos_id(tokenizer)
        self._pieces = Pieces(tokenizer)
        self._chat = ChatEncoder(tokenizer, today)

    def encode(self, record: Record) -> Document:
        """Raises RecordError where the chat template refuses, or what it renders cannot be split,
        or an id has no embedding."""
        document = self._encode_chat(record) if isinstance(record, Chat) else self._encode_text(record)
        check_ids(document.ids, self._tokenizer, self._vocab_size)
        return document

    def _encode_chat(self, chat: Chat) -> Document:
        closed = [self._close(one.ids, one.targets, learn=not one.is_ended) for one in self._chat.sequences(chat)]
        starts = np.cumsum([0, *(len(ids) for ids, _ in closed)])[:-1]
        return Document(ids=np.concatenate([ids for ids, _ in closed]), whole=True, starts=tuple(starts.tolist()),
                        targets=np.concatenate([targets for _, targets in closed]))

    def _encode_text(self, record: Text | Completion) -> Document:
        if isinstance(record, Text):
            ids, prompt = self._begin(self._pieces.first(record.text)), 0
        else:
            # The prompt as it is at inference, where it ends; the completion as what follows it
            # directly.
            begun = self._begin(self._pieces.first(record.prompt))
            prompt = len(begun)
            ids = np.concatenate([begun, (self._pieces.next if record.prompt else self._pieces.first)(record.completion)])
        targets = np.arange(len(ids)) >= prompt
        closed, targets = self._close(ids, targets, learn=True)
        return Document(ids=closed, targets=targets, whole=isinstance(record, Completion))

    def _begin(self, ids: np.ndarray) -> np.ndarray:
        """The tokens with BOS before them, unless the text was written with one."""
        is_begun = ids[:len(self._prefix)].tolist() == self._prefix
        return ids if is_begun else np.concatenate([np.array(self._prefix, dtype=np.int32), ids])

    def _close(self, ids: np.ndarray, targets: np.ndarray, *, learn: bool) -> tuple[np.ndarray, np.ndarray]:
        """The tokens with EOS after them, unless it is there already (before a newline, as chat
        templates write it).

        EOS is a target where the token before it is one, and (``learn``) not the end of a turn by
        itself.
        """
        if self._eos in ids[-2:]:
            return ids, targets
        return np.append(ids, np.int32(self._eos)), np.append(targets, learn and len(targets) > 0 and targets[-1])


def check_ids(ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None) -> None:
    """Raises RecordError for an id that the model has no embedding for."""
    if vocab_size is not None and len(ids) and int(ids.max()) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise RecordError(f"the token {token!r} has id {int(ids.max())}, but the model's vocabulary ends at {vocab_size - 1}",
                          "Remove the token from the text, or enlarge the embedding")
