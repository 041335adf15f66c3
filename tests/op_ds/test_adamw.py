"""op_ds against torch, against itself (every instruction set, thread count and cut), and against
bad arguments."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import op_ds

from tests.support.adamw import ADAM, Planes, adversarial_grad, assert_same_bits, bits, page_aligned, random_grad
from tests.support.adamw import isa, pool  # noqa: F401

pytestmark = pytest.mark.native


@pytest.fixture
def correctly_rounded_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch leaves fp32 square roots to MKL, which rounds some of them wrongly (docs/optimizer.md);
    numpy does not."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))


def torch_states(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> list[torch.Tensor]:
    state = optimizer.state[param]
    return [param.detach(), state["exp_avg"], state["exp_avg_sq"]]


def make_torch(kind: str, weights: torch.Tensor, decay: float, betas: tuple[float, float], fused: bool = False,
               ) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    param = torch.nn.Parameter(weights.clone())
    cls = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return param, cls([param], lr=ADAM["lr"], betas=betas, eps=ADAM["eps"], weight_decay=decay, foreach=False,
                      fused=fused)


needs_torch_with_fma = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's own kernels use no fused multiply-add on this processor, so its result is another one")


@needs_torch_with_fma
@pytest.mark.parametrize(("kind", "decay", "beta1"), [
    ("adamw", 0.0, 0.9), ("adamw", 0.1, 0.9), ("adamw", 0.1, 0.3), ("adam", 0.0, 0.9), ("adam", 0.05, 0.9)])
@pytest.mark.parametrize("make_grad", [random_grad, adversarial_grad])
@pytest.mark.usefixtures("correctly_rounded_sqrt")
def test_equals_torch_bitwise(isa: str, kind: str, decay: float, beta1: float,
                              make_grad: Callable[[int, int], torch.Tensor]) -> None:
    weights = torch.randn(10_007, generator=torch.Generator().manual_seed(0))
    weights[::100] = 1e-41
    param, optimizer = make_torch(kind, weights, decay, (beta1, 0.999))
    with op_ds.Pool(2, isa=isa) as pool:
        planes = Planes(pool, weights)
        for step in range(1, 26):
            grad = make_grad(len(weights), step)
            param.grad = grad.clone()
            optimizer.step()
            planes.update(pool, grad, step, decay=decay, kind=kind, beta1=beta1)
            assert_same_bits(planes.tensors(pool), torch_states(optimizer, param))
    assert torch.isfinite(planes.m).all()


@needs_torch_with_fma
def test_torch_square_root_is_the_only_difference(pool: op_ds.Pool) -> None:
    weights = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    param, optimizer = make_torch("adamw", weights, 0.1, (0.9, 0.999))
    planes = Planes(pool, weights)
    for step in range(1, 21):
        before = param.detach().clone()
        bits_before = bits(before)
        pool.split(before.data_ptr(), planes.hi.data_ptr(), planes.lo.data_ptr(), len(before))
        param.grad = random_grad(len(weights), step)
        optimizer.step()
        planes.update(pool, param.grad, step, decay=0.1)
        master, m, v = planes.tensors(pool)
        assert_same_bits([m, v], torch_states(optimizer, param)[1:])
        # An ulp of the root is at most 2^-23 of the step, and may round the weight to its
        # neighbour.
        ulp = torch.from_numpy(np.spacing(before.abs().numpy()))
        allowed = ulp * 2 + (param.detach() - before).abs() * 2**-22
        assert ((master - param.detach()).abs() <= allowed).all()
        assert (bits(master) != bits_before).any()


@needs_torch_with_fma
@pytest.mark.parametrize(("kind", "decay", "beta1"), [
    ("adamw", 0.0, 0.9), ("adamw", 0.1, 0.9), ("adamw", 0.1, 0.3), ("adam", 0.05, 0.9)])
@pytest.mark.parametrize("make_grad", [random_grad, adversarial_grad])
def test_equals_torch_fused_bitwise(pool: op_ds.Pool, kind: str, decay: float, beta1: float,
                                    make_grad: Callable[[int, int], torch.Tensor]) -> None:
    """As torch is. Only the last elements, which do not fill a vector, go through other code in
    torch."""
    n, num_whole = 10_007, 10_000
    weights = torch.randn(n, generator=torch.Generator().manual_seed(0))
    param, optimizer = make_torch(kind, weights, decay, (beta1, 0.999), fused=True)
    planes = Planes(pool, weights)
    for step in range(1, 26):
        param.grad = make_grad(n, step)
        optimizer.step()
        planes.update(pool, param.grad, step, decay=decay, kind=kind, beta1=beta1)
        ours, theirs = planes.tensors(pool), torch_states(optimizer, param)
        assert_same_bits([x[:num_whole] for x in ours], [x[:num_whole] for x in theirs])
        torch.testing.assert_close([x[num_whole:] for x in ours], [x[num_whole:] for x in theirs], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
def test_no_result_depends_on_isa_threads_or_size(isa: str, grad_type: torch.dtype) -> None:
    with op_ds.Pool(1, isa="scalar") as reference, op_ds.Pool(1, isa=isa) as one, op_ds.Pool(5, isa=isa) as five:
        for n in (0, 1, 2, 15, 16, 17, 31, 33, 1000, 16383, 16385, 100_003):
            weights = torch.randn(n, generator=torch.Generator().manual_seed(n))
            sets = [(p, Planes(p, weights)) for p in (reference, one, five)]
            for step in range(1, 4):
                grad = adversarial_grad(n, step).clamp(-1e30, 1e30).to(grad_type)
                for pool, planes in sets:
                    planes.update(pool, grad, step, decay=0.1, grad_scale=0.37)
            for pool, planes in sets[1:]:
                assert_same_bits(planes.tensors(pool), sets[0][1].tensors(reference))


def test_cuts_at_any_element_change_nothing(isa: str) -> None:
    n, weights = 40_001, torch.randn(40_001, generator=torch.Generator().manual_seed(1))
    with op_ds.Pool(2, isa=isa) as pool:
        whole, cut = Planes(pool, weights), Planes(pool, weights)
        for step in range(1, 4):
            grad = random_grad(n, step).bfloat16()
            whole.update(pool, grad, step, decay=0.1)
            for begin, end in ((0, 1), (1, 20), (20, 4096), (4096, 33_333), (33_333, n)):
                cut.update(pool, grad, step, begin=begin, end=end, decay=0.1)
        assert_same_bits(cut.tensors(pool), whole.tensors(pool))


def test_each_range_gets_its_own_decay(isa: str) -> None:
    n, weights = 40_000, torch.randn(40_000, generator=torch.Generator().manual_seed(1))
    ranges = [(5, 0.3), (5, 0.9), (16_390, 0.0), (16_400, 0.2), (n, 0.1)]
    with op_ds.Pool(2, isa=isa) as pool:
        together, apart = Planes(pool, weights), Planes(pool, weights)
        for step in range(1, 4):
            grad, begin = random_grad(n, step), 0
            together.update(pool, grad, step, ranges=ranges)
            for end, decay in ranges:
                apart.update(pool, grad, step, begin=begin, end=end, decay=decay)
                begin = end
        assert_same_bits(together.tensors(pool), apart.tensors(pool))
        assert (together.master(pool) != Planes(pool, weights).master(pool)).any()


def test_no_decay_leaves_an_infinite_weight_out_of_the_gradient(isa: str) -> None:
    with op_ds.Pool(1, isa=isa) as pool:
        planes = Planes(pool, torch.full((20,), float("inf")))
        planes.update(pool, torch.ones(20), 1, kind="adam")
        assert torch.isfinite(planes.m).all()
        planes.update(pool, torch.ones(20), 2, kind="adam", decay=0.1)
        assert not torch.isfinite(planes.m).any()


def test_bf16_gradients_and_scale_equal_their_fp32_values(isa: str) -> None:
    n, weights = 5_003, torch.randn(5_003, generator=torch.Generator().manual_seed(1))
    with op_ds.Pool(2, isa=isa) as pool:
        narrow, wide = Planes(pool, weights), Planes(pool, weights)
        for step in range(1, 4):
            grad = random_grad(n, step).bfloat16()
            narrow.update(pool, grad, step, grad_scale=0.3)
            wide.update(pool, grad.float() * torch.tensor(0.3), step)
        assert_same_bits(narrow.tensors(pool), wide.tensors(pool))


def test_flush_to_zero_of_the_caller_does_not_reach_the_result(pool: op_ds.Pool) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        grad = torch.full((40_000,), 2e-38)  # normal; a tenth of it, the moment, is not
        flushed = Planes(pool, torch.zeros_like(grad))
        flushed.update(pool, grad, 1)
    finally:
        torch.set_flush_denormal(False)
    plain = Planes(pool, torch.zeros_like(grad))
    plain.update(pool, grad, 1)
    assert_same_bits(flushed.tensors(pool), plain.tensors(pool))
    assert (bits(plain.m) != 0).all()


@pytest.mark.parametrize("skew", [0, 1, 16], ids=["whole lines", "no line begins there", "half a line"])
@pytest.mark.parametrize("elsewhere", ["all", "hi", "none"])
def test_the_result_goes_elsewhere_and_what_was_read_stays(isa: str, elsewhere: str, skew: int) -> None:
    """Whether stores pass the caches (all planes elsewhere, at whole lines) or not; cuts and ranges
    begin anywhere."""
    n, cut, weights = 50_003, 1_237, torch.randn(50_003, generator=torch.Generator().manual_seed(5))
    ranges = [(777, 0.1), (40_000, 0.0), (n, 0.2)]
    with op_ds.Pool(3, isa=isa) as pool:
        inside, source = Planes(pool, weights), Planes(pool, weights)
        for step in (1, 2, 3):
            grad = random_grad(n, step).to(torch.bfloat16)
            inside.update(pool, grad, step, ranges=ranges, grad_scale=0.3)
            planes = [source.hi, source.lo, source.m, source.v]
            moved = {"all": 4, "hi": 1, "none": 0}[elsewhere]
            targets = [page_aligned(n + skew, p.dtype)[skew:] if i < moved else p for i, p in enumerate(planes)]
            before = [p.clone() for p in planes]
            for begin, end in ((0, cut), (cut, n)):
                addresses = [[p[begin:].data_ptr() for p in side] for side in (planes, targets)]
                parts = [(min(stop, end) - begin, decay) for stop, decay in ranges if stop > begin]
                parts = parts[: next(i for i, (stop, _) in enumerate(parts) if stop == end - begin) + 1]
                pool.adamw(*addresses[0], grad[begin:].data_ptr(), end - begin, to=tuple(addresses[1]), step=step,
                           grad_dtype="bf16", grad_scale=0.3, ranges=parts, **ADAM)
            assert all(torch.equal(p, b) for p, b, t in zip(planes, before, targets) if t is not p)
            source.hi, source.lo, source.m, source.v = targets
        assert_same_bits(source.tensors(pool), inside.tensors(pool))


def test_targets_that_overlap_what_is_read_are_refused(pool: op_ds.Pool) -> None:
    planes, grad = Planes(pool, torch.randn(64)), torch.zeros(64)
    addresses = [p.data_ptr() for p in (planes.hi, planes.lo, planes.m, planes.v)]
    with pytest.raises(ValueError, match="same or not overlap"):
        pool.adamw(*addresses, grad.data_ptr(), 64, grad_dtype="fp32", step=1, to=(addresses[0] + 2, *addresses[1:]), **ADAM)
