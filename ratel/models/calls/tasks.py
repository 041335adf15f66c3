"""What a model is trained for where that is not the next token: which class of transformers does
it, how that is called, and its loss."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratel.config import CLASSIFY, MASKED_LM, TASKS, TOKENS
from ratel.errors import RatelError
from ratel.models.calls.running import LossRunner

IGNORED = -100
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
"""What `classify` may be, by the names that transformers has for ``problem_type``."""

_AUTO = {CLASSIFY: "AutoModelForSequenceClassification", TOKENS: "AutoModelForTokenClassification",
         MASKED_LM: "AutoModelForMaskedLM"}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True, kw_only=True)
class Task:
    """``labels``: names in the order of their numbers, (): as the model's configuration has them.
    ``problem``: of `classify`, None: as the configuration says or else the batches show.
    ``pad_id``: what a classifier that pools the last token of a row passes over, unless its
    configuration says it."""

    name: str
    labels: tuple[str, ...] = ()
    problem: str | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _AUTO:
            raise RatelError("not a task with labels of its own", field="task", value=self.name, remedy=f"Use {', '.join(_AUTO)}")
        object.__setattr__(self, "labels", tuple(self.labels))

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, task: "str | Task | Mapping[str, Any]") -> "Task | None":
        """A task from what a user or a saved run says; None for the next token."""
        if isinstance(task, Task):
            return task
        if isinstance(task, Mapping):
            return cls(**task)
        if task not in TASKS:
            raise RatelError("not one of the tasks", field="task", value=task, remedy=f"Use {', '.join(TASKS)}")
        return None if task == TASKS[0] else cls(name=task)

    def class_for(self, config: Any, name: str) -> type[nn.Module]:
        """The class that does it for a configuration. Raises RatelError where transformers has
        none."""
        import transformers

        mapping = getattr(transformers, _AUTO[self.name])._model_mapping
        found = mapping[type(config)] if type(config) in mapping else ()
        classes = [found] if isinstance(found, type) else list(found)
        if not classes:
            raise RatelError(f"transformers has no class of model type {config.model_type!r} for --task {self.name} "
                             f"({_AUTO[self.name]})", field="model", value=name, remedy="Use another model, or another --task")
        asked = config.architectures or []
        return next((c for c in classes if c.__name__ in asked), classes[0])

    def is_done_by(self, class_name: str) -> bool:
        """Whether a class of transformers has the head for it."""
        import transformers

        classes = getattr(transformers, _AUTO[self.name])._model_mapping._model_mapping.values()
        return class_name in {name for names in classes for name in ((names,) if isinstance(names, str) else names)}

    def check_module(self, module: nn.Module) -> None:
        if not self.is_done_by(type(module).__name__):
            raise RatelError(f"is no class of transformers for --task {self.name} ({_AUTO[self.name]})", field="model",
                             value=type(module).__name__, remedy="Give such a module, or its directory, or a loss_fn of your own")

    def configure(self, config: Any) -> None:
        """Write down in a model's configuration what is known, as it is exported."""
        if self.problem is not None:
            config.problem_type = self.problem
        if self.problem == REGRESSION and not self.labels:
            config.num_labels = 1
        if self.labels:
            config.num_labels = len(self.labels)
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: number for number, label in enumerate(self.labels)}
        for part in (config, config.get_text_config()):
            if getattr(part, "pad_token_id", None) is None and self.pad_id is not None:
                part.pad_token_id = self.pad_id


class TaskRunner(LossRunner):
    """A model of transformers with a head for a task. Its loss is a sum over the targets: `Session`
    divides it by those of the whole step, so that micro-batches change nothing."""

    def __init__(self, module: nn.Module, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(module, self._summed, device, dtype)
        self._task, self._config = task, module.config
        accepted = inspect.signature(module.forward).parameters
        self._fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        self._takes = tuple(name for name in _INPUTS if name in accepted)
        self.found_problem: str | None = None
        """What the first batch has shown `classify` to be, where nothing else said it."""
        self._counts: Tensor | None = None
        """What evaluations have counted: targets whose most likely label is right, and targets."""

    @property
    def takes_types(self) -> bool:
        """Whether the model tells a pair's two texts apart by ``token_type_ids``."""
        return "token_type_ids" in self._takes and (getattr(self._config, "type_vocab_size", 0) or 0) > 1

    @property
    def known_task(self) -> Task:
        """The task, with what the first batch has shown of it."""
        return self._task if self.found_problem is None else replace(self._task, problem=self.found_problem)

    # -- batches -------------------------------------------------------------------------------------------------

    def sample(self, rows: int, length: int) -> dict[str, Tensor]:
        """A batch of that shape with a padding, to try the model out. However many rows, it is one
        in memory."""
        pad = self._pad_id
        ids, shown = torch.full((1, length), 0 if pad else 1), torch.ones(1, length, dtype=torch.long)
        ids[:, -1], shown[:, -1] = pad, 0
        batch = {"input_ids": ids, "attention_mask": shown, "labels": self._sample_labels(length)}
        if self.takes_types:
            batch["token_type_ids"] = torch.zeros(1, length, dtype=torch.long)
        return {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in batch.items()}

    def _sample_labels(self, length: int) -> Tensor:
        if self._task.name != CLASSIFY:
            return torch.zeros(1, length, dtype=torch.long)
        number = self._config.num_labels
        if self._config.problem_type == MULTI:
            return torch.zeros(1, number)
        return torch.zeros(1) if number == 1 else torch.zeros(1, dtype=torch.long)

    @property
    def _pad_id(self) -> int:
        return getattr(self._config.get_text_config(), "pad_token_id", None) or 0

    def checked(self, batch: Any, vocab_size: int | None) -> dict[str, Tensor]:
        """The batch as a step takes it. On a GPU an index out of bounds would end the process's use
        of the device."""
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
            raise RatelError(f"a batch for --task {self._task.name} is a dict with input_ids and labels", field="batch",
                             value=type(batch).__name__)
        unknown = [str(key) for key in batch if key not in (*self._takes, "labels")]
        if unknown:
            raise RatelError("holds what the model would not be given", field="batch", value=", ".join(unknown),
                             remedy=f"Take it out; {', '.join((*self._takes, 'labels'))} are used")
        ids = batch["input_ids"]
        for name, tensor in batch.items():
            if not isinstance(tensor, Tensor) or name != "labels" and (tensor.is_floating_point() or tensor.shape != ids.shape
                                                                       or tensor.dim() != 2):
                raise RatelError("must be a tensor of whole numbers, [rows, positions]", field=name,
                                 value=tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__)
        _check_range(ids, "input_ids", vocab_size, "Use the model's own tokenizer")
        if "token_type_ids" in batch:
            _check_range(batch["token_type_ids"], "token_type_ids", getattr(self._config, "type_vocab_size", None), None)
        return {**{name: tensor.long() for name, tensor in batch.items()}, "labels": self._checked_labels(batch["labels"], ids,
                                                                                                        vocab_size)}

    def _checked_labels(self, labels: Tensor, ids: Tensor, vocab_size: int | None) -> Tensor:
        rows, number = ids.shape[0], self._config.num_labels
        if self._task.name != CLASSIFY:
            shape, is_number = ids.shape, False
            number = vocab_size if self._task.name == MASKED_LM else number
        else:
            if self._config.problem_type is None:
                self._config.problem_type = self.found_problem = _problem_of(labels, number)
            is_number = self._config.problem_type != SINGLE
            shape = (rows, number) if self._config.problem_type == MULTI or number > 1 and is_number else (rows,)
        if labels.shape != shape and not (is_number and number == 1 and labels.shape == (rows, 1)):
            raise RatelError(f"must be a tensor of shape {tuple(shape)}", field="labels", value=tuple(labels.shape))
        if is_number:
            return labels.float()
        if labels.is_floating_point():
            raise RatelError("must be whole numbers", field="labels", value=labels.dtype)
        _check_range(labels[labels != IGNORED], "labels", number, None)
        return labels.long()

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """How many targets the loss of a batch is a mean over: rows, or tokens."""
        labels = batch["labels"]
        return labels.shape[0] if labels.is_floating_point() else int((labels != IGNORED).sum())

    # -- loss ----------------------------------------------------------------------------------------------------

    def _summed(self, module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in self._takes if name in batch}
        logits, labels = module(**inputs, **self._fixed).logits.float(), batch["labels"]
        if not labels.is_floating_point():
            logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
            if not module.training and not torch.is_grad_enabled():  # what a plan is measured with has a graph
                self._note(logits, labels)
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        if self._config.problem_type == MULTI:
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / logits.shape[-1]
        return F.mse_loss(logits, labels.reshape(logits.shape), reduction="sum") / logits.shape[-1]

    def _note(self, logits: Tensor, labels: Tensor) -> None:
        is_target = labels != IGNORED
        counts = torch.stack([((logits.argmax(-1) == labels) & is_target).sum(), is_target.sum()])
        self._counts = counts if self._counts is None else self._counts + counts

    def take_accuracy(self) -> float | None:
        """Share of the targets evaluated since the last call whose most likely label is right; None
        where none is chosen."""
        counts, self._counts = self._counts, None
        return None if counts is None or self._task.name == MASKED_LM else float(counts[0] / counts[1])


def _problem_of(labels: Tensor, num_labels: int) -> str:
    """The kind of problem, as transformers concludes it from the first labels that come."""
    return REGRESSION if num_labels == 1 else MULTI if labels.is_floating_point() else SINGLE


def _check_range(values: Tensor, field: str, limit: int | None, remedy: str | None) -> None:
    if limit is not None and values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
        raise RatelError(f"must be from 0 to {limit - 1}", field=field, value=f"{int(values.min())}..{int(values.max())}",
                         remedy=remedy)
