"""Kernels bound to their sizes: Triton is asked once for each kind of addresses, and a launch past
it hands the compiled kernel what Triton would have handed it.

Triton is played by a module that writes down how it was called, so that no GPU is needed.
"""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.numerics
NAME = "ratel.lora.compute.bound"


class Kernel:
    """A compiled one is called with grid, stream, function, metadata, three hooks, and all
    arguments."""

    def __init__(self) -> None:
        self.through_triton: list[tuple[Any, ...]] = []
        self.past_it: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            self.through_triton.append((grid, given, named))
            return SimpleNamespace(run=lambda *all_given: self.past_it.append(all_given), function=7, packed_metadata="metadata")

        return run


class Descriptor:
    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> None:
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape


@pytest.fixture
def bound(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    fake, tools, descriptors = ModuleType("triton"), ModuleType("triton.tools"), ModuleType("triton.tools.tensor_descriptor")
    fake.__version__ = getattr(request, "param", "3.6.0")
    fake.runtime = SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 99)))
    descriptors.TensorDescriptor = Descriptor
    for module in (fake, tools, descriptors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def aligned(*shape: int) -> Tensor:
    found = torch.zeros(*shape)
    assert found.data_ptr() % 16 == 0
    return found


def given_to(kernel: Kernel) -> tuple[Any, ...]:
    """The grid and the arguments of the last launch past Triton."""
    last = kernel.past_it[-1]
    assert last[3:9] == (99, 7, "metadata", None, None, None)
    return last[:3], last[9:]


@pytest.mark.parametrize(("bound", "tail"), [("3.2.0", ()), ("3.3.1", (16, 64)), ("3.7.0", (16, 64))], indirect=["bound"])
def test_the_second_launch_hands_over_what_triton_would(bound: ModuleType, tail: tuple[int, ...]) -> None:
    kernel, tensors, others = Kernel(), (aligned(8), aligned(4)), (aligned(8), aligned(4))
    one = bound.Bound(kernel, (3, 2), (5, 0.5), constants=dict(R=16, BM=64), num_warps=4)
    one(tensors, (10, -3))
    assert kernel.through_triton == [((3, 2, 1), (*tensors, 5, 0.5, 10, -3), {"R": 16, "BM": 64, "num_warps": 4})]
    one(others, (11, 4))
    assert len(kernel.through_triton) == 1
    assert given_to(kernel) == ((3, 2, 1), (*(t.data_ptr() for t in others), 5, 0.5, 11, 4, *tail))


def test_what_a_kernel_is_specialised_on_is_asked_for_anew(bound: ModuleType) -> None:
    kernel, x, wide = Kernel(), aligned(8), aligned(9)
    one = bound.Bound(kernel, (1,), (), constants={})
    for tensors, first_row in (((x, wide), 0), ((x, wide[1:]), 0), ((wide[1:], x), 0), ((x, wide), 2**31), ((x, wide), -2**31 - 1)):
        before = len(kernel.through_triton)
        one(tensors, (first_row,))
        is_new = first_row != -2**31 - 1  # as wide as the one before
        assert len(kernel.through_triton) == before + is_new, (tensors, first_row)
        one(tensors, (first_row,))
        assert len(kernel.through_triton) == before + is_new


def test_descriptors_are_those_that_were_checked_with_other_tensors(bound: ModuleType) -> None:
    kernel, first, second = Kernel(), (aligned(4, 8), None, aligned(2)), (aligned(4, 8), None, aligned(2))
    one = bound.Bound(kernel, (1,), (3,), (((4, 8), (8, 1), (2, 4)), None), constants={"R": 16})
    one(first)
    made, nothing, *rest = kernel.through_triton[0][1]
    assert made.base is first[0] and nothing is None and rest == [first[2], 3]
    one(second)
    _, (described, nothing, *rest) = given_to(kernel)
    assert type(described) is Descriptor and vars(described) == {**vars(made), "base": second[0]}
    assert nothing is None and rest == [second[2].data_ptr(), 3, 16]
    assert all(fields is None or fields["base"] is None for fields in one._descriptors), "no tensor is held"


@pytest.mark.parametrize("bound", ["3.1.0", "3.8.0", "4.0.0"], indirect=True)
def test_unknown_versions_of_triton_launch_everything_themselves(bound: ModuleType) -> None:
    kernel = Kernel()
    one = bound.Bound(kernel, (1,), (), constants={})
    for _ in range(3):
        one((aligned(4),))
    assert len(kernel.through_triton) == 3 and not kernel.past_it
