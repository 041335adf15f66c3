"""Models whose blocks are hard to run a second time in part, and one way to train them all. No
tests here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratel.memory import jitter
from ratel.runtime.blocks import runs as block_runs
from ratel.runtime.session.session import Session
from tests.support.families import VOCAB, batches, build, loss_fn_of, patches_loss

WIDTH = 32
DEVICES = [pytest.param("cpu", marks=pytest.mark.numerics), pytest.param("cuda", marks=pytest.mark.gpu)]


@contextmanager
def everything_again() -> Iterator[None]:
    """As if nothing were known about any block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_runs, "is_exact", lambda *_: False)
        yield


def gpt2_with_dropout() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=WIDTH, n_layer=3, n_head=2,
                                      resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, tie_word_embeddings=True))


class Body(nn.Module):
    """Blocks of one class between two linear layers; takes what `patches_loss` gives."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(12, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class WritesInPlace(nn.Module):
    """What `up` makes is written over twice: by the activation, and by a residual that is added in
    place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.mix, self.down = (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, 48),
                                                   nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.up(self.norm(x)))
        z = self.mix(y)
        z += 0.5
        return x + self.down(F.gelu(z))


class DropsOut(nn.Module):
    """Dropout inside, between the last product and the residual, and in the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48, bias=False), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), 0.1, self.training)
        gated = F.dropout(F.silu(self.gate(x)), 0.2, self.training) * self.up(x)
        return x + F.dropout(self.down(gated), 0.1, self.training)


class Routes(nn.Module):
    """Two experts, each given the tokens that chose it: the sizes of its products depend on
    values."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).softmax(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            chosen = (scores.argmax(-1) == number).nonzero().squeeze(-1)
            out = out.index_add(0, chosen, F.gelu(expert(tokens[chosen])) * scores[chosen, number, None])
        return x + out.view_as(x)


class Hides(torch.autograd.Function):
    """Keeps a tensor for backward where no hook sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.hidden = x * 2
        return x + 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.hidden


class UsesHiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + Hides.apply(self.down(torch.tanh(self.up(x))))


OWN: dict[str, Callable[[], nn.Module]] = {"in place": WritesInPlace, "dropout": DropsOut, "routing": Routes,
                                           "hiding": UsesHiding}


def make(family: str) -> tuple[nn.Module, Callable | None]:
    """The model and its loss function."""
    torch.manual_seed(0)
    if family == "gpt2-dropout":
        return gpt2_with_dropout().float(), None
    return (Body(OWN[family]), patches_loss) if family in OWN else (build(family), loss_fn_of(family))


def data_of(family: str, steps: int, rows: int) -> list[dict[str, Tensor]]:
    return batches("gpt2" if family == "gpt2-dropout" else family, steps, rows=rows)


def train(family: str, ssd: Path, device: str, *, steps: int = 2, rows: int = 4, delay_s: float = 0.0, seed: int = 0,
          **options: Any) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Losses and norms by step, and all weights at the end."""
    model, loss_fn = make(family)
    with jitter.injected(delay_s, seed=seed):
        with Session(model, loss_fn=loss_fn, lr=1e-3, device=device, ssd=ssd, max_grad_norm=0.5,
                     gpu_memory="4GiB" if device == "cuda" else None,
                     **{"dtype": "bf16", "tier": "dram", "micro_batch": 2, **options}) as session:
            outs = [session.step(batch) for batch in data_of(family, steps, rows)]
            return [(out.loss, out.grad_norm) for out in outs], session.state_dict()
