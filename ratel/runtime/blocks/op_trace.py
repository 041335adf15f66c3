"""What one run of a block does below autograd: its operations in order, and which of them backward
needs.

A dispatch mode sees every operation after autograd has recorded it. Operations are numbered in
their order; views are left out, because autograd makes some of its own and they cost nothing. What
backward needs is known from autograd itself: it hands every tensor that it saves to a hook. Tensors
are told apart by their storages.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_leaves

from ratel.runtime.blocks.op_flops import flops_of, gradient_flops_of, is_attention

aten = torch.ops.aten

_SHAPES_ONLY = {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
                aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
                aten.new_empty_strided.default}
"""Operations that look at the shape of their argument, never at its values."""

PURE_NAMESPACES = ("aten", "ratel_lora")
"""The libraries whose operations do nothing but what their schemas say: PyTorch's own, and the
adapters' (`ratel.lora.compute.ops`)."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What it takes to make a tensor of the same form."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether the elements fill one range of memory, in some order."""
        expected = 1
        for size, stride in sorted(zip(self.shape, self.stride), key=lambda pair: pair[1]):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One numbered operation. Storages are numbers that mean something within one trace only."""

    func: Any
    arguments: tuple
    """Leaves of the arguments as `outline_arguments` gives them."""
    outputs: tuple
    """Leaves of the result; an `Outline` for each tensor."""
    reads: frozenset[int]
    makes: frozenset[int]
    """Storages that it creates or writes to."""
    must_run: bool
    """It does more than make its result: it writes to an argument, draws random numbers, answers
    Python a question; or nobody knows what else, as it is not PyTorch's own."""
    path: str
    """The innermost submodule of the block that was running, by its name in the block."""
    flops: float
    gradient_flops: float
    """Those of its backward pass."""


@dataclass(frozen=True, slots=True, eq=False)
class OpTrace:
    ops: tuple[Op, ...]
    saved: frozenset[int]
    """Storages of tensors that autograd has saved."""
    has_all_bits: tuple[bool, ...] = ()
    """Whether all bits count, for each tensor that autograd has saved, in its order. False for what
    attention notes beside its result: seeds that it leaves unset without dropout, and row sums with
    a margin that no kernel writes."""
    entered: tuple[tuple[str, int], ...] = ()
    """Every call of a submodule, in order: its name in the block and how many operations come
    before."""

    def skippable(self, kept: Iterable[int] = ()) -> frozenset[int]:
        """Numbers of operations that a second run need not do, given the results of ``kept``.

        What must run needs its arguments; what autograd saves is needed; what is needed needs the
        arguments of everything that has written to it.
        """
        kept = frozenset(kept)
        makers: dict[int, list[int]] = {}
        for number, op in enumerate(self.ops):
            for storage in op.makes:
                makers.setdefault(storage, []).append(number)
        runs = {number for number, op in enumerate(self.ops) if op.must_run}
        pending = [*self.saved, *(s for number in runs for s in self.ops[number].reads)]
        seen: set[int] = set()
        while pending:
            storage = pending.pop()
            if storage in seen:
                continue
            seen.add(storage)
            for number in makers.get(storage, ()):
                if number not in kept and number not in runs:
                    runs.add(number)
                    pending += self.ops[number].reads
        return frozenset(range(len(self.ops))) - runs - kept

    def flops_without(self, kept: Iterable[int] = ()) -> float:
        """FLOPs that a second run makes when it is given the results of ``kept``."""
        kept = frozenset(kept)
        left_out = self.skippable(kept) | kept
        return sum(op.flops for number, op in enumerate(self.ops) if number not in left_out)

    def last_entered(self, number: int) -> tuple[str, int]:
        """The submodule whose only call begins last, but not after this operation, and how many
        operations come before; the block itself, ``("", 0)``, where there is none."""
        calls = Counter(name for name, _ in self.entered)
        once = (entry for entry in self.entered if calls[entry[0]] == 1 and entry[1] <= number)
        return max(once, key=lambda entry: entry[1], default=("", 0))

    def written_after(self, number: int) -> bool:
        """Whether a later operation writes to what this one has made."""
        return any(self.ops[number].makes & op.makes for op in self.ops[number + 1 :])

    def is_like(self, other: "OpTrace") -> bool:
        """The same operations on arguments of the same shapes."""
        return [(op.func, op.arguments, op.outputs) for op in self.ops] == [
            (op.func, op.arguments, op.outputs) for op in other.ops]


def is_numbered(func: Any) -> bool:
    return not func.is_view and func is not aten._unsafe_view.default


def reads_values(func: Any) -> bool:
    return func not in _SHAPES_ONLY


def outline(tensor: Tensor) -> Outline:
    return Outline(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def outline_arguments(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Shapes of tensors and whether they need gradients (what autograd saves depends on that),
    whole numbers and names; of anything else (a scale, a generator) the type."""
    return tuple((x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else
                 x if x is None or isinstance(x, (int, str)) else type(x) for x in _flat(args, kwargs))


def _flat(args: tuple, kwargs: dict[str, Any]) -> Iterator[Any]:
    """An operation's arguments, and what is in those that are lists: no others hold any."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, (list, tuple)):
            yield from x
        else:
            yield x


def trace(run: Callable[[], Tensor], module: nn.Module, *, keep_graph: bool) -> tuple[Tensor, OpTrace]:
    """Run ``run``, which calls ``module`` once with gradients enabled. Its result has a graph to go
    backward through only with ``keep_graph``; otherwise what autograd saves is let go at once, as
    without gradients."""
    tracer = _Tracer()
    with tracer.following(module):
        pack = tracer.keep if keep_graph else tracer.drop
        with saved_tensors_hooks(pack, lambda packed: packed), tracer:
            output = run()
    tracer.note_custom_functions(output)
    return output, tracer.result()


class _Tracer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._running = [""]
        """The submodules that are running, innermost last."""
        self._entered: list[tuple[str, int]] = []
        self._ops: list[Op] = []
        self._saved: set[int] = set()
        self._order: list[int] = []
        self._notes: set[int] = set()
        self._storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_numbered(func):
            self._ops.append(self._describe(func, args, kwargs, result))
        return result

    @contextmanager
    def following(self, module: nn.Module) -> Iterator[None]:
        """Note which submodule runs, inside this context."""
        named = [(name, child) for name, child in module.named_modules() if name]
        handles = [child.register_forward_pre_hook(partial(self._enter, name)) for name, child in named]
        handles += [child.register_forward_hook(self._leave) for _, child in named]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)
        self._entered.append((name, len(self._ops)))

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def keep(self, tensor: Tensor) -> Tensor:
        self.drop(tensor)
        return tensor

    def drop(self, tensor: Tensor) -> None:
        self._order.append(self._storage(tensor))

    def note_custom_functions(self, output: Tensor) -> None:
        """A custom autograd.Function may hold tensors as attributes, past the hooks."""
        pending, seen = [output.grad_fn], set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            if isinstance(node, BackwardCFunction):
                self._saved.update(self._storage(x) for x in tree_leaves(vars(node)) if isinstance(x, Tensor))

    def result(self) -> OpTrace:
        return OpTrace(tuple(self._ops), frozenset(self._saved.union(self._order)),
                       tuple(storage not in self._notes for storage in self._order), tuple(self._entered))

    def _describe(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> Op:
        inputs = frozenset(self._storage(x) for x in arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor))
        leaves = tree_leaves(result)
        outputs = frozenset(self._storage(x) for x in leaves if isinstance(x, Tensor))
        written = frozenset(self._storage(x) for x in _written(func, args, kwargs))
        makes = (outputs - inputs) | written
        if is_attention(func):
            self._notes.update(self._storage(x) for x in leaves[1:] if isinstance(x, Tensor))
        plain = all(isinstance(x, Tensor) for x in leaves) and isinstance(result, (Tensor, tuple))
        must_run = (bool(written) or not outputs or not outputs <= makes or func.namespace not in PURE_NAMESPACES
                    or not (plain or is_attention(func)) or _draws(func, args, kwargs))
        flops = flops_of(func, args, kwargs, result)
        return Op(func, outline_arguments(args, kwargs),
                  tuple(outline(x) if isinstance(x, Tensor) else x for x in leaves),
                  inputs if reads_values(func) else frozenset(), makes, must_run, self._running[-1],
                  flops, gradient_flops_of(func, args, flops))

    def _storage(self, tensor: Tensor) -> int:
        """A weak reference keeps the address from being given to another storage during the trace,
        not the memory."""
        ref = StorageWeakRef(tensor.untyped_storage())
        self._storages.setdefault(ref.cdata, ref)
        return ref.cdata


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))


def _draws(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether it moves a random generator on. Attention kernels are marked as random even without
    dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            chosen = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return chosen != 0.0
    return True
