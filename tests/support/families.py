"""Tiny models of each family, and a plain in-memory trainer to compare with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, ROWS, POSITIONS = 96, 4, 16


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_common(), "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}))


def llama_tied() -> nn.Module:
    return llama(tie_word_embeddings=True, attention_bias=True)


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_common(), num_key_value_heads=2, head_dim=16, tie_word_embeddings=False))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=4, n_head=2, resid_pdrop=0.0,
                                      embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=True))


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_common(), num_key_value_heads=2, head_dim=16, sliding_window=8,
                                          attn_implementation="eager"))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_common(), num_key_value_heads=2, num_local_experts=4,
                                            num_experts_per_tok=2))


CAUSAL: dict[str, Callable[[], nn.Module]] = {"llama": llama, "llama-tied": llama_tied, "qwen3": qwen3, "gpt2": gpt2,
                                              "gemma2": gemma2, "mixtral": mixtral}


def _common() -> dict[str, Any]:
    return dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
                max_position_embeddings=64)


class Patches(nn.Module):
    """A hand-written transformer that is not a language model: patches in, two numbers out; a raw
    position parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.position = nn.Parameter(torch.randn(POSITIONS, 32) * 0.02)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
                                    for _ in range(4))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def patches_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]).float(), batch["y"].float())


def build(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return (CAUSAL[family]() if family in CAUSAL else Patches()).float()


def batches(family: str, count: int, rows: int = ROWS, seed: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    if family not in CAUSAL:
        return [{"x": torch.randn(rows, POSITIONS, 12, generator=generator), "y": torch.randn(rows, 2, generator=generator)}
                for _ in range(count)]
    made = []
    for _ in range(count):
        ids = torch.randint(0, VOCAB, (rows, POSITIONS), generator=generator)
        labels = ids.clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def loss_fn_of(family: str) -> Callable | None:
    return None if family in CAUSAL else patches_loss


class Reference:
    """Everything in memory: fp32 master, forward and backward in ``dtype``, torch's own clipping
    and AdamW.

    Gradients of several micro-batches are summed in fp32 and, for bf16, rounded once, as the
    runtime does.
    """

    def __init__(self, family: str, *, dtype: torch.dtype, clip: float, lr: float, weight_decay: float,
                 micro_rows: int) -> None:
        self.family, self.dtype, self.clip, self.micro_rows = family, dtype, clip, micro_rows
        self.model = build(family).train()
        self.masters = {name: p.detach().clone().requires_grad_() for name, p in self.model.named_parameters()}
        no_decay = [n for n, p in self.model.named_parameters() if p.ndim < 2]
        groups = [{"params": [p for n, p in self.masters.items() if n not in no_decay], "weight_decay": weight_decay},
                  {"params": [p for n, p in self.masters.items() if n in no_decay], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, foreach=False, fused=False)
        if dtype is torch.bfloat16:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(dtype)

    def step(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        self._load_compute_copy()
        sums = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        loss_sum = 0.0
        rows = next(iter(batch.values())).shape[0]
        for begin in range(0, rows, self.micro_rows):
            part = {key: value[begin : begin + self.micro_rows] for key, value in batch.items()}
            loss = self._loss(part, batch, rows)
            loss.backward()
            loss_sum += float(loss.detach())
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad
                parameter.grad = None
        for name, master in self.masters.items():
            master.grad = sums[name].to(self.dtype).float()
        norm = torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.clip or float("inf"))
        with correctly_rounded_sqrt():
            self.optimizer.step()
        return loss_sum, float(norm)

    def _loss(self, part: dict[str, Tensor], batch: dict[str, Tensor], rows: int) -> Tensor:
        if self.family not in CAUSAL:
            cast = {**part, "x": part["x"].to(self.dtype)}
            return patches_loss(self.model, cast) * (len(part["x"]) / rows)
        targets = torch.full_like(part["labels"], -100)
        targets[:, :-1] = part["labels"][:, 1:]
        total = int((batch["labels"][:, 1:] != -100).sum())
        logits = self.model(input_ids=part["input_ids"], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum") / total

    def _load_compute_copy(self) -> None:
        for name, parameter in self.model.named_parameters():
            master = self.masters[name].data
            parameter.data = master.clone() if self.dtype is torch.float32 else rounded_half_up(master)


@contextmanager
def correctly_rounded_sqrt() -> Iterator[None]:
    """torch leaves square roots on the CPU to MKL, which rounds some of them wrongly
    (docs/optimizer.md)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))
        yield


def rounded_half_up(master: Tensor) -> Tensor:
    """The `hi` plane of a fp32 tensor: bf16 by rounding half up on the bits."""
    bits = master.view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
