"""Gates on the blocks: running a model's own forward up to its blocks, or from their output on.

A gate stands before the `forward` of each block object. With no handler it lets the call through; a
handler sees every call and decides what the block returns. The model's own code runs in every case,
so what it does before, between and after its blocks needs no knowledge of the model.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models.structure.inputs import BlockCall, HiddenSlot, OutputForm


class StopForward(BaseException):
    """Ends a forward at its last block. Not an Exception, so that a model's own `except Exception`
    lets it pass."""


class Handler(Protocol):
    def __call__(self, block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any: ...


class Gates:
    """The gates of one model. Not for use from two threads at once."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = list({id(b): b for b in blocks}.values())
        self._handler: Handler | None = None
        for block in self._blocks:
            block.forward = self._gate(block, block.forward)

    def _gate(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def gate(*args: Any, **kwargs: Any) -> Any:
            if self._handler is None:
                return forward(*args, **kwargs)
            return self._handler(block, forward, args, kwargs)
        return gate

    @contextmanager
    def handled_by(self, handler: Handler) -> Iterator[None]:
        assert self._handler is None, "a forward is already under way"
        self._handler = handler
        try:
            yield
        finally:
            self._handler = None

    def remove(self) -> None:
        """Give every block its own forward back."""
        for block in self._blocks:
            forward = block.forward.__wrapped__
            del block.forward
            if getattr(block.forward, "__func__", None) is not getattr(forward, "__func__", forward):
                block.forward = forward  # it was an instance attribute before (a wrapper of another library)
        self._blocks = []


class _Passage:
    """Common to head and tail: counts the calls and holds them to the order seen when the model was
    traced."""

    def __init__(self, stages: Sequence[nn.Module], slots: Sequence[HiddenSlot], forms: Sequence[OutputForm]) -> None:
        self.stages, self.slots, self.forms = stages, slots, forms
        self.position = 0

    def advance(self, block: nn.Module) -> int:
        index = self.position
        if index >= len(self.stages) or self.stages[index] is not block:
            raise RatelError("the model does not call its blocks in the same order every time (layer dropping?)",
                             field="model", value=type(block).__name__, remedy="Turn layer dropping off")
        self.position += 1
        return index

    @property
    def complete(self) -> bool:
        return self.position == len(self.stages)


class Head(_Passage):
    """Records what every block is given and passes the hidden states on unchanged; ends at block
    ``stop_at``."""

    def __init__(self, stages: Sequence[nn.Module], slots: Sequence[HiddenSlot], forms: Sequence[OutputForm], *,
                 stop_at: int) -> None:
        super().__init__(stages, slots, forms)
        self.stop_at = stop_at
        self.hidden: Tensor | None = None
        self.calls: list[BlockCall] = []

    def __call__(self, block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        index = self.advance(block)
        slot = self.slots[index]
        hidden = slot.get(args, kwargs)
        self.hidden = hidden if index == 0 else self.hidden
        self.calls.append(slot.put(BlockCall(args=args, kwargs=kwargs), None))
        if index == self.stop_at:
            raise StopForward
        return self.forms[index].wrap(hidden)


class Tail(_Passage):
    """Runs no block, and returns the given hidden states from the last one.

    What comes before the blocks runs without gradient (unless the result has use for it), and the
    random numbers it draws are put back: a tail leaves the generators as if it had started after
    the blocks.
    """

    def __init__(self, stages: Sequence[nn.Module], slots: Sequence[HiddenSlot], forms: Sequence[OutputForm], *,
                 hidden: Tensor, rng: "RngState | None") -> None:
        super().__init__(stages, slots, forms)
        self.hidden, self.rng = hidden, rng
        self.grad_enabled = torch.is_grad_enabled()

    def __call__(self, block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        index = self.advance(block)
        if not self.complete:
            return self.forms[index].wrap(self.slots[index].get(args, kwargs))
        if self.rng is not None:
            self.rng.restore()
        torch.set_grad_enabled(self.grad_enabled)
        return self.forms[index].wrap(self.hidden)


class RngState:
    """The generators a forward draws from: the CPU's and the device's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
