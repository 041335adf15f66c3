"""Records as tokens: which ids, which of them are targets, and whether they may be cut."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ratel.data.chat import ChatEncoder
from ratel.data.records import Chat, Completion, Record, RecordError, Text
from ratel.data.tokenizer import eos_id, prefix_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Document:
    """Tokens of one record, closed by EOS. ``ids`` int32 [n]; ``targets`` bool [n]: is this token to be learned?"""

    ids: np.ndarray
    targets: np.ndarray
    whole: bool
    """The targets need their beginning (a prompt): cut only what is longer than a sequence."""

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Deterministic: one record gives the same tokens always, which is what makes a position resumable."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, vocab_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._prefix = prefix_ids(tokenizer)
        self._eos = eos_id(tokenizer)
        self._chat = ChatEncoder(tokenizer)

    def encode(self, record: Record) -> Document:
        """Raises RecordError where the chat template refuses or an id has no embedding."""
        if isinstance(record, Chat):
            ids, targets = self._chat.encode(record)
        elif isinstance(record, Completion):
            # Tokenised apart: at inference, too, the prompt's last token ends where the prompt does.
            prompt, completion = self._begin(self._ids(record.prompt)), self._ids(record.completion)
            ids = np.concatenate([prompt, completion])
            targets = np.arange(len(ids)) >= len(prompt)
        else:
            ids = self._begin(self._ids(record.text))
            targets = np.ones(len(ids), dtype=bool)
        check_ids(ids, self._tokenizer, self._vocab_size)
        return self._close(ids, targets, whole=not isinstance(record, Text))

    def _ids(self, text: str) -> np.ndarray:
        ids = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False,
                              return_token_type_ids=False, verbose=False)["input_ids"]
        return np.array(ids, dtype=np.int32)

    def _begin(self, ids: np.ndarray) -> np.ndarray:
        """With BOS before it, unless the text was written with one."""
        if ids[:len(self._prefix)].tolist() == self._prefix:
            return ids
        return np.concatenate([np.array(self._prefix, dtype=np.int32), ids])

    def _close(self, ids: np.ndarray, targets: np.ndarray, *, whole: bool) -> Document:
        """With EOS after it, unless it is there already (before a newline, as chat templates write it).

        EOS is a target where the token before it is one.
        """
        if self._eos not in ids[-2:]:
            ids = np.append(ids, np.int32(self._eos))
            targets = np.append(targets, targets[-1] if len(targets) else False)
        return Document(ids=ids, targets=targets, whole=whole)


def check_ids(ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None) -> None:
    """Raises RecordError for an id that the model has no embedding for."""
    if vocab_size is not None and len(ids) and int(ids.max()) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise RecordError(f"the token {token!r} has id {int(ids.max())}, but the model's vocabulary ends at {vocab_size - 1}",
                          "Remove the token from the text, or enlarge the embedding")
