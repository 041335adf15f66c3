"""Run in parts, every family gives what the plain module gives: forward and gradients."""

import pytest
import torch

from ratel.models import Parts, load
from tests.support.models import (CPU, FAMILIES, attach_all, attach_grad, configs, make_batch, make_model,
                                      named, next_token_loss, plain_copy, vertical_pass)

pytestmark = pytest.mark.numerics
DTYPES = [torch.float32, torch.bfloat16]


def run_plain(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def forward(parts: Parts, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        hidden, inputs = parts.head(batch)
        for i in range(parts.num_blocks):
            hidden = parts.block(i, hidden, inputs)
        return parts.tail_logits(hidden)


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


@pytest.mark.parametrize("family", [*FAMILIES, "opt", "bloom"])
def test_a_document_does_not_see_the_one_before_it(family: str) -> None:
    parts = load(make_model(family), dtype=torch.float32, device=CPU)
    assert parts.isolates_documents
    attach_all(parts)
    parts.set_training(False)
    batch, length = make_batch(length=12, documents=3), 4
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, :length] = (changed["input_ids"][:, :length] + 5) % 90
    logits, other = forward(parts, batch), forward(parts, changed)
    assert torch.equal(logits[:, length:], other[:, length:])
    assert not torch.equal(logits[:, :length], other[:, :length])
    # Nor does a document change when it is alone.
    alone = forward(parts, {key: value[:, length:2 * length] for key, value in batch.items()})
    torch.testing.assert_close(logits[:, length:2 * length], alone, rtol=1e-4, atol=1e-5)


def test_one_document_needs_no_mask() -> None:
    parts = load(make_model("llama"), dtype=torch.float32, device=CPU)
    masks = [[c.kwargs["attention_mask"] for c in parts.head(make_batch(documents=n))[1].calls] for n in (1, 2)]
    assert masks[0] == [None] * 3 and all(m is masks[1][0] and m is not None for m in masks[1])


def test_a_model_that_mixes_documents_says_so(caplog: pytest.LogCaptureFixture) -> None:
    parts = load(make_model("mamba"), dtype=torch.float32, device=CPU)
    assert not parts.isolates_documents and "each sequence holds one" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_chunks_equal_logits_at_once(family: str) -> None:
    parts = load(make_model(family), dtype=torch.float32, device=CPU)
    attach_all(parts)
    hidden = torch.randn(2, 6, 32)
    whole = parts.tail_logits(hidden)
    pieces = [parts.tail_logits(piece) for piece in hidden.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)
    assert whole.shape == (2, 6, 97) and torch.equal(parts.tail_logits(hidden.flatten(0, 1)), whole.flatten(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_a_vertical_pass_equals_plain_autograd(family: str) -> None:
    cuda = torch.device("cuda", 0)
    model = make_model(family)
    plain = plain_copy(model, torch.bfloat16).to(cuda)
    for module, original in zip(plain.modules(), model.modules()):
        module._buffers.update({name: b if b is None else b.to(cuda) for name, b in original._buffers.items()})
    batch = {key: value.to(cuda) for key, value in make_batch(documents=2).items()}
    parts = load(model, dtype=torch.bfloat16, device=cuda)
    assert all(t.device == cuda for t in (*model.parameters(), *model.buffers()))
    grads = []
    for unit in parts.spec.units:
        flat = torch.empty(unit.num_elements)
        parts.stored.read_unit(unit.index, flat)
        parts.parameters.attach(unit.index, flat.to(cuda, torch.bfloat16))
        grads.append(torch.zeros(unit.num_trainable, dtype=torch.bfloat16, device=cuda))
        attach_grad(parts, unit, grads[-1])
    parts.set_training(False), plain.eval()
    expected_loss = next_token_loss(run_plain(plain, batch), batch["labels"])
    expected_loss.backward()
    torch.testing.assert_close(vertical_pass(parts, batch), expected_loss.detach(), rtol=1e-3, atol=1e-3)
    got = named(parts, grads, trained_only=True)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(got[name], param.grad, rtol=2e-2, atol=2e-2 * param.grad.abs().max().item())
    parts.close()
    assert all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers()))


@pytest.mark.gpu
def test_fresh_weights_do_not_depend_on_the_device() -> None:
    parts = [load(configs()["gpt2"](), dtype=torch.bfloat16, device=device, seed=1)
             for device in (CPU, torch.device("cuda", 0))]
    state = torch.cuda.get_rng_state()
    for unit in parts[0].spec.units:
        flats = [torch.empty(unit.num_elements) for _ in parts]
        for part, flat in zip(parts, flats):
            part.stored.read_unit(unit.index, flat)
        assert torch.equal(*flats)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_tail_does_not_wait_for_the_gpu() -> None:
    cuda = torch.device("cuda", 0)
    parts = load(configs()["llama"](), dtype=torch.bfloat16, device=cuda)
    hidden = torch.randn(2, 8, 32, dtype=torch.bfloat16, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts.tail_logits(hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")
