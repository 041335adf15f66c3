"""Rotary frequencies that are chosen by length: those of transformers for the whole batch, in every
run of a step."""

from pathlib import Path

import pytest
import torch
import transformers

from ratel.models import load
from ratel.runtime.session.session import Session
from tests.models.test_loading import SIZES
from tests.support.models import CPU, attach_all, named, next_token_loss, vertical_pass

pytestmark = pytest.mark.numerics

LIMIT = 16
ROPE = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0],
            original_max_position_embeddings=LIMIT)


@pytest.fixture
def model(tmp_path: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SIZES, original_max_position_embeddings=LIMIT, rope_parameters=dict(ROPE), pad_token_id=0)
    model = transformers.Phi3ForCausalLM(config).train()
    model.save_pretrained(tmp_path)
    return model


def batch(*documents: list[int]) -> dict[str, torch.Tensor]:
    """A row each, of documents of these lengths."""
    ids = torch.randint(3, 90, (len(documents), sum(documents[0])), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in documents])
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


@pytest.mark.parametrize("documents", [[[12, 12], [16, 8]], [[24], [24]], [[12, 12], [20, 4]]], ids=["short", "long", "one is long"])
def test_gradients_are_autograds(documents: list[list[int]], model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    given = batch(*documents)
    parts = load(tmp_path, dtype=torch.float32, device=CPU)
    _, grads = attach_all(parts)
    parts.begin(given)
    loss = vertical_pass(parts, given)
    plain = next_token_loss(model(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits,
                            given["labels"])
    plain.backward()
    assert torch.equal(loss, plain)
    for name, grad in named(parts, grads).items():
        assert torch.equal(grad, model.get_parameter(name).grad), name
    parts.close()


@pytest.mark.parametrize("micro", [1, 2])
def test_the_longest_document_of_the_batch_decides_not_that_of_a_micro_batch(micro: int, model: transformers.PreTrainedModel,
                                                                             tmp_path: Path) -> None:
    mixed, short = batch([12, 12], [20, 4]), batch([12, 12], [12, 12])
    with Session(tmp_path, dtype="fp32", device="cpu", micro_batch=micro, lr=0.0) as session:
        for given in (mixed, short, mixed):
            expected = next_token_loss(model(**{k: given[k] for k in ("input_ids", "position_ids")}, use_cache=False).logits,
                                       given["labels"])
            masked = {**given, "labels": given["labels"].clone()}
            assert session.step(masked).loss == pytest.approx(expected.item(), abs=2e-6)
            assert session.evaluate([masked]) == pytest.approx(expected.item(), abs=2e-6)


def test_documents_that_share_a_row_are_kept_apart(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    parts = load(tmp_path, dtype=torch.float32, device=CPU)
    assert parts.isolates_documents
    parts.close()


def test_the_two_sets_of_frequencies_make_a_difference(model: transformers.PreTrainedModel) -> None:
    given = batch([12, 12], [20, 4])
    logits = [model(input_ids=given["input_ids"][:1], position_ids=given["position_ids"][:1], use_cache=False).logits,
              model(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits[:1]]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_model_given_as_an_object_has_its_frequencies_back(model: transformers.PreTrainedModel) -> None:
    rotary = model.model.rotary_emb
    before = rotary.original_inv_freq.clone()
    with Session(model, dtype="fp32", device="cpu") as session:
        session.step(batch([24], [24]))
    assert torch.equal(rotary.original_inv_freq, before)
