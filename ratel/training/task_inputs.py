"""What a task learns from: data with labels, opened before the model, which may get its labels from
it."""

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.nn import Module

from ratel.config import CLASSIFY, MASKED_LM, TOKENS, TrainConfig
from ratel.data.batches.examples import Examples
from ratel.data.dataset import Dataset, check_options
from ratel.data.sources.bundled import bundled_sources
from ratel.data.sources.corpus import Corpus
from ratel.data.sources.files import Source, find_sources
from ratel.data.sources.labelled import Labels, parse_text
from ratel.data.sources.skipping import SkippedLines
from ratel.data.tokens.tokenizer import OwnTokenizer, check_vocab, fingerprint, load_for, pad_id, tokenizer_source
from ratel.errors import RatelError
from ratel.models import Parts
from ratel.models.calls.tasks import REGRESSION, Task
from ratel.models.checkpoints.config import read_config
from ratel.models.presets import preset_config
from ratel.training.inputs import is_text


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """``labels`` None: the task has none of its own."""

    task: Task
    tokenizer: Any
    own_tokenizer: OwnTokenizer | None
    """The tokenizer of the user's own, as in `Inputs`."""
    labels: Labels | None
    corpus: Corpus
    eval_corpus: Corpus | None

    def fitted(self, config: TrainConfig, parts: Parts) -> TrainConfig:
        """With sequences as long as asked for and as the model and its tokenizer allow."""
        limits = [limit for limit in (parts.spec.max_seq_len, self.tokenizer.model_max_length) if limit is not None]
        return replace(config, seq_len=min(config.seq_len, *limits))

    def open(self, config: TrainConfig, parts: Parts, eval_fraction: float) -> Dataset:
        check_options(config.seq_len, config.batch_size, eval_fraction, config.eval_sequences or None)
        check_vocab(self.tokenizer, parts.spec.vocab_size)
        form = Examples(self.task.name, copy.deepcopy(self.tokenizer), self.labels, seq_len=config.seq_len,
                        vocab_size=parts.spec.vocab_size, takes_types=parts.task_runner.takes_types, seed=config.seed)
        return Dataset(self.corpus, form, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed,
                       vocabulary=len(self.tokenizer), tokenizer=fingerprint(self.tokenizer, renders=False), eval_fraction=eval_fraction, eval_corpus=self.eval_corpus,
                       eval_max_sequences=config.eval_sequences or None)


def open_task(config: TrainConfig, *, model: Any, data: Any, eval_data: Any, tokenizer: Any) -> TaskInputs:
    """Go through the data, and find out its labels where the model does not know them. Raises
    RatelError."""
    plain = Task.of(config.task)
    settings = _settings_of(model)
    if isinstance(model, Module):
        plain.check_module(model)
    else:
        plain.class_for(settings, str(config.model))
    own = None
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        named = tokenizer
        tokenizer, own = load_for(config.task, tokenizer_source(named, model))
        own = own if named is None else None  # the model's own files go along otherwise
    if config.task == TOKENS and not tokenizer.is_fast:
        raise RatelError("does not say which word a token is of", field="tokenizer", value=type(tokenizer).__name__,
                         remedy="Give a tokenizer with a tokenizer.json")
    if config.task == MASKED_LM and tokenizer.mask_token_id is None:
        raise RatelError("the tokenizer has no mask token, which stands for the tokens that are hidden", field="tokenizer",
                         value=type(tokenizer).__name__, remedy='Set "mask_token" in its tokenizer_config.json')
    labels = None if config.task == MASKED_LM else _labels(plain, settings, is_module=isinstance(model, Module))
    skipped = SkippedLines() if config.skip_bad_lines else None
    corpus = _corpus(config, data, labels, "data", skipped)
    if labels is not None:
        labels.settle("data")
    eval_corpus = None if eval_data is None or not is_text(eval_data) else _corpus(config, eval_data, labels, "eval_data", skipped)
    return TaskInputs(task=_task(plain, settings, labels, pad_id(tokenizer)), tokenizer=tokenizer, own_tokenizer=own,
                      labels=labels, corpus=corpus, eval_corpus=eval_corpus)


def _settings_of(model: Any) -> Any:
    """The configuration, before the model is built."""
    if isinstance(model, Module):
        return getattr(model, "config", None)
    if isinstance(model, (str, os.PathLike)):
        directory = Path(model).expanduser()
        return read_config(directory) if directory.is_dir() else preset_config(str(model))
    return model


def _labels(task: Task, settings: Any, *, is_module: bool) -> Labels:
    """Those of a model with the head for the task, or whose configuration names some; others are
    found in the data."""
    names = tuple(settings.id2label[number] for number in range(settings.num_labels))
    is_named = any(name != f"LABEL_{number}" for number, name in enumerate(names))
    classes = settings.architectures or []
    has_head = is_module or any(map(task.is_done_by, classes))
    of_another = any(Task.of(other).is_done_by(name) for other in (CLASSIFY, TOKENS) for name in classes)
    is_known = has_head or is_named and not of_another
    problem = settings.problem_type if task.name == CLASSIFY else None
    if task.name == CLASSIFY and problem is None and has_head and len(names) == 1:
        problem = REGRESSION
    return Labels(task.name, known=names if is_known else (), problem=problem)


def _task(plain: Task, settings: Any, labels: Labels | None, pad: int) -> Task:
    if labels is None:
        return replace(plain, pad_id=pad)
    if labels.are_known:
        return replace(plain, pad_id=pad, problem=labels.problem if settings.problem_type is None else None)
    return replace(plain, labels=labels.names, pad_id=pad, problem=labels.problem)


def _corpus(config: TrainConfig, data: Any, labels: Labels | None, field: str, skipped: SkippedLines | None) -> Corpus:
    if labels is None:
        sources = bundled_sources() if data is None else find_sources(data, field=field)
        return Corpus(sources, text_bytes=max(4 * config.seq_len, 2048), field=field, parse=parse_text,
                      skipped=skipped)
    if data is None:
        raise RatelError(f"is missing: --task {config.task} needs texts with labels", field="--data",
                         remedy="Give a .jsonl file; docs/data.md shows its lines")
    sources = find_sources(data, field=field)
    _refuse_text(sources, config.task, field)
    return Corpus(sources, field=field, parse=labels.parse, checked_bytes=float("inf"), skipped=skipped)


def _refuse_text(sources: tuple[Source, ...], task: str, field: str) -> None:
    plain = next((source.name for source in sources if source.suffix != ".jsonl"), None)
    if plain is not None:
        raise RatelError(f"has no labels, which --task {task} learns from", field=field, value=plain,
                         remedy="Give .jsonl files; docs/data.md shows their lines")
