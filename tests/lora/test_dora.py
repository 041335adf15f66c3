"""DoRA: peft's order of operations with our masks, plain autograd, lengths in parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratel.lora.compute import Adapter, Draws, Frozen, adapt_layers, dora, mask_key
from ratel.lora.compute.masks import keep_mask
from ratel.lora.describe.outline import outline_of
from ratel.lora.describe.peft_config import of_object
from ratel.lora.describe.targets import resolve
from tests.support.lora import peft_model

pytestmark = pytest.mark.numerics
P = 0.3


class OurMask(nn.Module):
    """Dropout of peft's with the elements that ours keeps."""

    def __init__(self, key: int, first_row: int) -> None:
        super().__init__()
        self.key, self.first_row = key, first_row

    def forward(self, x: Tensor) -> Tensor:
        kept = keep_mask(x.numel() // x.shape[-1], x.shape[-1], self.key, P, self.first_row)
        return x * kept.view(x.shape) / (1 - P)


class Root(nn.Module):
    def __init__(self, is_conv1d: bool) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.fc = Conv1D(10, 12) if is_conv1d else nn.Linear(12, 10)
        with torch.no_grad():
            self.fc.weight.normal_(std=0.3)
            self.fc.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-13), (torch.float32, 1e-6)))
@pytest.mark.parametrize("p", (0.0, P))
@pytest.mark.parametrize("is_conv1d", (False, True))
def test_what_peft_computes(is_conv1d: bool, p: float, dtype: torch.dtype, tolerance: float) -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    given = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["fc"], use_dora=True, lora_dropout=p, use_rslora=True)
    ours, theirs = Root(is_conv1d).to(dtype), peft_model(Root(is_conv1d).to(dtype), given).train()
    layer, = resolve(of_object(given), outline_of(ours)).layers
    rng = torch.Generator().manual_seed(1)
    a, b, m = (torch.randn(shape, generator=rng, dtype=dtype) for shape in ((3, 12), (10, 3), (10,)))
    m = m.abs() + 0.5
    inner = theirs.base_model.model.fc
    expected_leaves = [getattr(inner, name)["default"].weight for name in ("lora_A", "lora_B", "lora_magnitude_vector")]
    for parameter, values in zip(expected_leaves, (a, b, m), strict=True):
        parameter.data.copy_(values)
    if p:
        inner.lora_dropout["default"] = OurMask(mask_key(7, 4, "block", "fc"), 14)
    draws = Draws(seed=7)
    tensors = {"fc.lora_A": a, "fc.lora_B": b, "fc.lora_magnitude": m}
    made = adapt_layers(ours, [layer], tensors, draws=draws, stage="block")["fc"]
    draws.begin(4, 14)
    x, dy = torch.randn(2, 7, 12, generator=rng, dtype=dtype), torch.randn(2, 7, 10, generator=rng, dtype=dtype)
    runs = []
    for model, leaves in ((ours, [made.lora_A, made.lora_B, made.lora_magnitude]), (theirs, expected_leaves)):
        own = x.clone().requires_grad_()
        y = model(own)
        runs.append([y, *torch.autograd.grad(y, [own, *leaves], dy)])
    for one, other in zip(*runs, strict=True):
        assert one.shape == other.shape and float((one - other).norm()) < tolerance * float(other.norm())
    if p:
        draws.begin(5, 14)
        assert not torch.equal(ours(x), runs[0][0]), "another step draws another mask"
        ours.eval()
        torch.testing.assert_close(ours(x), _plain(x, ours.fc, a, b, m, layer.scale, is_conv1d))


def _plain(x: Tensor, fc: nn.Module, a: Tensor, b: Tensor, m: Tensor, scale: float, is_conv1d: bool) -> Tensor:
    whole = (fc.weight.t() if is_conv1d else fc.weight) + scale * b @ a
    return F.linear(x, whole * (m / whole.norm(dim=1))[:, None], fc.bias)


def test_lengths_of_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    w, a, b = torch.randn(11, 7).bfloat16(), torch.randn(2, 7), torch.randn(11, 2)
    expected = torch.linalg.norm(w.float() + 0.5 * (b @ a), dim=1)
    assert torch.equal(dora.lengths(w, a, b, 0.5), expected)
    monkeypatch.setattr(dora, "CHUNK_ELEMENTS", 3 * 7)
    found = dora.lengths(w, a, b, 0.5)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("p", (0.0, P))
def test_a_new_adapter_is_the_base(p: float, dtype: torch.dtype) -> None:
    """To the bit, where the lengths are what the magnitudes begin as."""
    from ratel.lora.compute import Dropout

    torch.manual_seed(0)
    base = Frozen(weight=torch.randn(10, 12).to(dtype), bias=torch.randn(10).to(dtype))
    adapter = Adapter(a=torch.randn(3, 12), b=torch.zeros(10, 3), scale=2.0)
    x = torch.randn(5, 12).to(dtype)
    dropout = Dropout.of(p, [1]) if p else None
    found = dora.dora_linear(x, base, adapter, torch.linalg.norm(base.weight.float(), dim=1), dropout)
    assert torch.equal(found, F.linear(x, base.weight, base.bias))
