"""A step's batch: checked once, at the door of the session, and cut into micro-batches."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.models import Parts
from ratel.models.calls.documents import restarts
from ratel.planner.shape import ModelSpec
from ratel.runtime.blocks.loss import IGNORED, shifted_count, with_labels


@dataclass(slots=True)
class MicroBatch:
    """One micro-batch on its way through the stages."""

    index: int
    batch: dict
    share: float
    """What its loss weighs in the step's for a model with its own loss or a task."""
    before: int = 0
    """How many numbers of the longest tensor, tokens of a text, are in the micro-batches before
    it."""
    hidden: Tensor | None = None
    grad: Tensor | None = None
    inputs: object | None = None


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply to every tensor of nested mappings (which become dicts), lists and tuples, named ones
    included."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [map_tensors(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def tensors_of(tree: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda t: found.append(t) or t, tree)
    return iter(found)


def _count_rows(content: Any) -> int:
    """The common first dimension of the batch's tensors."""
    rows = {t.shape[0] if t.dim() else None for t in tensors_of(content)}
    if not rows:
        raise RatelError("there is no tensor in the batch", field="batch", value=type(content).__name__,
                         remedy="Make tensors of it, as torch.as_tensor does")
    if len(rows) != 1 or None in rows:
        raise RatelError("every tensor of a batch must have the batch as its first dimension, of one length",
                         field="batch", value=f"lengths {sorted(map(str, rows))}")
    count = rows.pop()
    if count == 0:
        raise RatelError("the batch is empty", field="batch")
    return count


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step, an evaluation or a trial takes."""

    content: Any = field(repr=False)
    """Tensors in mappings and lists, as the model takes them; every tensor's first dimension is the
    rows."""
    rows: int
    positions: int
    """The most numbers of a row that one tensor has."""
    parts: Parts = field(repr=False)

    @classmethod
    def of(cls, parts: Parts, given: Any) -> "Batch":
        """Raises RatelError for what the model cannot be trained on."""
        content = _checked(parts, given)
        return cls._counted(parts, content, _count_rows(content))

    @classmethod
    def sample(cls, parts: Parts, rows: int, positions: int) -> "Batch":
        """One of that shape that nothing is learned from, and nobody looks at: it may be larger
        than any memory."""
        return cls._counted(parts, parts.sample(rows, positions), rows)

    @classmethod
    def _counted(cls, parts: Parts, content: Any, rows: int) -> "Batch":
        return cls(content=content, rows=rows, positions=max(t.numel() // rows for t in tensors_of(content)), parts=parts)

    @cached_property
    def targets(self) -> int:
        """What the loss is a mean over: tokens, or rows of a model with its own loss."""
        if self.parts.task:
            return self.parts.task_runner.count(self.content)
        return shifted_count(self.content["labels"]) if self.parts.is_causal_lm else self.rows

    @cached_property
    def tokens(self) -> int:
        """Positions of a language batch without its padding; rows of any other."""
        if not isinstance(self.content, dict):
            return self.rows
        if isinstance(self.content.get("attention_mask"), Tensor):
            return int((self.content["attention_mask"] != 0).sum())
        return self.content["input_ids"].numel() if "input_ids" in self.content else self.rows

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(tuple(t.shape), t.dtype) for t in tensors_of(self.content)]

    def first(self, rows: int, device: torch.device) -> "Batch":
        """Its first rows, on the device."""
        return replace(self, content=map_tensors(lambda t: t[:rows].to(device), self.content), rows=rows)

    def cut(self, max_rows: int) -> "Iterator[Batch]":
        """The batch in pieces of at most ``max_rows`` rows."""
        for begin in range(0, self.rows, max_rows):
            part = map_tensors(lambda t: t[begin : begin + max_rows], self.content)
            yield replace(self, content=part, rows=min(max_rows, self.rows - begin))

    def split(self, micro_rows: int, device: torch.device) -> list[MicroBatch]:
        """Micro-batches of at most ``micro_rows`` rows, on the device. A task's loss is a sum over
        targets, a user's a mean over rows."""
        return [MicroBatch(index, map_tensors(lambda t: t.to(device), part.content),
                           share=1 / self.targets if self.parts.task else part.rows / self.rows,
                           before=index * micro_rows * self.positions)
                for index, part in enumerate(self.cut(micro_rows))]


def _checked(parts: Parts, given: Any) -> Any:
    if parts.is_causal_lm:
        content = with_labels(causal_batch(given, parts.spec, keeps_mask=parts.routing is not None))
        if not parts.isolates_documents:
            refuse_documents(content)
        return content
    return parts.task_runner.checked(given, parts.spec.vocab_size) if parts.task else given


CAUSAL = ("input_ids", "labels", "position_ids", "attention_mask")
"""What a batch for a causal language model may hold."""


def causal_batch(batch: Any, spec: ModelSpec, *, keeps_mask: bool = False) -> dict[str, Tensor]:
    """As a step takes it: checked, in integers of 64 bits, and without an attention mask, which
    says nothing then but to a loss of routers (``keeps_mask``)."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise RatelError("a batch for a language model is a dict with input_ids (and labels, position_ids)",
                         field="batch", value=type(batch).__name__)
    unknown = [str(key) for key in batch if key not in CAUSAL]
    if unknown:
        raise RatelError("holds what the model would not be given", field="batch", value=", ".join(unknown),
                         remedy=f"Take it out; {', '.join(CAUSAL)} are used")
    _check_causal(batch, spec)
    if "attention_mask" in batch:
        _check_mask(batch["attention_mask"], batch)
    return {key: tensor.long() for key, tensor in batch.items() if keeps_mask or key != "attention_mask"}


def refuse_documents(batch: Mapping[str, Tensor]) -> None:
    """For a model that cannot keep them apart: each would be learned with what was said in those
    before it."""
    if "position_ids" in batch and restarts(batch["position_ids"]):
        raise RatelError("several documents share a row, and this model cannot keep them apart", field="position_ids",
                         value="positions that begin again", remedy="Put one document in each row, with positions that count on "
                                                                    "through its padding, or leave position_ids out")


def _check_mask(mask: Any, batch: Mapping[str, Tensor]) -> None:
    """Attention is causal: tokens do not see a padding to their right. So a mask changes nothing
    where that is all that it hides, and none of it is learned."""
    if not isinstance(mask, Tensor) or mask.shape != batch["input_ids"].shape:
        raise RatelError("must be a tensor of the shape of input_ids", field="attention_mask",
                         value=tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__)
    hidden = mask == 0
    if not hidden.any():
        return
    if (hidden[:, :-1] & ~hidden[:, 1:]).any():
        raise RatelError("hides tokens before others that it shows", field="attention_mask",
                         remedy="Pad on the right, with labels of -100 there; keep documents apart by position_ids that "
                                "begin again at 0")
    if "labels" not in batch or (batch["labels"][hidden] != IGNORED).any():
        raise RatelError("hides tokens that are to be learned", field="attention_mask",
                         remedy="Give labels, with -100 where attention_mask is 0")


def _check_causal(batch: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Refuse what a causal language model cannot be trained on."""
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor):
        raise RatelError("must be a tensor", field="input_ids", value=type(ids).__name__)
    if ids.dim() != 2 or ids.is_floating_point():
        raise RatelError("must be whole numbers of shape [rows, positions]", field="input_ids",
                         value=f"{ids.dtype} {tuple(ids.shape)}")
    if not ids.numel():
        raise RatelError("the batch is empty", field="input_ids", value=tuple(ids.shape))
    _check_range(ids, "input_ids", spec.vocab_size, f"a token id is outside the model's vocabulary of {spec.vocab_size}")
    for name in ("labels", "position_ids"):
        if name in batch and (not isinstance(batch[name], Tensor) or batch[name].shape != ids.shape):
            found = tuple(batch[name].shape) if isinstance(batch[name], Tensor) else type(batch[name]).__name__
            raise RatelError(f"must be a tensor of the shape of input_ids, {tuple(ids.shape)}", field=name, value=found)
        if name in batch and batch[name].is_floating_point():
            raise RatelError("must be whole numbers", field=name, value=batch[name].dtype)
    if "labels" in batch:
        targets = batch["labels"][batch["labels"] != IGNORED]
        _check_range(targets, "labels", spec.vocab_size, f"a target is outside the model's vocabulary of {spec.vocab_size}")
    if "position_ids" in batch and spec.max_seq_len is not None:
        _check_range(batch["position_ids"], "position_ids", spec.max_seq_len,
                     f"the model handles at most {spec.max_seq_len} positions")


def _check_range(values: Tensor, field: str, limit: int, message: str) -> None:
    """Before a step: on a GPU an index out of bounds ends the process's use of the device."""
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
        raise RatelError(message, field=field, value=f"{int(values.min())}..{int(values.max())}",
                         remedy="Use the model's own tokenizer" if field != "position_ids" else None)


def nothing_to_learn() -> RatelError:
    return RatelError("no token of the batch is a target", field="labels", value="all -100",
                      remedy="Give labels other than -100 to the tokens to be learned")
