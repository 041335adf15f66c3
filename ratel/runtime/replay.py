"""Running a block while keeping results, and once more without making what was kept or what nobody needs.

Both are dispatch modes below autograd: autograd records the graph of the second run as always, and whatever it saves
has the bits that a full run would give it. Both hold every operation to the trace; a block that does something else
this time is noticed, never trained wrongly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_leaves

from ratel.runtime.op_flops import num_stored
from ratel.runtime.op_trace import Op, OpTrace, Outline, is_numbered, outline, outline_arguments, reads_values

Save = Callable[[str, list[Tensor]], None]
"""Takes the tensors of one kept result, by its name. They are whole, and nobody writes to them any more."""


class Diverged(Exception):
    """A block did not run the operations of its trace."""


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """What the second run of a block does at each operation: take what was kept, pass over, or run."""

    trace: OpTrace
    kept: dict[int, str]
    skipped: frozenset[int]
    copied: frozenset[int]
    """Kept results that forward itself writes to later; a copy is kept."""

    @classmethod
    def make(cls, trace: OpTrace, numbers: dict[str, int]) -> "Program":
        """``numbers``: the operations whose results are kept, by name."""
        return cls(trace, {number: name for name, number in numbers.items()}, trace.skippable(numbers.values()),
                   frozenset(filter(trace.written_after, numbers.values())))

    @property
    def saves_work(self) -> bool:
        return bool(self.kept or self.skipped)


class Recorder(TorchDispatchMode):
    """Runs everything and hands kept results to ``save``; ``extras`` are their parts that are not worth moving."""

    def __init__(self, program: Program, save: Save) -> None:
        super().__init__()
        self._program, self._save = program, save
        self._number, self._matches = 0, True
        self.extras: dict[str, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_numbered(func):
            self._note(func, result)
        return result

    @property
    def complete(self) -> bool:
        """Whether everything was kept that should be, of the operations that the trace has."""
        return self._matches and self._number == len(self._program.trace.ops)

    def _note(self, func: Any, result: Any) -> None:
        ops, number = self._program.trace.ops, self._number
        self._number += 1
        self._matches = self._matches and number < len(ops) and ops[number].func is func
        if self._matches and number in self._program.kept:
            leaves = tree_leaves(result)
            self._matches = tuple(outline(x) if isinstance(x, Tensor) else x for x in leaves) == ops[number].outputs
            if self._matches:
                self._keep(number, leaves)

    def _keep(self, number: int, leaves: list[Any]) -> None:
        name, count = self._program.kept[number], num_stored(self._program.trace.ops[number].func)
        # Not the object itself: autograd is about to attach its graph to that.
        own = Tensor.clone if number in self._program.copied else Tensor.detach
        leaves = [own(x) if isinstance(x, Tensor) else x for x in leaves]
        self.extras[name] = leaves[count:]
        self._save(name, leaves[:count])


class Replayer(TorchDispatchMode):
    """``results``: the leaves of every kept result, by name. ``empty`` makes what stands for a result nobody needs."""

    def __init__(self, program: Program, results: dict[str, list[Any]],
                 empty: Callable[[Outline], Tensor] = Outline.empty) -> None:
        super().__init__()
        self._program, self._results, self._empty = program, results, empty
        self._number = 0
        self._hollow: dict[int, StorageWeakRef] = {}
        """Storages that hold nothing. Weak references, so that no other storage gets their address meanwhile."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not is_numbered(func):
            return func(*args, **kwargs)
        number, op = self._next(func)
        name = self._program.kept.get(number)
        if name is None and number not in self._program.skipped:
            if self._hollow and reads_values(func):
                self._check_reads(args, kwargs)
            return func(*args, **kwargs)
        if outline_arguments(args, kwargs) != op.arguments:
            raise Diverged(f"{func} of other arguments, as operation {number}")
        leaves = self._kept_leaves(name) if name is not None else self._hollow_leaves(op)
        return leaves[0] if len(func._schema.returns) == 1 else tuple(leaves)

    def finish(self) -> None:
        """To be called when the block has run."""
        if self._number != len(self._program.trace.ops):
            raise Diverged(f"{self._number} operations in place of {len(self._program.trace.ops)}")

    def _next(self, func: Any) -> tuple[int, Op]:
        ops, number = self._program.trace.ops, self._number
        self._number += 1
        if number >= len(ops) or ops[number].func is not func:
            raise Diverged(f"{func} as operation {number}")
        return number, ops[number]

    def _kept_leaves(self, name: str) -> list[Any]:
        """Fresh tensors over the same memory: what came back is a view of its slot, and autograd would see that."""
        return [x.detach() if isinstance(x, Tensor) else x for x in self._results.pop(name)]

    def _hollow_leaves(self, op: Op) -> list[Any]:
        return [self._hollow_tensor(x) if isinstance(x, Outline) else x for x in op.outputs]

    def _hollow_tensor(self, outline: Outline) -> Tensor:
        made = self._empty(outline)
        ref = StorageWeakRef(made.untyped_storage())
        self._hollow[ref.cdata] = ref
        return made

    def _check_reads(self, args: tuple, kwargs: dict[str, Any]) -> None:
        for leaf in arg_tree_leaves(*args, **kwargs):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in self._hollow:
                raise Diverged("an operation that reads a result which was not made")


def poisoned(outline: Outline) -> Tensor:
    """What shows in a result if anybody does read what was not made."""
    made = outline.empty()
    return made.fill_(float("nan")) if made.is_floating_point() else made.zero_()
