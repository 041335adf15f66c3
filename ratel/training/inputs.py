"""What a run learns from: text files made into batches, or batches that the user made."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratel import interrupt
from ratel.config import TrainConfig
from ratel.errors import RatelError

if TYPE_CHECKING:
    from ratel.data.sources.documents import DocumentList
    from ratel.data.sources.skipping import SkippedLines
    from ratel.models import Parts
    from ratel.training.task_inputs import TaskInputs


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """``evaluation`` gives the held-out batches anew at each call; None where there are none.

    ``position`` says, as JSON, what comes after the batches handed out so far. ``sample``, only
    where the run is resumed: a batch, for its shape. ``evaluates_own``: the held-out batches are
    the user's own.
    """

    batches: Iterator[Any]
    position: Callable[[], dict[str, Any]]
    evaluation: Callable[[], Iterable[Any]] | None
    description: str
    tokenizer: Any = None
    sample: Any = None
    evaluates_own: bool = False
    own_tokenizer: Any = None
    """The model directory's, if that is where the tokenizer comes from."""
    lists: Callable[[], dict[str, Any]] | None = None
    """The content of OUT/documents.json: which documents there are, and were where the state that
    is resumed was saved."""
    skipped: "SkippedLines | None" = None

    def write_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer into an exported model."""
        if self.tokenizer is not None:
            from ratel.data.tokens.tokenizer import write_tokenizer

            write_tokenizer(self.tokenizer, directory, self.own_tokenizer)


def is_text(data: Any) -> bool:
    """Whether ``data`` names files (None: the bundled ones) instead of being batches."""
    if isinstance(data, (list, tuple)):
        return len(data) > 0 and all(isinstance(item, (str, os.PathLike)) for item in data)
    return data is None or isinstance(data, (str, os.PathLike))


@contextmanager
def open_inputs(config: TrainConfig, *, model: Any, data: Any, eval_data: Any, tokenizer: Any,
                vocab_size: int | None, position: dict[str, Any] | None = None,
                task: "TaskInputs | None" = None, parts: "Parts | None" = None, listed: Path | None = None) -> Iterator[Inputs]:
    """``position``: of the run to be continued; None: from the beginning. ``task``: what has been
    opened of one already; with the ``parts`` of its model it makes the batches. ``listed``: a file
    with lists of the documents that there were."""
    if position is not None and ("batches" in position) == is_text(data):
        raise RatelError("was batches in the run to be continued, and is text now" if is_text(data) else
                         "was text in the run to be continued, and is batches now", field="data",
                         remedy="Resume with ratel.train(model, batches, resume=True, out=...)" if is_text(data) else
                         "Resume with the text, or leave data out")
    if not is_text(data):
        yield _from_batches(data, eval_data, None if position is None else position["batches"])
        return
    from ratel.data import load_tokenizer, open_dataset, tokenizer_source
    from ratel.data.dataset import day_of
    from ratel.data.sources.documents import read_lists
    from ratel.data.sources.skipping import SkippedLines
    from ratel.data.tokens.tokenizer import own_tokenizer

    if config.micro_batch != "auto" and config.batch_size % config.micro_batch:
        raise RatelError(f"does not divide --batch-size {config.batch_size}", field="--micro-batch", value=config.micro_batch,
                         remedy="Give a divisor, or auto")
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)) and not callable(tokenizer):
        raise RatelError("is no tokenizer", field="tokenizer", value=type(tokenizer).__name__,
                         remedy="Give one of transformers, or the directory of one")
    if not is_text(eval_data) and not isinstance(eval_data, Iterable):
        raise RatelError("is neither a path nor an iterable of batches", field="eval_data", value=type(eval_data).__name__)
    own = None
    if task is not None:
        tokenizer, own = task.tokenizer, task.own_tokenizer
    elif tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        source = tokenizer_source(tokenizer, model)
        is_own, tokenizer = tokenizer is None, load_tokenizer(source)
        own = own_tokenizer(source, tokenizer) if is_own else None
    eval_text, eval_batches = (eval_data, None) if is_text(eval_data) else (None, eval_data)
    share = 0.0 if eval_batches is not None else config.eval_fraction
    skipped = task.corpus.skipped if task is not None else SkippedLines() if config.skip_bad_lines else None
    opened = task.open(config, parts, share) if task is not None else open_dataset(
        data, tokenizer, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed, eval_fraction=share,
        eval_data=eval_text, eval_max_sequences=config.eval_sequences or None, vocab_size=vocab_size, skipped=skipped, today=day_of(position),
        packed=parts is None or not parts.is_causal_lm or parts.isolates_documents,
        marks_padding=parts is not None and parts.routing is not None)
    with opened as dataset:
        sample = None
        before = {}
        if position is not None:
            before = read_lists(listed) if listed is not None else {}
            dataset.load_state_dict(position, before)
            sample = next(dataset.batches())
            dataset.load_state_dict(position, before)
        evaluation = (lambda: eval_batches) if eval_batches is not None else dataset.eval_batches
        yield Inputs(batches=dataset.batches(), position=dataset.state_dict, description=dataset.describe(),
                     tokenizer=tokenizer, own_tokenizer=own, sample=sample, evaluates_own=eval_batches is not None,
                     lists=lambda: _lists(dataset.documents, before, position), skipped=skipped,
                     evaluation=evaluation if eval_batches is not None or dataset.eval_batches() else None)


def _lists(now: "DocumentList", before: "dict[str, DocumentList]", position: dict[str, Any] | None) -> dict[str, Any]:
    """The list of the state which is resumed stays, until a newer state is there."""
    from ratel.data.sources.documents import MOST_LISTED

    content = position["data"].get("content") if position is not None else None
    kept = [before[content]] if content in before and content != now.content else []
    return {"lists": [one.to_json() for one in [*kept, now] if len(one.digests) <= MOST_LISTED]}


def _from_batches(data: Any, eval_data: Any, taken: int | None) -> Inputs:
    if not isinstance(data, Iterable):
        raise RatelError("is neither a path nor an iterable of batches", field="data", value=type(data).__name__)
    if eval_data is not None and (is_text(eval_data) or not isinstance(eval_data, Iterable)):
        raise RatelError("must be batches when data is", field="eval_data", value=type(eval_data).__name__)
    if eval_data is not None and iter(eval_data) is eval_data:
        raise RatelError("can be gone through only once", field="eval_data", value=type(eval_data).__name__,
                         remedy="Give a list or a data loader")
    _check_not_empty(data, "data")
    if eval_data is not None:  # now, and not after the last step
        _check_not_empty(eval_data, "eval_data")
    batches = _Counted(endless(data))
    sample = None if taken is None else batches.skip(taken)
    return Inputs(batches=batches, position=lambda: {"batches": batches.taken}, sample=sample,
                  evaluates_own=eval_data is not None,
                  evaluation=None if eval_data is None else lambda: eval_data,
                  description=f"batches from {type(data).__name__}")


def _check_not_empty(batches: Iterable[Any], field: str) -> None:
    """Refuse no batches at all, as far as their number is known before they are made."""
    if length_hint(batches, 1) == 0:
        raise RatelError("there is no batch in it", field=field, value=type(batches).__name__)


class _Counted(Iterator[Any]):
    """Batches of the user's own; their position is how many of them were taken."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches, self.taken = batches, 0

    def __next__(self) -> Any:
        with interrupt.outside():
            batch = next(self._batches)
        self.taken += 1
        return batch

    def skip(self, count: int) -> Any:
        """Pass over ``count`` batches; returns the last of them."""
        batch = None
        for _ in range(count):
            try:
                batch = next(self)
            except StopIteration:
                raise RatelError(f"ended after {self.taken} batches; the run had taken {count}", field="data",
                                 remedy="Resume with the batches that the run was started with") from None
        return batch


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Pass after pass over ``batches``; once only over what cannot be started again, as a
    generator."""
    begins_again = iter(batches) is not batches
    while True:
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch
        if is_empty:
            raise RatelError("there is no batch in it", field="data", value=type(batches).__name__)
        if not begins_again:
            return
