"""What adapters are measured against: the frozen model, and peft's way in plain PyTorch, with all
of it in GPU memory. Systems of `benchmarks.harness.systems`.

Options of a job: ``checkpointing`` (default true), ``compile`` (each layer), and of `Plain` also
``rank``, ``alpha`` and ``dropout``, on all linears but the head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.systems import Job, make_model
from ratel.training.bench.adapted import PlainLinear


def _prepared(job: Job) -> nn.Module:
    """Frozen, and as peft has it for checkpointing: what the embedding returns wants a
    gradient."""
    model = make_model(job).requires_grad_(False)
    if not job.options.get("checkpointing", True):
        model.gradient_checkpointing_disable()
    model.enable_input_require_grads()
    return model


def _compiled(model: nn.Module, job: Job) -> None:
    if job.options.get("compile"):
        for layer in model.model.layers:
            layer.compile()


class Frozen:
    """Forward, and backward to the inputs of the first layer. Nothing is trained: no adapter can
    be faster by this code."""

    def __init__(self, job: Job) -> None:
        self.model = _prepared(job)
        _compiled(self.model, job)

    def step(self, tokens: Tensor) -> float:
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return float(loss.detach())


class Plain:
    """Adapters by plain PyTorch, and AdamW."""

    def __init__(self, job: Job) -> None:
        self.model, given = _prepared(job), {"rank": 16, "alpha": 32, "dropout": 0.1, **job.options}
        names = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
        for name in names:
            parent, _, child = name.rpartition(".")
            module = self.model.get_submodule(parent)
            setattr(module, child, PlainLinear(getattr(module, child), given["rank"], given["alpha"], given["dropout"]))
        _compiled(self.model, job)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer, self._trained = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0, fused=True), trained

    def step(self, tokens: Tensor) -> float:
        loss: Any = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
