"""What a block's second run may leave out, and what becomes of one that differs from the first."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratel.errors import RatelError
from ratel.runtime.blocks.op_trace import trace
from ratel.runtime.blocks.profile import inner_numbers, profile_of
from ratel.runtime.session.session import Session
from tests.support.families import batches
from tests.runtime.blocks.inner import DEVICES, WIDTH, Body, everything_again, patches_loss


def skipped(block: nn.Module, x: Tensor, keep: tuple[str, ...] = ()) -> list[str]:
    """Names of the operations that a second run leaves out."""
    found = trace(lambda: block(x), block, keep_graph=True)[1]
    left_out = found.skippable(inner_numbers(found)[name] for name in keep)
    return [found.ops[number].func._schema.name.partition("::")[2] for number in sorted(left_out)]


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.function = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.unit
@pytest.mark.parametrize("function, expected", [
    (lambda m, x: x + m.two(torch.relu(m.one(x))), ["mm", "add"]),
    (lambda m, x: x + m.two(torch.exp(m.one(x))), ["mm", "add"]),
    (lambda m, x: m.two(m.one(x) + x), ["mm"]),
    (lambda m, x: m.two(x).add_(x), []),  # it writes to its argument
    (lambda m, x: x + F.dropout(m.two(x), 0.5), ["mm", "mul", "add"]),  # the mask is drawn: backward needs it
    (lambda m, x: x + m.two(x) * float(m.one(x).sum() > 1e9), ["mm", "mul", "add"]),  # Python was told a value
    (lambda m, x: x * m.two(x), ["mul"]),
    (lambda m, x: x + m.two(x).view(2, 2, 8).transpose(0, 1).reshape(4, 8), ["mm", "clone", "add"]),
], ids=["relu", "exp", "inner sum", "in place", "dropout", "a value", "saved", "views"])
def test_only_what_nobody_needs_is_left_out(function: Callable, expected: list[str]) -> None:
    torch.manual_seed(0)
    assert skipped(Lambda(function), torch.randn(4, 8, requires_grad=True)) == expected


@pytest.mark.unit
def test_a_random_operation_is_neither_kept_nor_left_out() -> None:
    block = Lambda(lambda m, x: F.scaled_dot_product_attention(*[m.one(x)[None, None]] * 3, dropout_p=p)[0, 0])
    x = torch.randn(4, 8, requires_grad=True)
    for p, names in ((0.0, ["one", "sdpa"]), (0.5, ["one"])):
        found = trace(lambda: block(x), block, keep_graph=False)[1]
        assert [name for name in inner_numbers(found) if name in ("one", "sdpa")] == names, p
        assert any(op.must_run for op in found.ops) == (p > 0)
        assert found.has_all_bits.count(False) == (p == 0)  # of attention's results one holds what it likes


@pytest.mark.unit
def test_what_saves_nothing_is_not_offered() -> None:
    """Only the end of a chain is offered: with that kept, the products before it are not needed."""
    block = Lambda(lambda m, x: torch.relu(m.two(m.one(x))))
    block.one.weight.requires_grad_(False)
    block.two.weight.requires_grad_(False)
    found = trace(lambda: block(torch.randn(4, 8, requires_grad=True)), block, keep_graph=False)[1]
    profile = profile_of(found, rows=4)
    assert [(inner.name, inner.row_flops) for inner in profile.inner] == [("two", 2 * 2 * 8 * 8)]


# --- what differs -----------------------------------------------------------------------------------------------------


class Changes(nn.Module):
    """Does one operation more or another one in the runs that ``script`` names; late: after the
    last product, which a second run leaves out."""

    script: dict[int, str] = {}
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        change = Changes.script.get(Changes.runs)
        Changes.runs += 1
        y = y.sin() if change == "other" else y.tanh()
        z = self.down(y.abs().abs() if change == "more" else y)
        return x - z if change == "late other" else x + (z.sin() if change == "late more" else z)


CHANGES = ("more", "other", "late more", "late other")


def changing(choice: str, first: dict[int, str], later: dict[int, str], device: str) -> float:
    """The norm of a step in which runs of blocks, counted from its beginning, are changed. Run 3 is
    backward's first."""
    torch.manual_seed(0)
    Changes.script, Changes.runs = first, 0
    with Session(Body(Changes), loss_fn=patches_loss, device=device, dtype="fp32", micro_batch=4, max_grad_norm=0.5,
                 activations=choice) as session:
        (batch,) = batches("patches", 1)
        session.step(batch)  # the first compares both runs of every block
        Changes.script, Changes.runs = later, 0
        return session.step(batch).grad_norm


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_second_run_that_differs_from_forward_is_an_error(change: str, device: str) -> None:
    with pytest.raises(RatelError, match="block 2 did something else when it was run again"):
        changing("gpu", {}, {3: change}, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_that_differs_from_the_trace_is_run_again_in_full(change: str, device: str) -> None:
    both = {run: change for run in (2, 3)}  # the last block, in forward and backward
    with everything_again():
        expected = changing("recompute", {}, both, device)
    assert changing("gpu", {}, both, device) == expected
    # What changes late is noticed, and the block run once more.
    again = {4: change} if change.startswith("late") else {}
    assert changing("recompute", {}, both | again, device) == expected


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh()) * scale


class LastIsLearned(Body):
    """Only the last block's argument needs a gradient; only there does backward need the last
    product."""

    def __init__(self) -> None:
        super().__init__(Scaled)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x, scale = self.embed(x), self.scale * 1
        for number, layer in enumerate(self.layers):
            x = layer(x, scale if number == 2 else scale.detach())
        return self.head(x.mean(1))


@pytest.mark.numerics
def test_blocks_are_not_alike_whose_arguments_need_other_gradients() -> None:
    def norm(choice: str) -> float:
        torch.manual_seed(0)
        with Session(LastIsLearned(), loss_fn=patches_loss, device="cpu", dtype="fp32", micro_batch=4, max_grad_norm=0.5,
                     activations=choice) as session:
            return session.step(*batches("patches", 1)).grad_norm

    with everything_again():
        expected = norm("recompute")
    assert norm("recompute") == norm("gpu") == expected


@pytest.mark.numerics
def test_a_kernel_that_nobody_sees_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads a product past the dispatcher, as kernels launched by hand do."""
    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            copied = torch.from_numpy(self.down(x).detach().float().numpy().copy()).to(x.dtype)
            return self.up(x) * copied

    torch.manual_seed(0)
    with Session(Body(Unseen), loss_fn=patches_loss, device="cpu", dtype="fp32", micro_batch=2) as session:
        session.step(batches("patches", 1)[0])
        profile = session.plan.profiles[0]
    assert profile.inner == () and profile.recompute_flops == profile.forward_flops
