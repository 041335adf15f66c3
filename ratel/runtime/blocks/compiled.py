"""Blocks fused by ``torch.compile``: fewer passes over memory and fewer launches, with other
roundings than eager ones.

Forward and the second run are two compiled programs. They agree within rounding, as they must only
do; that they draw the same random numbers is tried before training.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ratel.models import Parts
from ratel.models.structure.inputs import BlockInputs

INDUCTOR = "inductor"

VARIANTS = 64
"""Programs of one piece of code: kinds of blocks, with and without a graph, full and last
micro-batch. PyTorch stops at 8, and would run the others uncompiled without a word."""

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Norm of the difference over the norm: several times what fusing changes. Another dropout mask is
far beyond it."""


class CompiledBlocks:
    """Blocks of one model. Compiling happens at the first call with arguments of a form."""

    def __init__(self, parts: Parts, backend: str = INDUCTOR) -> None:
        self._parts, self._backend = parts, backend
        self._forwards: dict[int, Callable[..., Any]] = {}
        _allow_variants()

    def run(self, block: int, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        if block not in self._forwards:
            # Eager random numbers, which depend on the seed alone and not on how operations were
            # grouped.
            options = {"fallback_random": True} if self._backend == INDUCTOR else None
            self._forwards[block] = torch.compile(self._parts.own_forward(block), dynamic=False, backend=self._backend,
                                                  options=options)
        return self._parts.block(block, hidden, inputs, forward=self._forwards[block])

    def why_not(self, block: int, hidden: Tensor, inputs: BlockInputs, seed: Callable[[], None]) -> str | None:
        """Why this block and its like cannot be compiled; None if they can. ``hidden`` is a
        leaf."""
        if self._parts.has_hooks(block):
            return "hooks are registered on it"
        try:
            seed()
            with torch.no_grad():
                first = self.run(block, hidden.detach(), inputs)
            seed()
            with torch.enable_grad():
                second = self.run(block, hidden, inputs)
                second.backward(torch.zeros_like(second))
            hidden.grad = None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and training goes on without
            return f"torch.compile fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        second = second.detach()
        difference = torch.linalg.vector_norm((second - first).float()) / torch.linalg.vector_norm(first.float())
        if not difference <= ROUNDING[first.dtype]:
            return f"its two compiled runs differ by {float(difference):.1e}"
        return None


def _allow_variants() -> None:
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(VARIANTS, getattr(config, name)))
