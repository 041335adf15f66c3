"""What a model passes to its blocks besides the hidden states, recorded once and replayed block by
block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Slot = tuple[int, int]
"""A place among the arguments of the blocks: (block, number of the leaf in the order of
`leaves`)."""


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply to every leaf of nested tuples, lists and dicts; other objects are leaves and keep
    their identity."""
    if isinstance(tree, tuple):
        items = [tree_map(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [tree_map(function, item) for item in tree]
    if type(tree) is dict:
        return {key: tree_map(function, item) for key, item in tree.items()}
    return function(tree)


def leaves(tree: Any) -> Iterator[Any]:
    """Leaves in the order `tree_map` visits them."""
    found: list[Any] = []
    tree_map(found.append, tree)
    return iter(found)


@dataclass(frozen=True, kw_only=True)
class HiddenSlot:
    """Where a block takes the hidden states: the index of a positional argument or the name of a
    keyword."""

    place: int | str

    def get(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if isinstance(self.place, int):
            return args[self.place] if self.place < len(args) else None
        return kwargs.get(self.place)

    def put(self, call: "BlockCall", hidden: Tensor | None) -> "BlockCall":
        if isinstance(self.place, int):
            args = (*call.args[:self.place], hidden, *call.args[self.place + 1:])
            return replace(call, args=args)
        return replace(call, kwargs={**call.kwargs, self.place: hidden})


@dataclass(frozen=True, kw_only=True)
class OutputForm:
    """What a block returns: the hidden states themselves, or a tuple or list with them at
    ``index``."""

    kind: type | None = None
    length: int = 1
    index: int = 0

    def take(self, output: Any) -> Tensor:
        return output if self.kind is None else output[self.index]

    def wrap(self, hidden: Tensor) -> Any:
        if self.kind is None:
            return hidden
        items: list[Tensor | None] = [None] * self.length
        items[self.index] = hidden
        return self.kind(items)


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """The arguments of one block, without the hidden states (None in their place)."""

    args: tuple
    kwargs: dict[str, Any]


class BlockInputs:
    """The arguments of every block for one micro-batch. A tensor given to several blocks is one
    object here too."""

    def __init__(self, calls: list[BlockCall], differentiable_slots: tuple[Slot, ...] = ()) -> None:
        self.calls = calls
        self._slots = differentiable_slots

    @property
    def differentiable(self) -> list[Tensor]:
        """Tensors that trained parameters before the blocks produced, each once: they need a
        gradient of their own."""
        by_block = {block: list(leaves((self.calls[block].args, self.calls[block].kwargs)))
                    for block, _ in self._slots}
        tensors = (by_block[block][leaf] for block, leaf in self._slots)
        return list({id(t): t for t in tensors if isinstance(t, Tensor)}.values())

    def with_leaves(self) -> "BlockInputs":
        """The same arguments with the differentiable ones cut from their graph, so that ``.grad``
        collects on them."""
        return self.with_others({id(t): t.detach().requires_grad_() for t in self.differentiable})

    def with_others(self, others: dict[int, Tensor]) -> "BlockInputs":
        """The same arguments with another tensor for each whose ``id`` is in ``others``."""
        if not others:
            return self
        return BlockInputs([self._map_call(call, lambda x: others.get(id(x), x)) for call in self.calls], self._slots)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, each once."""
        found = (x for call in self.calls for x in leaves((call.args, call.kwargs)) if isinstance(x, Tensor))
        return list({id(t): t for t in found}.values())

    @property
    def num_bytes(self) -> int:
        """Memory the arguments hold, storages counted once."""
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in self.tensors)}
        return sum(storages.values())

    def to(self, device: torch.device, non_blocking: bool = False) -> "BlockInputs":
        moved = {id(t): t.to(device, non_blocking=non_blocking) for t in self.tensors}
        return BlockInputs([self._map_call(call, lambda x: moved.get(id(x), x)) for call in self.calls], self._slots)

    @staticmethod
    def _map_call(call: BlockCall, function: Callable[[Any], Any]) -> BlockCall:
        return BlockCall(args=tree_map(function, call.args), kwargs=tree_map(function, call.kwargs))
