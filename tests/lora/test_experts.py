"""Weights with adapters as modules read them: the plain formula and autograd's gradients, whatever a
module does to a weight; nothing large kept; errors where an adapter would get nothing."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ratel.errors import RatelError
from ratel.lora.compute import Draws, adapt_layers
from ratel.lora.compute.experts import AdaptedWeight
from ratel.lora.describe.layers import PARAMETER, AdaptedLayer
from ratel.runtime.blocks.kinds import kind_of
from ratel.runtime.blocks.op_trace import trace

pytestmark = pytest.mark.numerics
E, O, I, R, S = 3, 8, 12, 2, 9  # noqa: E741
"""Experts, outputs, inputs, rank, rows."""


def layer_of(*, is_stack: bool = True, outputs_last: bool = False) -> AdaptedLayer:
    return AdaptedLayer(name="m", parameter="w", kind=PARAMETER, in_features=I, out_features=O, experts=E if is_stack else 1,
                        is_transposed=outputs_last, is_stack=is_stack, rank=R, alpha=3.0, scale=1.5, dropout=0.0,
                        has_magnitude=False, file_name="m")


class Uses(nn.Module):
    """A module that does one thing to its weight."""

    def __init__(self, shape: tuple[int, ...], use: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype))
        self.use, self.last = use, 5

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.w, x)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def adapted(root: nn.Module, layer: AdaptedLayer) -> nn.Module:
    tensors = {f"{layer.key}_lora_A": random(*layer.a_shape), f"{layer.key}_lora_B": random(*layer.b_shape)}
    return adapt_layers(root, [layer], tensors, draws=Draws(seed=0))[layer.key]


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """As transformers computes where PyTorch has no such product; the second expert has no rows."""
    import transformers.integrations.moe  # noqa: F401

    return torch.ops.transformers.grouped_mm_fallback(x, w, offs=torch.tensor([4, 4, 9], dtype=torch.int32))


STACKED: dict[str, tuple[bool, Callable[..., Tensor], tuple[int, ...]]] = {
    "linear of one": (False, lambda w, x: F.linear(x, w[1]), (S, I)),
    "linear of one by a tensor": (False, lambda w, x: F.linear(input=x, weight=w[torch.tensor(2)]), (S, I)),
    "linear of one with a bias": (False, lambda w, x: F.linear(x, w[0], torch.ones(O, dtype=x.dtype)), (S, I)),
    "product of one": (True, lambda w, x: x @ w[2], (S, I)), "mm of one": (True, lambda w, x: torch.mm(x, w[1]), (S, I)),
    "transposed one": (False, lambda w, x: x @ w[2].t() + x.matmul(w[0].T) + x @ w[1].transpose(0, 1), (S, I)),
    "all in turn": (False, lambda w, x: sum(F.linear(x, one) * n for n, one in enumerate(w, 1)), (S, I)),
    "one from the left": (False, lambda w, x: w[1] @ x, (I, S)),
    "batched": (True, lambda w, x: torch.bmm(x, w), (E, S, I)),
    "batched left": (False, lambda w, x: torch.bmm(w, x), (E, I, S)),
    "for each row": (False, lambda w, x: torch.bmm(w[torch.arange(S) % E], x.unsqueeze(-1)).squeeze(-1), (S, I)),
    "broadcast": (True, lambda w, x: torch.matmul(x, w), (S, I)), "some": (True, lambda w, x: torch.matmul(x, w[1:]), (S, I)),
    "mT": (False, lambda w, x: x @ w.mT, (E, S, I)),
    "einsum": (False, lambda w, x: torch.einsum("si,eoi->seo", x, w), (S, I)),
    "sum": (False, lambda w, x: F.linear(x, (w * 2 + w).sum(0) - w[0, :, :] / 3), (S, I)),
    "reshaped": (False, lambda w, x: F.linear(x, w.reshape(E * O, I)), (S, I)),
    "chunks of one": (True, lambda w, x: x @ w[0].chunk(2, -1)[1] + x @ w[0][:, :O // 2], (S, I)),
    "moved": (True, lambda w, x: x @ w.to(x.dtype).contiguous()[0] + x @ w.permute(0, 2, 1)[0].T, (S, I)),
    "asked": (True, lambda w, x: x @ w[0] * w.shape[0] * w.size(1) * len(w) + float(w.requires_grad), (S, I)),
    "grouped": (True, lambda w, x: grouped(x, w), (S, I)),
    "grouped transposed": (False, lambda w, x: grouped(x, w.transpose(-2, -1)), (S, I)),
}
MATRIX: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "linear": (lambda w, x: F.linear(x, w), (2, S, I)),
    "product": (lambda w, x: x @ w.t(), (S, I)), "one row": (lambda w, x: x @ w.t(), (I,)),
    "wide": (lambda w, x: F.linear(x.double(), w.type(torch.float64)), (S, I)),
    "elementwise": (lambda w, x: (w * x[0] + 1).sum(1), (S, I)),
    "rows": (lambda w, x: x @ w[2:5].t(), (S, I)), "normalised": (lambda w, x: F.linear(x, F.normalize(w, dim=1)), (S, I))}


def check(root: nn.Module, layer: AdaptedLayer, x: Tensor) -> None:
    """Against the same module with the sum for its weight."""
    plain, module = root.m, adapted(root, layer)
    a, b, w = module.w_lora_A, module.w_lora_B, plain._parameters["w"]
    x.requires_grad_()
    y = root.m(x)
    dy = random(*y.shape)
    found = [y, *torch.autograd.grad(y, [x, a, b], dy)]
    if layer.is_stack:
        added = torch.einsum("ore,eri->eoi", b.view(O, R, E), a.view(E, R, I))
        added = added.mT if layer.is_transposed else added
    else:
        added = b @ a
    plain_y = plain.use(w + layer.scale * added, x)
    for one, other in zip(found, [plain_y, *torch.autograd.grad(plain_y, [x, a, b], dy)], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", STACKED)
def test_experts_against_the_plain_formula(case: str) -> None:
    outputs_last, use, shape = STACKED[case]
    root = nn.Module()
    root.m = Uses((E, I, O) if outputs_last else (E, O, I), use)
    check(root, layer_of(outputs_last=outputs_last), random(*shape))


@pytest.mark.parametrize("case", MATRIX)
def test_matrices_against_the_plain_formula(case: str) -> None:
    use, shape = MATRIX[case]
    root = nn.Module()
    root.m = Uses((O, I), use)
    check(root, layer_of(is_stack=False), random(*shape))


def test_a_weight_read_past_autograd_is_an_error() -> None:
    """Some functions compute gradients by themselves: the adapter would silently get none."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
            return x @ w.t()

    root = nn.Module()
    root.m = Uses((O, I), lambda w, x: Own.apply(x, w))
    adapted(root, layer_of(is_stack=False))
    with pytest.raises(RatelError, match=r"no gradients are followed.*given: w\).*Leave the parameter out"):
        root.m(random(S, I))
    with torch.no_grad():
        assert root.m(random(S, I)).shape == (S, O), "a run without gradients needs none"
    root.m.use = lambda w, x: x @ w.detach().t()
    assert not root.m(random(S, I)).requires_grad, "what a module itself takes no gradients of"


def test_its_memory_is_not_to_be_had() -> None:
    """A kernel that takes addresses would compute without the adapter."""
    root = nn.Module()
    root.m = Uses((O, I), lambda w, x: x * (w.data_ptr() % 16))
    adapted(root, layer_of(is_stack=False))
    assert isinstance(root.m.w, AdaptedWeight) and not hasattr(root.m.w, "__array__")
    assert root.m(random(S, I)).shape == (S, I), "on a CPU transformers asks for its alignment"
    with pytest.raises(TypeError, match="w has an adapter: a kernel"):
        root.to("meta").m(random(S, I))


def _by_expert(w: Tensor, x: Tensor) -> Tensor:
    return torch.cat([F.linear(part, w[n]) for n, part in enumerate(x.chunk(E))])


class Mixed(nn.Module):
    """Rows by expert, one expert after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.m = Uses((E, O, I), _by_expert, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


def put_on(root: nn.Module) -> nn.Module:
    layer = layer_of()
    tensors = {f"m.w_lora_{which}": random(*shape).float() for which, shape in (("A", layer.a_shape), ("B", layer.b_shape))}
    return adapt_layers(root, [layer], tensors, draws=Draws(seed=0))["m.w"]


def test_no_copy_of_the_experts_is_kept_for_backward() -> None:
    root = Mixed()
    module, x, kept = put_on(root), random(S, I).float().requires_grad_(), {}
    with saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t):
        root(x)
    w = module._parameters["w"]
    assert kept.pop(w.untyped_storage().data_ptr()) is not None, "the base's own memory is referred to"
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) < w.nbytes


def test_gradients_of_a_stack_are_put_together_once() -> None:
    """An index for each expert fills a gradient of the whole size, for each expert."""
    root = Mixed()
    put_on(root)
    pending, seen = [root(random(S, I).float()).grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    names = [node.name() for node in seen]
    assert names.count("UnbindBackward0") == 2 and "SelectBackward0" not in names
    assert not [name for name in vars(root.m) if "weights" in name], "nothing is kept after a run"


def test_a_second_run_does_what_the_first_did_and_follows_swapped_values() -> None:
    root = Mixed()
    module, x = put_on(root), random(S, I).float()
    (first, one), (second, other) = (trace(lambda: root(x), root, keep_graph=True) for _ in range(2))
    assert torch.equal(first, second) and one.is_like(other)
    with torch.no_grad():
        assert torch.equal(root(x), first)
        module._parameters["w"].data = 2 * module._parameters["w"].data
        module.w_lora_A.data = 2 * module.w_lora_A.data
        torch.testing.assert_close(root(x), 2 * first)
        for parameter in module.parameters():
            parameter.data = parameter.data.clone().zero_()
        assert not root(x).any()


def test_the_models_own_module_is_as_it_was() -> None:
    root = Mixed()
    own, w = root.m, root.m.w
    module = put_on(root)
    assert root.m is module is not own and type(own) is Uses and isinstance(module, Uses)
    assert dict(root.named_parameters())["m.w"] is w and not w.requires_grad and module.last == own.last
    assert dict(own.named_parameters()).keys() == {"w"} and "w_lora_A" in dict(module.named_parameters())
    root.m = own
    assert root(random(S, I).float()).shape == (S, O) and own.w is w


def test_blocks_alike_are_equal_and_copies_work() -> None:
    one, other = Mixed(), Mixed()
    put_on(one), put_on(other)
    one.m.use = other.m.use = None
    assert kind_of(one) == kind_of(other)
    other.m.w_lora_scale = 7.0
    assert kind_of(one) != kind_of(other)
    root, x = Mixed(), random(S, I).float()
    put_on(root)
    copied = copy.deepcopy(root)
    assert torch.equal(copied(x), root(x)) and copied.m is not root.m


def test_tensors_of_another_layer_are_refused() -> None:
    layer = layer_of()
    for which, shape, said in (("A", (E * R, O), r"\[6, 8\].* has \[6, 12\]"), ("B", (O, R), r"\[8, 2\].* has \[8, 6\]")):
        tensors = {"m.w_lora_A": torch.zeros(layer.a_shape), "m.w_lora_B": torch.zeros(layer.b_shape)}
        tensors[f"m.w_lora_{which}"] = torch.zeros(shape)
        with pytest.raises(RatelError, match=rf"{said}.*given: m\.w_lora_{which}"):
            adapt_layers(Mixed(), [layer], tensors, draws=Draws(seed=0))
    with pytest.raises(RatelError, match=r"\[3, 8, 12\].* has \[3, 12, 8\].*given: m\.w\)"):
        tensors = {"m.w_lora_A": torch.zeros(layer.a_shape), "m.w_lora_B": torch.zeros(layer.b_shape)}
        adapt_layers(Mixed(), [layer_of(outputs_last=True)], tensors, draws=Draws(seed=0))
