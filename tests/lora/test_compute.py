"""Adapted linears against plain autograd with the same mask, in every order; and what the orders
cost, against lora.md's table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ratel.errors import RatelError
from ratel.lora.compute import Adapter, Dropout, Frozen, adapted_linear, adapted_linears, choice, graphs, mask_key, ops
from ratel.lora.compute.graphs import BACKWARD, FORWARD, Size
from ratel.lora.compute.masks import keep_mask

pytestmark = pytest.mark.numerics
P = 0.25
ORDERS = ("fused", *(f"{forward}+b1" for forward in FORWARD), *(f"f1+{backward}" for backward in BACKWARD))
CPU = torch.device("cpu")


class Case:
    """Linears that read one x, with adapters; what plain autograd makes of them in fp64."""

    def __init__(self, *, rows: tuple[int, ...] = (3, 7), inputs: int = 24, outputs: tuple[int, ...] = (20,), rank: int = 5,
                 p: float = 0.0, bias: bool = False, first_row: int = 0, dtype: torch.dtype = torch.float32) -> None:
        rng = torch.Generator().manual_seed(inputs + rank)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).double()

        self.x = random(*rows, inputs)
        self.weights = [random(j, inputs) for j in outputs]
        self.biases = [random(j) if bias else None for j in outputs]
        self.a, self.b = [random(rank, inputs) for _ in outputs], [random(j, rank) for j in outputs]
        self.scales = [1.5 + index for index in range(len(outputs))]
        self.dys = [random(*rows, j) for j in outputs]
        self.keys = tuple(mask_key(1, 2, 3, index) for index in range(len(outputs)))
        self.p, self.first_row, self.dtype = p, first_row, dtype

    @property
    def dropout(self) -> Dropout | None:
        return Dropout.of(self.p, self.keys, self.first_row) if self.p else None

    def expected(self, used: tuple[int, ...] | None = None) -> list[Tensor]:
        x, a, b = self._leaves(torch.float64)
        ys = [self._plain(index, x, a[index], b[index]) for index in range(len(a))]
        return self._results(ys, [x, *a, *b], torch.float64, used)

    def found(self, graph: str, used: tuple[int, ...] | None = None) -> list[Tensor]:
        leaves = self._leaves(self.dtype)
        x, a, b = leaves
        return self._results(self._run(leaves, graph), [x, *a, *b], self.dtype, used)

    def found_forward(self) -> tuple[Tensor, ...]:
        return self._run(self._leaves(self.dtype), "fused")

    def _run(self, leaves: tuple[Tensor, list[Tensor], list[Tensor]], graph: str) -> tuple[Tensor, ...]:
        x, a, b = leaves
        bases = [Frozen(weight=w.to(self.dtype), bias=bias if bias is None else bias.to(self.dtype))
                 for w, bias in zip(self.weights, self.biases, strict=True)]
        adapters = [Adapter(a=a[index], b=b[index], scale=scale) for index, scale in enumerate(self.scales)]
        return adapted_linears(x, bases, adapters, self.dropout, graph)

    def _plain(self, index: int, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        into = x
        if self.p:
            flat = x.reshape(-1, x.shape[-1])
            kept = keep_mask(*flat.shape, self.keys[index], self.p, self.first_row)
            into = (flat * kept / (1 - self.p)).view_as(x)
        return F.linear(x, self.weights[index], self.biases[index]) + self.scales[index] * F.linear(F.linear(into, a), b)

    def _leaves(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        fresh = [x.to(dtype).clone().requires_grad_() for x in (self.x, *self.a, *self.b)]
        return fresh[0], fresh[1:1 + len(self.a)], fresh[1 + len(self.a):]

    def _results(self, ys: list[Tensor] | tuple[Tensor, ...], leaves: list[Tensor], dtype: torch.dtype,
                 used: tuple[int, ...] | None) -> list[Tensor]:
        chosen = range(len(ys)) if used is None else used
        grads = torch.autograd.grad([ys[n] for n in chosen], leaves, [self.dys[n].to(dtype) for n in chosen],
                                    allow_unused=True)
        return [*(y.detach() for y in ys), *(grad for grad in grads if grad is not None)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def assert_near(found: list[Tensor], expected: list[Tensor], limit: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape and error(one, other) < limit, (index, error(one, other))


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("graph", ORDERS)
def test_each_order_is_autograds(graph: str, p: float) -> None:
    for case in (Case(p=p), Case(p=p, rank=1, rows=(1,)), Case(p=p, rank=24, rows=(2, 2, 9), bias=True, first_row=11),
                 Case(p=p, inputs=6, outputs=(40,), rank=8, rows=(65,))):
        assert_near(case.found(graph), case.expected())


@pytest.mark.parametrize("graph", ["fused", "f1+b1", "f3+b3"])
@pytest.mark.parametrize("p", [0.0, P])
def test_linears_that_share_an_input(graph: str, p: float) -> None:
    case = Case(p=p, outputs=(20, 8, 8), rank=4, bias=True)
    assert_near(case.found(graph), case.expected())
    without_one = case.expected(used=(0, 2))
    assert len(without_one) == 3 + 1 + 2 * 2, "the second's adapter has no gradient"
    assert_near(case.found(graph, used=(0, 2)), without_one)


@pytest.mark.parametrize("p", [0.0, P])
def test_ranks_may_differ_within_a_group(p: float) -> None:
    case = Case(p=p, outputs=(20, 8), rank=4)
    case.a[1], case.b[1] = torch.randn(7, 24).double(), torch.randn(8, 7).double()
    assert_near(case.found("fused"), case.expected())


def test_a_transposed_weight_is_that_of_a_conv1d() -> None:
    case = Case(p=P, bias=True)
    case.weights = [w.t().contiguous().t() for w in case.weights]
    assert not case.weights[0].is_contiguous()
    for graph in ORDERS:
        assert_near(case.found(graph), case.expected())


def test_at_first_the_output_is_the_base_linears_to_the_bit() -> None:
    case = Case(p=P, bias=True, rows=(5, 33))
    case.b = [torch.zeros_like(b) for b in case.b]
    plain = F.linear(case.x.float(), case.weights[0].float(), case.biases[0].float())
    for graph in ("fused", "f1+b1"):
        assert torch.equal(case.found(graph)[0], plain)


@pytest.mark.parametrize("graph", ["fused", "f1+b1", "f2+b5"])
def test_micro_batches_draw_the_masks_of_the_whole_batch(graph: str) -> None:
    whole, first, second = (Case(p=P, rows=(6, 4)) for _ in range(3))
    for part, rows in ((first, slice(0, 2)), (second, slice(2, 6))):
        part.x, part.dys, part.first_row = whole.x[rows], [dy[rows] for dy in whole.dys], 4 * rows.start
    y, dx, da, db = whole.found(graph)
    parts = [part.found(graph) for part in (first, second)]
    expected = [torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]),
                parts[0][2] + parts[1][2], parts[0][3] + parts[1][3]]
    assert_near([y, dx, da, db], [x.double() for x in expected])


@pytest.mark.parametrize("graph", ["fused", "f1+b1", "f2+b5"])
def test_a_second_run_is_the_first_to_the_bit(graph: str) -> None:
    case = Case(p=P, outputs=(20, 8), rank=4)
    state = torch.get_rng_state()
    found = case.found(graph)
    torch.rand(7)
    assert all(torch.equal(one, other) for one, other in zip(found, case.found(graph), strict=True))
    torch.set_rng_state(state)
    case.found(graph)
    assert torch.equal(torch.get_rng_state(), state), "no generator of the process moves"


@pytest.mark.parametrize("graph", ORDERS)
def test_bf16_rounds_like_plain_pytorch(graph: str) -> None:
    """At most twice the error of peft's order of operations in the same type, against fp64."""
    case = Case(p=P, inputs=96, outputs=(64,), rows=(128,), rank=8, dtype=torch.bfloat16)
    expected = case.expected()
    x, a, b = case._leaves(torch.bfloat16)
    case.weights = [w.bfloat16() for w in case.weights]
    plain = case._results([case._plain(0, x, a[0], b[0]).bfloat16()], [x, *a, *b], torch.bfloat16, None)
    for one, other, reference in zip(case.found(graph), plain, expected, strict=True):
        assert error(one, reference) < max(2 * error(other, reference), 2**-8)


def test_masters_in_fp32_get_gradients_in_fp32() -> None:
    case = Case(dtype=torch.bfloat16)
    x = case.x.bfloat16().requires_grad_()
    a, b = (leaf[0].float().requires_grad_() for leaf in (case.a, case.b))
    y = adapted_linear(x, Frozen(weight=case.weights[0].bfloat16()), Adapter(a=a, b=b, scale=1.5))
    y.backward(case.dys[0].bfloat16())
    assert y.dtype == x.grad.dtype == torch.bfloat16 and a.grad.dtype == b.grad.dtype == torch.float32


def test_what_needs_no_gradient_gets_none_and_a_bias_that_does_gets_its_own() -> None:
    case = Case(bias=True)
    bias = case.biases[0].float().requires_grad_()
    base = Frozen(weight=case.weights[0].float(), bias=bias)
    a, b = (leaf[0].float().requires_grad_() for leaf in (case.a, case.b))
    for graph in ("fused", "f1+b3"):
        a.grad = b.grad = bias.grad = None
        adapted_linear(case.x.float(), base, Adapter(a=a, b=b, scale=1.5), graph=graph).backward(case.dys[0].float())
        assert torch.allclose(bias.grad, case.dys[0].float().sum((0, 1)), atol=1e-5)
        assert base.weight.grad is None and a.grad is not None and b.grad is not None


def test_no_rows_are_no_trouble() -> None:
    case = Case(rows=(0,), p=P, outputs=(4, 4))
    assert [tuple(x.shape) for x in case.found("fused")] == [tuple(x.shape) for x in case.expected()]
    assert all(float(x.abs().sum()) == 0 for x in case.found("fused"))


@pytest.mark.parametrize(("graph", "rank", "more"), [("fused", 1, 3), ("fused", 24, 0), ("f1+b1", 1, 0), ("f2+b4", 24, 0)])
def test_saved_is_x_and_no_mask(graph: str, rank: int, more: int) -> None:
    """``more``: elements of S beside X, of ``fused`` with a small rank."""
    case = Case(inputs=40, rank=rank, rows=(3,), p=P)
    x = case.x.float().requires_grad_()
    a, b = (leaf[0].float().requires_grad_() for leaf in (case.a, case.b))
    weight, saved, dropout = case.weights[0].float(), [], case.dropout
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_linear(x, Frozen(weight=weight), Adapter(a=a, b=b, scale=1.0), dropout, graph)
    known = {t.data_ptr() for t in (x, weight, a, b, dropout.draw)}
    assert {x.data_ptr(), weight.data_ptr()} <= {t.data_ptr() for t in saved}
    assert sum(t.numel() for t in saved if t.data_ptr() not in known) == more


# --- choosing -------------------------------------------------------------------------------------------------------

M, I, J, R = 640, 96, 160, 8
SIZE = Size(rows=M, inputs=I, outputs=J, rank=R)
TABLE: dict[str, int] = {
    "f1": M * (I * J + R * (I + J)), "f3": M * (I * J + R * (I + J)), "f2": I * J * (M + R), "f4": I * J * (M + R),
    "b1": M * (I * J + R * (3 * I + 2 * J)), "b2": M * (2 * I * J + R * (2 * I + J)) + I * J * R,
    "b3": M * (2 * I * J + R * (I + J)) + 2 * I * J * R, "b4": 2 * M * I * J + 3 * I * J * R,
    "b5": M * (I * J + 2 * R * (I + J)) + I * J * R, "b6": M * (2 * I * J + 2 * R * (I + J)) + I * J * R,
    "b7": M * (2 * I * J + R * (I + J)) + 2 * I * J * R, "b8": M * (2 * I * J + R * (I + J)) + 2 * I * J * R}
"""Half the FLOPs: what the orders' products come to on paper (arXiv 2312.03415, table 1)."""


@pytest.mark.parametrize("name", TABLE)
def test_flops_are_those_of_the_table(name: str) -> None:
    assert graphs.flops(name, SIZE) == 2 * TABLE[name]


class _Products(TorchDispatchMode):
    """FLOPs of matrix products; PyTorch's own counter passes over those that write to an
    argument."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0.0, P])
def test_whoever_watches_sees_the_operations_both_ways_and_changes_no_bit(p: float) -> None:
    case = Case(outputs=(20, 12), p=p)
    unwatched = case.found("fused")
    with _Names() as names:
        watched = case.found("fused")
    assert all(torch.equal(one, other) for one, other in zip(watched, unwatched, strict=True))
    own = [name.split(".")[1] for name in names.seen if name.startswith("ratel_lora")]
    assert own[:3] == ["down", "linear", "linear"] and set(own[3:]) == {"down", "up_grads", "a_grads", "input_grad"}
    with torch.no_grad(), _Names() as names:
        case.found_forward()
    assert [name.split(".")[1] for name in names.seen if name.startswith("ratel_lora")] == ["down", "linear", "linear"]


def test_a_run_without_gradients_has_the_bits_of_one_with_them() -> None:
    case = Case(outputs=(20, 12), p=P)
    with torch.no_grad():
        found = case.found_forward()
    assert all(torch.equal(one, other) for one, other in zip(found, case.found_forward(), strict=True))
    assert not any(y.requires_grad for y in found)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_flops_are_those_that_are_done(name: str, drops: bool) -> None:
    case = Case(rows=(M,), inputs=I, outputs=(J,), rank=R, p=P if drops else 0.0)
    given = graphs.Given(x=case.x, w=case.weights[0], bias=None, a=case.a[0], b=case.b[0], scale=1.0,
                         mask=(lambda x: x) if drops else None)
    with torch.no_grad(), _Products() as done:
        FORWARD[name](given) if name in FORWARD else BACKWARD[name].run(given, case.dys[0])
    assert done.flops == graphs.flops(name, Size(**{**vars(SIZE), "drops": drops}))


def test_criteria_leave_merging_out_unless_told() -> None:
    many = Size(rows=8192, inputs=4096, outputs=4096, rank=16)
    assert choice.choose("flops", many, CPU, torch.float32) == ("f1", "b1")
    assert choice.choose("flops-merged", many, CPU, torch.float32) == ("f2", "b5")
    few = Size(rows=8, inputs=4096, outputs=4096, rank=16)
    assert choice.choose("flops-merged", few, CPU, torch.float32) == ("f1", "b1")
    assert choice.choose("bytes", many, CPU, torch.float32) == ("f1", "b1")
    high = Size(rows=8192, inputs=1024, outputs=1024, rank=768)
    assert choice.choose("flops-merged", high, CPU, torch.float32)[1] == "b4"
    assert not any(graphs.merges(name) for names in choice.candidates(False) for name in names)
    assert choice.choose("auto", many, CPU, torch.float32) == ("fused", "fused")
    assert choice.choose("f4+b7", many, CPU, torch.float32) == ("f4", "b7")


def test_time_is_measured_once_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    size, measured = Size(rows=40, inputs=16, outputs=16, rank=2, drops=True, element_bytes=4), []
    monkeypatch.setattr(choice, "LIMIT_S", 1e-4)
    real: Callable[..., dict[str, float]] = choice._measure
    monkeypatch.setattr(choice, "_measure", lambda *args: measured.append(args) or real(*args))
    times = choice.measured(size, CPU, torch.float32)
    assert set(times) == {*FORWARD, *BACKWARD, "fused"} and min(times.values()) > 0
    assert choice.measured(Size(**{**vars(size), "rows": 60}), CPU, torch.float32) == times, "a size rounded to the same"
    assert len(measured) == 1 and measured[0][0].rows == choice.ROWS_STEP
    forward, backward = choice.choose("time", size, CPU, torch.float32)
    assert not graphs.merges(forward) and not graphs.merges(backward)


@pytest.mark.parametrize("graph", ["", "f1", "f9+b1", "f1+b9", "merged", "auto-merged", "f2+b5-merged"])
def test_an_unknown_order_is_refused(graph: str) -> None:
    with pytest.raises(RatelError, match="is not an order for adapters.*f1\\+b1"):
        choice.choose(graph, SIZE, CPU, torch.float32)


def test_kernels_that_are_demanded_where_none_can_be_are_refused() -> None:
    try:
        ops.use_kernels("on")
        with pytest.raises(RatelError, match="kernels.*install the package triton"):
            Case().found("fused")
        with pytest.raises(RatelError, match="auto, on, off"):
            ops.use_kernels("maybe")
    finally:
        ops.use_kernels("auto")
