"""Running a block while keeping results, and once more without making what was kept or what nobody
needs.

Both are dispatch modes below autograd: autograd records the graph of the second run as always, and
whatever it saves has the bits that a full run would give it. Both hold operations to the trace; a
block that does something else this time is noticed, never trained wrongly. A mode costs 10 us per
operation, so a second run for which nothing was kept is under its mode only from the submodule in
which something is left out.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves

from ratel.runtime.blocks.op_flops import num_stored
from ratel.runtime.blocks.op_trace import Op, OpTrace, Outline, is_numbered, outline, outline_arguments, reads_values

Save = Callable[[str, list[Tensor]], None]
"""Takes the tensors of one kept result, by its name. They are whole, and nobody writes to them any
more."""


class Diverged(Exception):
    """A block did not run the operations of its trace."""


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """What the second run of a block does at each operation: take what was kept, pass over, or
    run."""

    trace: OpTrace
    kept: dict[int, str]
    skipped: frozenset[int]
    copied: frozenset[int]
    """Kept results that forward itself writes to later; a copy is kept."""
    steps: tuple[tuple[Any, str | None, bool], ...]
    """For each operation what it is, the name of its result if that is kept, and whether it is
    run."""
    begins_in: str
    """The submodule in which the second run begins to differ from a full one; '' if that is the
    block itself."""
    begins_at: int
    """How many operations come before that submodule."""

    @classmethod
    def make(cls, trace: OpTrace, numbers: dict[str, int]) -> "Program":
        """``numbers``: the operations whose results are kept, by name."""
        kept = {number: name for name, number in numbers.items()}
        skipped = trace.skippable(kept)
        steps = tuple((op.func, kept.get(number), number not in kept and number not in skipped)
                      for number, op in enumerate(trace.ops))
        # What was kept belongs to the numbers of forward: all of the second run is held to the same
        # operations. What is merely left out concerns nobody before it: there the block may do what
        # it likes, and do it without a mode.
        begins_in, begins_at = trace.last_entered(min(skipped)) if skipped and not kept else ("", 0)
        return cls(trace, kept, skipped, frozenset(filter(trace.written_after, kept)), steps, begins_in, begins_at)

    @property
    def saves_work(self) -> bool:
        return bool(self.kept or self.skipped)


class _Mode(TorchDispatchMode):
    """What a block has compiled by itself runs eagerly inside.

    So no operation needs to be kept from ``torch.compile``, as PyTorch does it for other modes at 2
    us each.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What some versions of PyTorch ask a mode."""
        return False

    def __enter__(self) -> "_Mode":
        self._eagerly = torch.compiler.set_stance("force_eager")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._eagerly.__exit__(*error)


class Recorder(_Mode):
    """Runs everything and hands kept results to ``save``; ``extras`` are their parts that are not
    worth moving."""

    def __init__(self, program: Program, save: Save) -> None:
        super().__init__()
        self._program, self._save = program, save
        self._number, self._matches = 0, True
        self.extras: dict[str, list[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if is_numbered(func):
            self._note(func, result)
        return result

    @property
    def complete(self) -> bool:
        """Whether everything was kept that should be, of the operations that the trace has."""
        return self._matches and self._number == len(self._program.steps)

    def _note(self, func: Any, result: Any) -> None:
        steps, number = self._program.steps, self._number
        self._number += 1
        self._matches = self._matches and number < len(steps) and steps[number][0] is func
        if self._matches and steps[number][1] is not None:
            leaves = list(result) if isinstance(result, tuple) else [result]
            self._matches = tuple(outline(x) if isinstance(x, Tensor) else x
                                  for x in leaves) == self._program.trace.ops[number].outputs
            if self._matches:
                self._keep(number, leaves)

    def _keep(self, number: int, leaves: list[Any]) -> None:
        name, count = self._program.kept[number], num_stored(self._program.trace.ops[number].func)
        # Not the object itself: autograd is about to attach its graph to that.
        own = Tensor.clone if number in self._program.copied else Tensor.detach
        leaves = [own(x) if isinstance(x, Tensor) else x for x in leaves]
        self.extras[name] = leaves[count:]
        self._save(name, leaves[:count])


class Replayer(_Mode):
    """``results``: the leaves of every kept result, by name. ``empty`` makes what stands for a
    result nobody needs."""

    def __init__(self, program: Program, results: dict[str, list[Any]], empty: Callable[[Outline], Tensor]) -> None:
        super().__init__()
        self._program, self._results, self._empty = program, results, empty
        self._number = program.begins_at
        self._hollow: dict[int, StorageWeakRef] = {}
        """Storages that hold nothing. Weak references, so that no other storage gets their address
        meanwhile."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not is_numbered(func):
            return func(*args, **kwargs)
        steps, number = self._program.steps, self._number
        self._number += 1
        if number >= len(steps) or steps[number][0] is not func:
            raise Diverged(f"{func} as operation {number}")
        _, name, is_run = steps[number]
        if is_run:
            if self._hollow and reads_values(func):
                self._check_reads(args, kwargs)
            return func(*args, **kwargs)
        op = self._program.trace.ops[number]
        if outline_arguments(args, kwargs) != op.arguments:
            raise Diverged(f"{func} of other arguments, as operation {number}")
        leaves = self._kept_leaves(name) if name is not None else self._hollow_leaves(op)
        return leaves[0] if len(func._schema.returns) == 1 else tuple(leaves)

    def finish(self) -> None:
        """Check what is left to check when the block has run."""
        if self._number != len(self._program.steps):
            raise Diverged(f"{self._number} operations in place of {len(self._program.steps)}")

    def _kept_leaves(self, name: str) -> list[Any]:
        """Fresh tensors over the same memory: what came back is a view of its slot, and autograd
        would see that."""
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


def replay(program: Program, results: dict[str, list[Any]], block: nn.Module, run: Callable[[], Tensor],
           empty: Callable[[Outline], Tensor] = Outline.empty) -> Tensor:
    """Run ``run``, which calls ``block`` once, as the program says. Raises `Diverged`."""
    replayer = Replayer(program, results, empty)
    with _from(program.begins_in, block, replayer):
        output = run()
    replayer.finish()
    return output


@contextmanager
def _from(submodule: str, block: nn.Module, mode: TorchDispatchMode) -> Iterator[None]:
    """The mode is on from the moment that the submodule begins ('': at once) to the end.

    Not where a mode of the block's own is on in that moment: leaving that would end this one in its
    place. The replayer misses operations then, as where the submodule never begins.
    """
    if not submodule:
        with mode:
            yield
        return
    with ExitStack() as stack:
        depth = _len_torch_dispatch_stack()

        def begin(*_: Any) -> None:
            if _len_torch_dispatch_stack() == depth:
                stack.enter_context(mode)

        stack.callback(block.get_submodule(submodule).register_forward_pre_hook(begin).remove)
        yield


def poisoned(outline: Outline) -> Tensor:
    """What shows in a result if anybody does read what was not made."""
    made = outline.empty()
    return made.fill_(float("nan")) if made.is_floating_point() else made.zero_()
