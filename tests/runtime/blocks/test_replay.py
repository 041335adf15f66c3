"""A second run is under its mode only where it has to be, and notices from there on what is not as
in the trace."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

from ratel.runtime.blocks.op_trace import trace
from ratel.runtime.blocks.profile import inner_numbers
from ratel.runtime.blocks.replay import Diverged, Program, Recorder, replay

pytestmark = pytest.mark.unit


class Block(nn.Module):
    """Backward does not need what `two` makes, nor the sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.scale = nn.Parameter(torch.ones(8))
        self.depths: list[int] = []
        """How many modes are on before and after `two`."""
        self.change = ""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(x))
        if self.change == "before":
            y = y.exp().abs()
        self.depths.append(_len_torch_dispatch_stack())
        scale = self.scale if self.change == "needs a gradient" else self.scale.detach()
        if self.change == "none":
            return x + y
        with Nothing() if self.change == "a mode" else nullcontext():
            z = self.two(y)
        if self.change == "twice":
            z = z + self.two(y)
        if self.change == "after":
            z = z.sin()
        self.depths.append(_len_torch_dispatch_stack())
        return x + z * scale


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return func(*args, **(kwargs or {}))


class UsesTwice(nn.Module):
    """The last product is that of a submodule which has run before."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.one, self.two, self.between = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), between

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.two(x))
        return x + self.two(torch.tanh(self.one(y)) if self.between else y)


def rows() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


def program_of(block: nn.Module, *kept: str) -> Program:
    x = rows()
    found = trace(lambda: block(x), block, keep_graph=False)[1]
    return Program.make(found, {name: inner_numbers(found)[name] for name in kept})


def replayed(block: nn.Module, program: Program, results: dict | None = None) -> list[Tensor]:
    """The gradients after a second run."""
    x = rows()
    return gradients(block, x, replay(program, results or {}, block, lambda: block(x)))


def gradients(block: nn.Module, x: Tensor, output: Tensor) -> list[Tensor]:
    wanted = [x, *(p for p in block.parameters())]
    grads = torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
    return [torch.zeros(()) if grad is None else grad for grad in grads]


def in_full(block: nn.Module) -> list[Tensor]:
    x = rows()
    return gradients(block, x, block(x))


def is_as_before(block: nn.Module) -> bool:
    modes = _len_torch_dispatch_stack() or is_in_torch_dispatch_mode()
    return not modes and not any(m._forward_pre_hooks for m in block.modules())


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


def test_nothing_is_watched_before_the_submodule_that_is_left_out() -> None:
    block = Block()
    program = program_of(block)
    assert (program.begins_in, program.begins_at) == ("two", 2)
    block.depths.clear()
    assert same(replayed(block, program), in_full(block))
    assert block.depths == [0, 1, 0, 0]
    assert is_as_before(block)


def test_all_of_a_run_is_watched_that_is_given_what_was_kept() -> None:
    program = program_of(Block(), "one")
    assert (program.begins_in, program.begins_at) == ("", 0)


@pytest.mark.parametrize("between, begins", [(True, ("one", 2)), (False, ("", 0))])
def test_a_submodule_that_runs_twice_is_no_beginning(between: bool, begins: tuple[str, int]) -> None:
    block = UsesTwice(between)
    program = program_of(block)
    assert program.skipped and (program.begins_in, program.begins_at) == begins
    assert same(replayed(block, program), in_full(block))
    assert is_as_before(block)


def test_what_changes_before_it_is_run_as_it_is() -> None:
    block = Block()
    program = program_of(block)
    block.change = "before"
    assert same(replayed(block, program), in_full(block))
    assert is_as_before(block)


@pytest.mark.parametrize("change", ["after", "twice", "none", "a mode", "needs a gradient"])
def test_what_changes_after_it_is_noticed(change: str) -> None:
    """A gradient that is needed only now makes autograd save what has not been made."""
    block = Block()
    program = program_of(block)
    block.change = change
    with pytest.raises(Diverged):
        replayed(block, program)
    assert is_as_before(block)


def kept_of(block: nn.Module, program: Program) -> dict[str, list[Any]]:
    kept: dict[str, list[Tensor]] = {}
    recorder, x = Recorder(program, kept.__setitem__), rows()
    with saved_tensors_hooks(lambda tensor: None, lambda packed: packed), recorder:
        block(x)
    assert recorder.complete
    return {name: kept[name] + recorder.extras[name] for name in kept}


def test_nothing_is_compiled_under_a_mode() -> None:
    """`torch.compile` would take the mode's own code for the block's."""
    from torch._dynamo.utils import counters

    block = Block()
    expected = in_full(block)
    program = program_of(block, "one")
    run = torch.compile(block, backend="eager")
    run(rows())
    counters.clear()
    results = kept_of(run, program)
    x = rows()
    assert same(gradients(block, x, replay(program, results, block, lambda: run(x))), expected)
    assert not counters["frames"]
    assert is_as_before(block)
