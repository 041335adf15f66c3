"""Modules whose blocks do something when they run, and the gradients of a session on them. No tests here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ratel

WIDTH = 16


def session_gradients(model: Any, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """A step's gradients, read off the first moments."""
    with ratel.Session(model, dtype="fp32", device="cpu", max_grad_norm=0, betas=(0.5, 0.999), **options) as session:
        session.step(batch)
        return {p.name: session.read_state(unit, "m")[p.offset : p.end].view(p.shape) / 0.5
                for unit in session.parts.spec.units for p in unit.params if p.trainable}


def assert_gradients_equal(got: dict[str, Tensor], plain: nn.Module) -> None:
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert set(got) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert any(grad.norm() > 0 for name, grad in expected.items() if "k_proj" in name or "layers.0" in name)


class Block(nn.Module):
    """Attends to ``keys`` as well as to its own, if it is given any; ``extra`` is what a test makes
    of it."""

    def __init__(self, extra: "Callable[[Block, Tensor, Any], Tensor] | None" = None, number: int = 0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.extra, self.layer_idx = extra, number

    def forward(self, hidden: Tensor, state: Any = None) -> Tensor:
        q, k, v = self.qkv(hidden).chunk(3, -1)
        x = hidden + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return x if self.extra is None else self.extra(self, x, state if state is not None else hidden)


class Body(nn.Module):
    def __init__(self, extra: Callable | None, make_state: Callable[[Tensor], Any] = lambda x: None, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 2)
        self.layers = nn.ModuleList(Block(extra, number) for number in range(count))
        self.make_state = make_state

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        state = self.make_state(x)
        for layer in self.layers:
            x = layer(x, state)
        return self.head(x)


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def batch(rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(rows, 6, 8, generator=generator), "y": torch.randn(rows, 6, 2, generator=generator)}
