"""The end of the forward pass and the start of the backward one, in chunks of positions.

Logits of a large vocabulary never exist for a whole micro-batch: each chunk goes through the
model's own tail (final norm, head, whatever the model does to its logits), the cross entropy and
straight back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ratel.models import Parts

IGNORED = -100
LOGIT_BYTES = 16
"""Bytes per token and vocabulary entry at the peak: bf16 and fp32 logits, log-probabilities, and
both gradients."""

LOSS_BYTES = 1 << 30
"""GPU memory that one chunk's logits may take in all."""


def positions_per_chunk(rows: int, vocab_size: int, budget_bytes: int = LOSS_BYTES) -> int:
    return max(1, budget_bytes // (LOGIT_BYTES * vocab_size * rows))


def shifted_targets(labels: Tensor) -> Tensor:
    """``[B, T]``: what each position must predict, the next position's label; nothing for the last
    one."""
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets


def with_labels(batch: dict) -> dict:
    """Without labels every token is a target."""
    return batch if "labels" in batch else {**batch, "labels": batch["input_ids"]}


def shifted_count(labels: Tensor) -> int:
    """How many of them a token is there to predict."""
    return int((labels[:, 1:] != IGNORED).sum())


def chunked_loss(tail: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, normalizer: float, chunk: int,
                 backward: bool, after_chunk: Callable[[], None]) -> tuple[Tensor, Tensor | None]:
    """Cross entropy of ``hidden`` ``[B, T, H]`` against ``targets`` ``[B, T]``, summed and divided
    by ``normalizer``.

    Returns the loss (fp32 scalar) and, with ``backward``, the gradient of ``hidden``; parameters
    used by ``tail`` receive theirs by accumulation, with ``after_chunk`` called after each chunk's.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad = torch.zeros_like(hidden) if backward else None
    for begin in range(0, hidden.shape[1], chunk):
        part = hidden[:, begin : begin + chunk].detach().requires_grad_(backward)
        target = targets[:, begin : begin + chunk].reshape(-1)
        with torch.set_grad_enabled(backward):
            logits = tail(part)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), target, ignore_index=IGNORED, reduction="sum")
            loss = loss / normalizer
        total += loss.detach()
        if backward:
            loss.backward()
            grad[:, begin : begin + chunk] = part.grad
            del logits, loss
            after_chunk()
    return total, grad


def run_tail(parts: Parts, batch: Any, hidden: Tensor, after_chunk: Callable[[], None] = lambda: None) -> None:
    """What follows the blocks, forward and backward, with whatever weights there are."""
    if parts.is_causal_lm:
        chunked_loss(parts.tail_logits, hidden, shifted_targets(with_labels(batch)["labels"]), normalizer=1.0,
                     chunk=positions_per_chunk(hidden.shape[0], parts.spec.vocab_size), backward=True, after_chunk=after_chunk)
        return
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        parts.tail_loss(leaf, batch).backward()
    after_chunk()
