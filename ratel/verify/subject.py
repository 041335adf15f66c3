"""What is checked: a small copy of a model with random state, as an object and as a directory,
batches for it, and plain PyTorch's answers."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratel.models.checks.shrink import random_parameters
from ratel.verify.findings import one_line
from ratel.verify.gradients import Pass

NEXT_TOKEN, CLASSIFY, TOKENS, MASKED_LM = "next-token", "classify", "tokens", "masked-lm"
ROWS, LENGTH, IGNORED = 2, 32, -100
LOWEST, HIGHEST = 3, 96
"""Token ids of batches: those that configurations name are others."""
DOCUMENTS = ((21, 11), (9, 23))
"""Lengths in each row of a packed batch. Small copies have windows of 8."""

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


class PlainError(Exception):
    """Plain PyTorch does not build or run the model."""


class Subject:
    """The models, batches and losses of one class, configuration (small already) and task.
    ``directory`` is written here."""

    def __init__(self, model_class: type[nn.Module], config: Any, task: str, directory: Path) -> None:
        self.task, self.directory = task, directory
        _complete(config)
        self._trains = _write(model_class, config, directory)
        self._class = model_class
        self._loaded: dict[torch.dtype, nn.Module] = {}
        self._accepted = inspect.signature(model_class.forward).parameters
        self.vocab = getattr(config.get_text_config(), "vocab_size", None) or HIGHEST

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model as transformers loads it, in training mode; a new one at each call."""
        if dtype not in self._loaded:
            module = self._class.from_pretrained(self.directory, dtype=dtype, local_files_only=True).train()
            for name, param in module.named_parameters():
                param.requires_grad_(self._trains[name])  # from_pretrained forgets what a constructor freezes
            self._loaded[dtype] = module
        return copy.deepcopy(self._loaded[dtype])

    # -- batches -------------------------------------------------------------------------------------------------

    def batch(self, seed: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(LOWEST, min(HIGHEST, self.vocab), (ROWS, LENGTH), generator=generator)
        if self.task == CLASSIFY:
            return {"input_ids": ids, "labels": torch.arange(ROWS) % 2}
        labels = ids.clone() if self.task in (NEXT_TOKEN, MASKED_LM) else torch.randint(0, 2, ids.shape, generator=generator)
        labels[torch.rand(ids.shape, generator=generator) < 0.2] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def packed(self) -> tuple[Batch, list[Batch]]:
        """A batch with several documents in a row, and each of these alone."""
        batch = self.batch(seed=2)
        positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS])
        labels = torch.where(positions == 0, IGNORED, batch["labels"])
        apart = [{"input_ids": ids[None], "labels": marks[None]}
                 for row, lengths in enumerate(DOCUMENTS)
                 for ids, marks in zip(batch["input_ids"][row].split(lengths), labels[row].split(lengths))]
        return {"input_ids": batch["input_ids"], "labels": labels, "position_ids": positions}, apart

    # -- plain PyTorch -------------------------------------------------------------------------------------------

    @property
    def _no_cache(self) -> dict[str, Any]:
        takes = "use_cache" in self._accepted or any(p.kind is p.VAR_KEYWORD for p in self._accepted.values())
        return {"use_cache": False} if takes and self.task == NEXT_TOKEN else {}

    def task_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean over the targets, as a session of the task has it."""
        if self.task != NEXT_TOKEN:
            module.config.use_cache = module.config.get_text_config().use_cache = False  # other kernels run with one
            logits = module(input_ids=batch["input_ids"]).logits
            return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).to(_wide(logits)), batch["labels"].reshape(-1))
        return self._next_token_sum(module, batch) / (batch["labels"][:, 1:] != IGNORED).sum()

    def _next_token_sum(self, module: nn.Module, batch: Batch) -> Tensor:
        output = module(input_ids=batch["input_ids"], **self._no_cache)
        logits = output.logits if hasattr(output, "logits") else output[0]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).to(_wide(logits)), batch["labels"][:, 1:].flatten(), reduction="sum")

    def apart_loss(self, apart: list[Batch]) -> Loss:
        """The loss of documents each alone, as if they were one batch."""
        targets = sum(int((part["labels"][:, 1:] != IGNORED).sum()) for part in apart)
        return lambda module, _: torch.stack([self._next_token_sum(module, part) for part in apart]).sum() / targets

    def own_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """What a user writes: the model's own loss; where it has none, something that depends on
        all logits. Caches stay on."""
        if "labels" in self._accepted:
            return module(**batch).loss
        output = module(input_ids=batch["input_ids"])
        return (output.logits if hasattr(output, "logits") else output[0]).float().square().mean()

    def plain(self, loss: Loss, batch: Batch, dtype: torch.dtype) -> Pass:
        """Loss and gradients by autograd."""
        module = self.module(torch.float32 if dtype is torch.float64 else dtype)
        if dtype is torch.float64:
            module = module.double()
            if hasattr(module, "set_experts_implementation"):
                module.set_experts_implementation("eager")  # grouped products have no fp64
        value = loss(module, batch)
        value.backward()
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return Pass(loss=value.item(), grads={name: p.grad.to(wide) for name, p in module.named_parameters() if p.grad is not None})


    def rows_apart(self, loss: Loss, batch: Batch, whole: Pass, dtype: torch.dtype = torch.float32) -> Pass:
        """The same gradient in another order of sums: how far plain PyTorch is from it says how far
        its roundings reach. A batch of documents is apart already, and given back as it is."""
        if "position_ids" in batch:
            return whole
        rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(ROWS)]
        weights = [1.0 if self.task == CLASSIFY else float((row["labels"][:, self.task == NEXT_TOKEN :] != IGNORED).sum()) for row in rows]
        passes = [self.plain(loss, row, dtype) for row in rows]
        shares = [weight / sum(weights) for weight in weights]
        grads = {name: sum(part.grads[name] * share for part, share in zip(passes, shares) if name in part.grads)
                 for name in whole.grads}
        return Pass(loss=sum(part.loss * share for part, share in zip(passes, shares)), grads=grads)


def _write(model_class: type[nn.Module], config: Any, directory: Path) -> dict[str, bool]:
    """Save the model to the directory; returns which parameters are trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            module = random_parameters(model_class(copy.deepcopy(config)).float())
        except Exception as error:
            raise PlainError(f"{type(error).__name__}: {one_line(error, 160)}") from error
    with torch.no_grad():  # in every precision the same numbers
        for tensor in module.state_dict().values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    module.save_pretrained(directory)
    return {name: param.requires_grad for name, param in module.named_parameters(remove_duplicate=False)}


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def _complete(config: Any) -> None:
    """Classifiers look for the last token that is no padding (batches here have none), and draw a
    dropout that many configurations do not name."""
    config.classifier_dropout = 0.0
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False  # losses of routers are added where it is on: other tests
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0
