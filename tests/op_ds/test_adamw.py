"""op_ds against torch, against itself (every instruction set, thread count and cut), and against
bad arguments."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import op_ds

pytestmark = pytest.mark.native

ISAS = ("scalar", "avx2", "avx512")
ADAM = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)


def supports(isa: str) -> bool:
    try:
        op_ds.Pool(1, isa=isa).close()
    except op_ds.UnsupportedIsaError:
        return False
    return True


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if not supports(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture
def pool() -> Iterator[op_ds.Pool]:
    with op_ds.Pool(2) as made:
        yield made


@pytest.fixture
def correctly_rounded_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch leaves fp32 square roots to MKL, which rounds some of them wrongly (docs/optimizer.md);
    numpy does not."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))


class Planes:
    """The four planes of a vector of parameters, and the calls that take them."""

    def __init__(self, pool: op_ds.Pool, weights: torch.Tensor) -> None:
        n = weights.numel()
        self.hi, self.lo = torch.empty(n, dtype=torch.int16), torch.empty(n, dtype=torch.int16)
        self.m, self.v = torch.zeros(n), torch.zeros(n)
        pool.split(weights.data_ptr(), self.hi.data_ptr(), self.lo.data_ptr(), n)

    def update(self, pool: op_ds.Pool, grad: torch.Tensor, step: int, *, begin: int = 0, end: int | None = None,
               decay: float = 0.0, kind: str = "adamw", **options: object) -> None:
        end = grad.numel() if end is None else end
        dtype = "bf16" if grad.dtype == torch.bfloat16 else "fp32"
        addresses = [p[begin:].data_ptr() for p in (self.hi, self.lo, self.m, self.v, grad)]
        settings = {"ranges": [(end - begin, decay)], "grad_dtype": dtype, **ADAM, **options}
        getattr(pool, kind)(*addresses, end - begin, step=step, **settings)

    def master(self, pool: op_ds.Pool) -> torch.Tensor:
        merged = torch.empty_like(self.m)
        pool.merge(self.hi.data_ptr(), self.lo.data_ptr(), merged.data_ptr(), merged.numel())
        return merged

    def tensors(self, pool: op_ds.Pool) -> list[torch.Tensor]:
        return [self.master(pool), self.m, self.v]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


def assert_same_bits(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        wrong = (bits(a) != bits(b)).nonzero().flatten()
        assert len(wrong) == 0, f"tensor {index}: {len(wrong)} of {len(a)} differ, first at {int(wrong[0])}"


def random_grad(n: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=rng) * torch.exp(spread * torch.randn(n, generator=rng))


def adversarial_grad(n: int, seed: int) -> torch.Tensor:
    """Zeros of both signs, denormals, values whose square overflows or underflows, and ordinary
    ones."""
    grad = random_grad(n, seed, spread=10.0)
    for i, value in enumerate((0.0, -0.0, 1e-45, -1e-39, 1e-20, 1.0, -3e38, 2e19)):
        grad[i + seed % 3::17 + 2 * i] = value
    return grad


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


def interesting_bits() -> torch.Tensor:
    """Every upper half with the lower halves around the tie, the ends, and some in between."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1234], dtype=torch.int64)
    patterns = (upper[:, None] + lower).flatten()
    return (patterns - ((patterns >> 31) << 32)).to(torch.int32)


def test_split_and_merge_are_exact_for_every_class_of_bits(isa: str) -> None:
    patterns = interesting_bits()
    n, wide = len(patterns), patterns.to(torch.int64) & 0xffffffff
    hi, lo, back = torch.empty(n, dtype=torch.int16), torch.empty(n, dtype=torch.int16), torch.empty_like(patterns)
    with op_ds.Pool(2, isa=isa) as pool:
        pool.split(patterns.data_ptr(), hi.data_ptr(), lo.data_ptr(), n)
        pool.merge(hi.data_ptr(), lo.data_ptr(), back.data_ptr(), n)
    assert torch.equal(back, patterns)
    assert torch.equal(hi.to(torch.int64) & 0xffff, ((wide + 0x8000) >> 16) & 0xffff)
    rounded = hi.view(torch.bfloat16).float()
    exact = patterns.view(torch.float32)
    finite = torch.isfinite(exact) & torch.isfinite(rounded)
    error = (rounded.double() - exact.double()).abs()[finite]
    nearest = (exact.bfloat16().double() - exact.double()).abs()[finite]
    assert torch.equal(error, nearest)  # half up picks another neighbour on ties only


def pairwise(values: np.ndarray) -> np.ndarray:
    """Adds neighbours along the last axis until one is left; the definition in
    docs/optimizer.md."""
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]


def defined_sum_squares(grad: torch.Tensor) -> float:
    x = grad.double().numpy()
    x = np.concatenate([x, np.zeros(-len(x) % 1024)]).reshape(-1, 32, 32)
    lanes = np.zeros((len(x), 32))
    for row in range(32):
        lanes += x[:, row] * x[:, row]
    return float(pairwise(pairwise(lanes)))


@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
def test_sum_squares_is_its_definition_for_any_threads(isa: str, grad_type: torch.dtype) -> None:
    dtype = "bf16" if grad_type == torch.bfloat16 else "fp32"
    for n in (1, 31, 1023, 1024, 1025, 65_536, 200_003):
        grad = random_grad(n, n).to(grad_type)
        wanted = defined_sum_squares(grad)
        assert wanted == pytest.approx(grad.double().square().sum().item(), rel=1e-12)
        for num_threads in (1, 3):
            with op_ds.Pool(num_threads, isa=isa) as pool:
                assert pool.sum_squares(grad.data_ptr(), n, dtype) == (wanted, 0)


@pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
def test_sum_squares_counts_what_is_not_finite(isa: str, grad_type: torch.dtype) -> None:
    grad = torch.full((150_001,), 3e38).to(grad_type)
    dtype = "bf16" if grad_type == torch.bfloat16 else "fp32"
    with op_ds.Pool(2, isa=isa) as pool:
        total, count = pool.sum_squares(grad.data_ptr(), len(grad), dtype)
        assert count == 0 and total == pytest.approx(len(grad) * float(grad[0]) ** 2)
        grad[[0, 77_777, 150_000]] = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=grad_type)
        total, count = pool.sum_squares(grad.data_ptr(), len(grad), dtype)
        assert count == 3 and not np.isfinite(total)
    assert op_ds.Pool(1).sum_squares(0, 0, dtype) == (0.0, 0)


def test_memory_helpers(pool: op_ds.Pool) -> None:
    rng = np.random.default_rng(0)
    for n in (0, 1, 63, 64, 4097, 1_000_003):
        source = rng.integers(0, 256, n + 7, dtype=np.uint8)
        target = np.full(n + 7, 9, dtype=np.uint8)
        pool.copy(target.ctypes.data + 3, source.ctypes.data + 5, n)
        assert (target[3:n + 3] == source[5:n + 5]).all() and (target[:3] == 9).all() and (target[n + 3:] == 9).all()
        pool.fill(target.ctypes.data + 1, n, 7)
        assert (target[1:n + 1] == 7).all() and target[0] == 9 and (target[n + 3:] == 9).all()
    fresh = np.zeros(10_000_019, dtype=np.uint8)
    pool.touch(fresh.ctypes.data, len(fresh))
    assert not fresh.any()
    pool.touch(target.ctypes.data, len(target))
    assert (target[1:n + 1] == 7).all() and target[0] == 9 and (target[n + 3:] == 9).all()  # what is there stays
    a, b, c = (torch.randn(100_003) for _ in range(3))
    pool.triad(a[1:].data_ptr(), b.data_ptr(), c.data_ptr(), 0.5, 100_001)
    assert torch.equal(a[1:100_002], b[:100_001] + 0.5 * c[:100_001])
    pool.rescale(b.data_ptr(), 2.0, 50_000)
    assert not torch.equal(b, c) and pool.sum_squares(b.data_ptr(), 3, "fp32")[0] > 0


def test_calls_from_several_threads_do_not_mix(pool: op_ds.Pool) -> None:
    n = 50_000
    weights = [torch.randn(n, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    shared = [Planes(pool, w) for w in weights]

    def train(index: int) -> None:
        for step in range(1, 8):
            shared[index].update(pool, random_grad(n, 100 * index + step), step)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, planes in enumerate(shared):
        alone = Planes(pool, weights[index])
        for step in range(1, 8):
            alone.update(pool, random_grad(n, 100 * index + step), step)
        assert_same_bits(planes.tensors(pool), alone.tensors(pool))


def page_aligned(n: int, dtype: torch.dtype) -> torch.Tensor:
    raw = torch.zeros(n * dtype.itemsize + 4096, dtype=torch.uint8)
    return raw[-raw.data_ptr() % 4096 :][: n * dtype.itemsize].view(dtype)


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
