"""Run in parts, every family gives what the plain module gives: forward and gradients."""

import pytest
import torch

from ratel.models import load
from test_models_common import (CPU, FAMILIES, attach_all, make_batch, make_model, named, next_token_loss, plain_copy,
                                vertical_pass)

pytestmark = pytest.mark.numerics
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run_plain(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_vertical_pass_equals_plain_autograd_bitwise(family: str, dtype: torch.dtype) -> None:
    model = make_model(family)
    plain = plain_copy(model, dtype)
    batch = make_batch(documents=2)
    parts = load(model, dtype=dtype, device=CPU)
    _, grads = attach_all(parts)
    torch.manual_seed(5)
    expected_loss = next_token_loss(run_plain(plain, batch), batch["labels"])
    expected_loss.backward()
    rng_after = torch.get_rng_state()
    torch.manual_seed(5)
    loss = vertical_pass(parts, batch)
    assert torch.equal(loss, expected_loss.detach())
    assert torch.equal(torch.get_rng_state(), rng_after)
    expected = {n: p.grad for n, p in plain.named_parameters()}
    got = named(parts, grads, trained_only=True)
    assert set(got) == set(expected)
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name
