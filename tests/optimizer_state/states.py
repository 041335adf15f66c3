"""Runs in PyTorch and in Ratel that are made of the same steps, and all that they end with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ratel.runtime.session.session import Session
from tests.support.families import ROWS, Reference, batches, loss_fn_of

HALF, LR, DECAY = 4, 1e-3, 0.1


class Plain(Reference):
    """An ordinary run: torch's AdamW on the model's own fp32 parameters, those that require
    grad."""

    def __init__(self, family: str, *, micro_rows: int = ROWS, frozen: str | None = None) -> None:
        super().__init__(family, dtype=torch.float32, clip=0.5, lr=LR, weight_decay=DECAY, micro_rows=micro_rows)
        freeze(self.model, frozen)
        self.masters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        groups = [{"params": [p for p in self.masters.values() if p.ndim >= 2], "weight_decay": DECAY},
                  {"params": [p for p in self.masters.values() if p.ndim < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, foreach=False, fused=False)

    def run(self, family: str, begin: int, end: int) -> "Plain":
        for batch in batches(family, 2 * HALF)[begin:end]:
            self.step(batch)
            self.optimizer.zero_grad()
        return self

    def _load_compute_copy(self) -> None:
        """The parameters are the masters."""

    def everything(self) -> dict[str, Tensor]:
        found = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for name, p in self.masters.items():
            state = self.optimizer.state[p]
            found |= {f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"], "step": state["step"]}
        return found


def freeze(model: torch.nn.Module, pattern: str | None) -> None:
    for name, parameter in model.named_parameters():
        if pattern is not None and pattern in name:
            parameter.requires_grad_(False)


def open_decaying(model: Any, family: str, ssd: Path, **options: Any) -> Session:
    defaults = dict(device="cpu", dtype="fp32", ssd=[ssd], lr=LR, weight_decay=DECAY, max_grad_norm=0.5, tier="ssd",
                    micro_batch=ROWS, loss_fn=loss_fn_of(family))
    return Session(model, **{**defaults, **options})


def everything(session: Session) -> dict[str, Tensor]:
    found = session.state_dict()
    for unit in session.plan.spec.units:
        for plane in ("m", "v") if unit.num_trainable else ():
            flat = session.read_state(unit, plane)
            found |= {f"{plane}.{p.name}": flat[p.offset : p.end].view(p.shape) for p in unit.params if p.trainable}
    return {**found, "step": torch.tensor(float(session._core.updates_made))}
