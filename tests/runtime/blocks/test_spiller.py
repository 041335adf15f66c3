"""The spiller on one block: what it moves, when, and what it leaves as it was."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.memory.lanes import Lanes
from ratel.planner.checkpoints import Spill
from ratel.runtime.blocks.spiller import Spiller
from ratel.units import MIB
from tests.support.spilling import moves  # noqa: F401

CPU = torch.device("cpu")


# --- one block --------------------------------------------------------------------------------------------------------


def spiller(window: int, region: int = MIB) -> Spiller:
    spill = Spill(region_bytes=region, window_bytes=window, least_bytes=64)
    return Spiller(Lanes(CPU), torch.empty(region, dtype=torch.uint8), spill)


def gradients(run: Callable[[Tensor, Tensor], Tensor], with_spiller: Spiller | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(32, 32, generator=generator).requires_grad_() for _ in range(2))
    if with_spiller is None:
        run(x, w).sum().backward()
    else:
        with with_spiller.saving([x, w]):
            y = run(x, w).sum()
        y.backward()
        with_spiller.finish()
    return [x.grad, w.grad]


def chain(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(6):
        x = torch.tanh(x @ w)
    return x


def parts_of_one(x: Tensor, w: Tensor) -> Tensor:
    """Three views of one storage, one of them transposed, beside a product of the first two."""
    a, b, c = torch.cat([x, x @ w, w]).chunk(3)
    return (a * b) @ c.t() + torch.sigmoid(b).t() * c


@pytest.mark.unit
@pytest.mark.parametrize("window", [0, 4096, 3 * 4096, MIB])
@pytest.mark.parametrize("run", [chain, parts_of_one])
def test_windows_of_any_size_give_the_same_gradients(run: Callable, window: int) -> None:
    assert all(map(torch.equal, gradients(run, spiller(window)), gradients(run)))


@pytest.mark.unit
def test_a_storage_is_moved_once_and_what_the_block_was_given_never(moves: dict[str, int]) -> None:
    found = spiller(window=0)
    x, w = (torch.randn(32, 32, requires_grad=True) for _ in range(2))
    with found.saving([x, w]):
        y = parts_of_one(x, w)
    storages = {12 * 1024: 1, 4 * 1024: 3}  # of the three parts; of the first product, the sigmoid and what it is made of
    assert moves["_send"] <= sum(storages.values())
    assert found.used_bytes <= sum(size * count for size, count in storages.items())
    y.sum().backward()
    assert moves["_fetch"] == moves["_send"]


@pytest.mark.unit
def test_no_more_than_the_window_is_held_on_its_way_out_or_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    window, real = 2 * 4096, Spiller._fetch
    found, made, alive = spiller(window), [], []

    def fetch(self: Spiller, spilled: Any) -> None:
        real(self, spilled)
        made.append(weakref.ref(spilled.on_gpu))
        alive.append(sum(ref() is not None for ref in made))

    monkeypatch.setattr(Spiller, "_fetch", fetch)
    x, w = (torch.randn(32, 32, requires_grad=True) for _ in range(2))
    with found.saving([x, w]):
        for _ in range(12):
            x = torch.tanh(x @ w)
            assert found._leaving_bytes <= window
    x.sum().backward()
    assert len(made) >= 8 and max(alive) <= 2 + 2  # the window, and the arguments of one operation
    found.finish()
    gc.collect()
    assert not any(ref() for ref in made)


@pytest.mark.unit
def test_what_the_region_has_no_room_for_stays(moves: dict[str, int]) -> None:
    small = spiller(window=0, region=2 * 4096)
    assert all(map(torch.equal, gradients(chain, small), gradients(chain)))
    assert moves["_fetch"] == 2


class AsksTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (first,), (second,) = ctx.saved_tensors, ctx.saved_tensors
        assert torch.equal(first, second)
        return grad * second


@pytest.mark.unit
@pytest.mark.parametrize("window", [0, MIB])
def test_a_function_may_ask_twice_or_never(window: int) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        unused = torch.tanh(x @ w)  # saved, and no gradient comes there
        del unused
        return AsksTwice.apply(x @ w) + chain(x, w)

    assert all(map(torch.equal, gradients(run, spiller(window)), gradients(run)))


def conjugates(x: Tensor, w: Tensor) -> Tensor:
    """Saves a tensor that PyTorch conjugates only when it is read."""
    numbers = torch.complex(x @ w, x.sin())
    return (numbers.conj() * numbers.conj() * numbers).real


def negates(x: Tensor, w: Tensor) -> Tensor:
    """Saves a tensor that PyTorch negates only when it is read."""
    return torch.tanh(x @ w) * torch.complex(x @ w, x.sin()).conj().imag


class Marked(Tensor):
    """A class of its own, which kernels are chosen by."""


class NeedsMark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.detach().clone().as_subclass(Marked))
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (2.0 if isinstance(ctx.saved_tensors[0], Marked) else 3.0)


def marks(x: Tensor, w: Tensor) -> Tensor:
    return NeedsMark.apply(x @ w)


@pytest.mark.unit
@pytest.mark.parametrize("window", [0, MIB])
@pytest.mark.parametrize("run", [conjugates, negates, marks])
def test_what_is_more_than_numbers_comes_back_as_it_was(run: Callable, window: int) -> None:
    assert all(map(torch.equal, gradients(run, spiller(window)), gradients(run)))


def goes_back_inside(x: Tensor, w: Tensor) -> Tensor:
    """Uses a gradient in its forward: what that asks for is gone when the window is full."""
    (inner,) = torch.autograd.grad(torch.tanh(x @ w).sum(), x, create_graph=True)
    return chain(x, w) + inner


@pytest.mark.unit
@pytest.mark.parametrize("window", [0, 4096, 3 * 4096, MIB])
def test_backward_may_begin_before_all_is_saved(window: int) -> None:
    assert all(map(torch.equal, gradients(goes_back_inside, spiller(window)), gradients(goes_back_inside)))


class WritesIntoSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0].mul_(grad)


@pytest.mark.unit
@pytest.mark.parametrize("window", [0, MIB])
def test_a_backward_that_writes_where_another_has_yet_to_read_is_refused(window: int) -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return WritesIntoSaved.apply(torch.tanh(x @ w))  # the result of tanh is saved by both

    for found, error in ((None, RuntimeError), (spiller(window), RatelError)):
        with pytest.raises(error, match="in.?place"):
            gradients(run, found)
