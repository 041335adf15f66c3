"""Text to batches: the face of this package."""

import copy
import logging
import weakref
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any

from ratel.data.batches.forms import Batch, Form, Packed
from ratel.data.batches.order import Permutation
from ratel.data.batches.prefetch import Prefetcher
from ratel.data.batches.stream import Position, Reader, RowStream
from ratel.data.chat.own_tokens import renders_itself
from ratel.data.going_on import START_ANEW, go_on
from ratel.data.review.check import ConversationCheck
from ratel.data.sources.bundled import bundled_sources
from ratel.data.sources.corpus import Corpus
from ratel.data.sources.documents import DocumentList, digest_of_all
from ratel.data.sources.files import MIN_TEXT_BYTES, DataArgument, find_sources
from ratel.data.sources.skipping import SkippedLines
from ratel.data.tokens.tokenizer import DEFAULT_CHAT_TEMPLATE, check_vocab, fingerprint
from ratel.errors import RatelError
from ratel.schema import SchemaError, check, listing, record, text, whole
from ratel.units import format_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MIN_SEQ_LEN = 8
_PREFETCHED_BATCHES = 4
_CALLED = {"seed": "--seed", "seq_len": "--seq-len", "vocabulary": "the size of the tokenizer's vocabulary", "task": "--task"}
_STATE = record({"data": record({"documents": whole(1)}, {"content": text()}, is_open=True)}, {"evaluated": listing(whole())}, is_open=True)
_HELD_OUT_KEY = -1
"""In place of an epoch, of held-out documents: in the key of the permutation that picks them."""


def open_dataset(data: DataArgument | None, tokenizer: "PreTrainedTokenizerBase", *, seq_len: int, batch_size: int,
                 seed: int, eval_fraction: float = 0.01, eval_data: DataArgument | None = None,
                 eval_max_sequences: int | None = 64, vocab_size: int | None = None, packed: bool = True,
                 marks_padding: bool = False, skipped: SkippedLines | None = None, today: date | None = None) -> "Dataset":
    """Index the text, hold some of it out, and stand before the first batch.

    ``data``: a .txt or .jsonl file, a directory of them, a list of these, or None for the bundled
    text. ``eval_fraction``: share of the documents held out for evaluation, at least one; no more
    than fill ``eval_max_sequences`` (None: no limit). 0, or a single document, holds out none.
    ``eval_data``: evaluate on this instead, and hold out nothing. ``vocab_size``: of the model; ids
    beyond it are then refused. ``packed``: documents share sequences; else each sequence holds one,
    for models that cannot keep them apart. ``marks_padding``: batches have an ``attention_mask``, 0
    in the padding of sequences. ``skipped``: takes lines that are not as documented; None: they are
    errors. ``today``: for chat templates that write the date; a run that is resumed writes that of
    its first day (`day_of`). If there are conversations and the tokenizer has no chat template, it
    is given DEFAULT_CHAT_TEMPLATE. Raises RatelError for anything wrong with an option, a file or a
    line.
    """
    check_options(seq_len, batch_size, eval_fraction, eval_max_sequences)
    if vocab_size is not None:
        check_vocab(tokenizer, vocab_size)
    text_bytes = max(MIN_TEXT_BYTES, 4 * seq_len)  # About a sequence at four bytes a token.
    corpus = Corpus(bundled_sources() if data is None else find_sources(data), text_bytes=text_bytes, skipped=skipped)
    eval_corpus = None
    if eval_data is not None:
        eval_corpus = Corpus(find_sources(eval_data, field="eval_data"), text_bytes=text_bytes, field="eval_data", skipped=skipped)
    if not tokenizer.chat_template and not renders_itself(tokenizer) and (corpus.has_chat or eval_corpus is not None and eval_corpus.has_chat):
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE  # So that it is exported with the model trained on it.
    today = today or date.today()  # once: midnight may come between two looks at the calendar
    # A tokenizer must not be used by two threads at once; this one is ours, the caller keeps the
    # other.
    form = Packed(copy.deepcopy(tokenizer), seq_len=seq_len, vocab_size=vocab_size, alone=not packed,
                  marks_padding=marks_padding, today=today)
    writes_date = corpus.has_chat and "strftime_now" in str(tokenizer.chat_template)
    return Dataset(corpus, form, today=today if writes_date else None, seq_len=seq_len, batch_size=batch_size, seed=seed,
                   vocabulary=len(tokenizer), tokenizer=fingerprint(tokenizer, renders=corpus.has_chat),
                   eval_fraction=eval_fraction, eval_corpus=eval_corpus, eval_max_sequences=eval_max_sequences)


def day_of(position: Mapping[str, Any] | None) -> date | None:
    """The day that chat templates wrote until then; None where they write none. Raises RatelError
    for what is no date."""
    data = position.get("data") if position is not None else None
    try:
        return date.fromisoformat(data["today"]) if isinstance(data, Mapping) and "today" in data else None
    except (TypeError, ValueError):
        raise RatelError("the state's day is no date", field="data", value=data["today"], remedy="Resume from an older state") from None


class Dataset:
    """Batches of int64 tensors ``[batch_size, seq_len]``: input_ids, labels (-100: no loss; not
    shifted), position_ids (from 0 in each document); of a task those that `Examples` makes.

    It has one position. ``batches`` moves it on, ``state_dict`` writes it down, ``load_state_dict``
    goes to it.
    """

    def __init__(self, corpus: Corpus, form: Form, *, seq_len: int, batch_size: int, seed: int, vocabulary: int,
                 tokenizer: str, eval_fraction: float, eval_corpus: Corpus | None, eval_max_sequences: int | None,
                 today: date | None = None) -> None:
        """``tokenizer``: its `fingerprint`."""
        self._tokenizer = tokenizer
        self._today = {} if today is None else {"today": today.isoformat()}
        self.seq_len = seq_len
        self.batch_size = batch_size
        self._form = form
        self._seed = seed
        self._reader = Reader(corpus, form)
        self._eval_corpus = eval_corpus
        self._has_said_it = False
        self.changes = ""
        """What was done about data that was changed before `load_state_dict`."""
        numbers: tuple[int, ...] = ()
        max_tokens = None if eval_max_sequences is None else eval_max_sequences * seq_len
        if eval_corpus is not None:
            picked = _pick(Reader(eval_corpus, form), (0, _HELD_OUT_KEY), len(eval_corpus), max_tokens)
        else:
            count = min(len(corpus) - 1, max(1, round(len(corpus) * eval_fraction))) if eval_fraction > 0 else 0
            picked = _pick(self._reader, (seed, _HELD_OUT_KEY), count, max_tokens)
            numbers = tuple(number for number, _ in picked)
        self._max_eval_rows = eval_max_sequences
        self._evaluate_on(picked, numbers)
        self._told = {"seed": seed, "seq_len": seq_len, "vocabulary": vocabulary, **form.tells}
        self.documents = DocumentList(digests=corpus.digests, held_out=numbers)
        self._is_picked = True
        """What is held out follows from the seed; otherwise the data was changed, and a position
        has to say it."""
        checked = [one for one in (corpus, eval_corpus) if one is not None and one.has_chat and one.skipped is None]
        self._check = ConversationCheck(checked, form.encode, seq_len=seq_len)
        self._check.at_once()
        self._about_conversations = self._check.describe()
        self._position = Position()
        self._prefetcher: Prefetcher[tuple[Batch, Position]] | None = None

    @property
    def num_documents(self) -> int:
        """Documents trained on in an epoch."""
        return len(self._reader) - len(self._held_out)

    @property
    def num_eval_documents(self) -> int:
        return self._num_eval_documents

    @property
    def epoch(self) -> int:
        """Epochs through which the documents of the batches so far have gone completely."""
        return self._position.epoch

    def batches(self) -> Iterator[Batch]:
        """Batches without end, from the present position on, prepared ahead in a thread. A new call
        ends an earlier iterator. Each ``next`` moves the dataset's position."""
        self.close()
        stream = self._stream(self._position)
        form, size = self._form, self.batch_size  # not self: the thread must not keep it alive

        def produce() -> tuple[Batch, Position]:
            return form.collate([stream.next_row() for _ in range(size)]), stream.position

        prefetcher = self._prefetcher = Prefetcher(produce, depth=_PREFETCHED_BATCHES, name="ratel-data")
        weakref.finalize(self, prefetcher.close)
        self._check.go_on(lambda: copy.deepcopy(form).encode)
        weakref.finalize(self, self._check.stop)
        return _BatchIterator(self, prefetcher)

    def eval_batches(self, batch_size: int | None = None) -> list[Batch]:
        """All held-out sequences, the same at every call; the last batch may have fewer rows. May
        be empty."""
        size = batch_size or self.batch_size
        return [self._form.collate(self._eval_rows[at:at + size]) for at in range(0, len(self._eval_rows), size)]

    def describe(self) -> str:
        said = "; ".join(filter(None, [self._reader.corpus.describe(), self._about_conversations]))
        if self._eval_corpus is not None:
            return f"{said}; evaluation: {format_count(len(self._eval_rows), 'sequence')} of {self._eval_corpus.describe()}"
        if not self._eval_rows:
            return f"{said}; nothing held out for evaluation"
        documents = format_count(self.num_eval_documents, "document")
        return f"{said}; {documents} ({format_count(len(self._eval_rows), 'sequence')}) held out for evaluation"

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, as JSON values; small, whatever
        the corpus."""
        size = len(self._reader)
        held_out = {} if self._is_picked else {"evaluated": list(self.documents.held_out)}
        return {"data": self._fingerprint(), **held_out, **self._position.to_dict(size)}

    def load_state_dict(self, state: Mapping[str, Any], lists: Mapping[str, DocumentList] | None = None) -> None:
        """Go to a position: the next batches are those that would have come there, bit for bit.
        Another batch_size is allowed. Where the data was changed, ``lists`` has what it was, and
        the epoch goes on with what it has not had (docs/data.md). Anything else that changes the
        sequences is a RatelError."""
        self.close()
        try:
            before = check(dict(state), _STATE, "data")["data"]
            self._check_told(before)
            self._say_changed_evaluation(before)
            if self._is_same(before):
                self._evaluate_again(state.get("evaluated"))
                self._check_held_out(before)
                self._position = Position.from_dict(state, len(self._reader))
            else:
                self._go_on(state, (lists or {}).get(before.get("content")))
        except SchemaError as error:
            raise RatelError(f"the state's position in it is damaged: {error}", field="data",
                             remedy="Resume from an older state") from error
        self._stream(self._position)  # Raises here, not in the thread, if the documents are not there.

    def _fingerprint(self) -> dict[str, Any]:
        held_out = zlib.crc32(repr(sorted(self.documents.held_out)).encode())
        evaluation = None if self._eval_corpus is None else digest_of_all(self._eval_corpus.digests)
        return {**self._told, **self._today, "tokenizer": self._tokenizer, "evaluation": evaluation, "documents": len(self._reader),
                "bytes": self._reader.corpus.num_bytes, "content": self.documents.content, "held_out": held_out}

    def _say_changed_evaluation(self, before: Mapping[str, Any]) -> None:
        now = self._fingerprint()["evaluation"]
        if now is not None and before.get("evaluation", now) != now and not self._has_said_it:
            log.warning("what is evaluated on was changed: losses before and after are of different texts")
            self._has_said_it = True

    def _check_told(self, before: Mapping[str, Any]) -> None:
        now = {**self._told, "tokenizer": self._tokenizer}
        differing = [_changed(name, before.get(name), value) for name, value in now.items() if before.get(name, value if name == "tokenizer" else None) != value]
        if differing:
            raise RatelError(f"not what the run was started with; different: {', '.join(differing)}", field="data",
                             remedy=f"Resume with the same tokenizer, seed, sequence length and task, or {START_ANEW}")

    def _is_same(self, before: Mapping[str, Any]) -> bool:
        """States of earlier versions have no digest of the content."""
        now = self._fingerprint()
        return all(before.get(name) == now[name] for name in (("content",) if "content" in before else ("documents", "bytes")))

    def _check_held_out(self, before: Mapping[str, Any]) -> None:
        if before.get("held_out") != self._fingerprint()["held_out"]:
            raise RatelError("other documents are held out for evaluation than when the run was started", field="data",
                             remedy="Give --eval-fraction, --eval-sequences and --eval-data as they were")

    def _go_on(self, state: Mapping[str, Any], before: DocumentList | None) -> None:
        if before is None or len(before.digests) != state["data"]["documents"]:
            raise RatelError("it was changed since the run was started, and there is no list of the documents before (OUT/documents.json)",
                             field="data", remedy="Put the data back as it was")
        if "evaluated" in state:
            before = replace(before, held_out=tuple(number for number in state["evaluated"] if number < len(before.digests)))
        going = go_on(before, self.documents.digests, Position.from_dict(state, len(before.digests)), self._seed)
        if self.changes != going.says:
            log.warning("%s", going.says)
        self._position, self.changes = going.position, going.says
        if before.held_out or self.documents.held_out:
            self._evaluate_again(list(going.held_out))

    def _evaluate_again(self, numbers: list[int] | None) -> None:
        """On these documents of the corpus, where they are not those that the seed picks."""
        if numbers is None:
            return
        if any(number >= len(self._reader) for number in numbers) or len(numbers) >= len(self._reader):
            raise SchemaError("data.evaluated names documents that there are not")
        loaded = ((number, self._reader.load(number)) for number in numbers)
        self._evaluate_on([(number, document) for number, document in loaded if document is not None], tuple(numbers))
        self.documents, self._is_picked = replace(self.documents, held_out=tuple(numbers)), False

    def _evaluate_on(self, picked: list[tuple[int, Any]], held_out: tuple[int, ...]) -> None:
        self._held_out = frozenset(held_out)
        self._num_eval_documents = len(picked)
        self._eval_rows = self._pack_eval(picked)[: self._max_eval_rows]

    def close(self) -> None:
        """End the threads. ``batches`` may be called again afterwards."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        self._check.stop()

    def __enter__(self) -> "Dataset":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, position: Position) -> RowStream:
        return RowStream(self._reader, held_out=self._held_out, seed=self._seed, position=position)

    def _pack_eval(self, picked: list[tuple[int, Any]]) -> list[Any]:
        documents = iter(picked)
        rows = self._form.rows(lambda: next(documents, None), [], lambda: _HELD_OUT_KEY)
        return [row for row in iter(rows.next_row, None) if row.num_targets]


def _changed(name: str, before: Any, now: Any) -> str:
    if name == "tokenizer":
        return "what the tokenizer makes of a text"
    return f"{_CALLED.get(name, name)} (was {before}, is {now})"


class _BatchIterator(Iterator[Batch]):
    def __init__(self, dataset: Dataset, prefetcher: Prefetcher[tuple[Batch, Position]]) -> None:
        self._dataset, self._prefetcher = dataset, prefetcher

    def __next__(self) -> Batch:
        self._dataset._check.raise_found()
        batch, self._dataset._position = self._prefetcher.get()
        return batch


def _pick(reader: Reader, key: tuple[int, ...], count: int, max_tokens: int | None) -> list[tuple[int, Any]]:
    """Documents in the order of a permutation of their own, until there are enough of them or of
    their tokens."""
    picked: list[tuple[int, Any]] = []
    num_tokens = 0
    order = Permutation(len(reader), key)
    for index in range(count):
        if max_tokens is not None and num_tokens >= max_tokens:
            break
        document = reader.load(order[index])
        if document is not None:
            picked.append((order[index], document))
            num_tokens += reader.form.size(document)
    return picked


def check_options(seq_len: int, batch_size: int, eval_fraction: float, eval_max_sequences: int | None) -> None:
    if seq_len < MIN_SEQ_LEN:
        raise RatelError("a sequence that short teaches nothing", field="seq_len", value=seq_len,
                         remedy=f"Use at least {MIN_SEQ_LEN} tokens")
    if batch_size < 1:
        raise RatelError("a batch has at least one sequence", field="batch_size", value=batch_size,
                         remedy="Use 1 or more")
    if not 0 <= eval_fraction < 1:
        raise RatelError("not a share of the documents", field="eval_fraction", value=eval_fraction,
                         remedy="Use 0 (no held-out split) or a number below 1, such as 0.01")
    if eval_max_sequences is not None and eval_max_sequences < 1:
        raise RatelError("there must be at least one", field="eval_max_sequences", value=eval_max_sequences,
                         remedy="Use eval_fraction=0 for no evaluation")
