"""Tasks against autograd of transformers' own losses, and batches that are refused."""

import copy

import pytest
import torch

import ratel
from ratel.errors import RatelError
from ratel.models.calls.tasks import MULTI, REGRESSION
from tests.support.tasks import LABELS, batch, config, gradients, model, session_gradients

pytestmark = pytest.mark.numerics
ENCODERS = ["bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert"]
DECODERS = ["llama", "mistral", "gpt2"]
CASES = [(family, task) for family in ENCODERS for task in ("classify", "tokens", "masked-lm")]
CASES += [(family, task) for family in DECODERS for task in ("classify", "tokens")]
ROWS = 4


def session(module, task, **options) -> ratel.Session:
    return ratel.Session(module, task=task, device="cpu", dtype="fp32", max_grad_norm=None, **options)


def check(module, task, given, micro_batch) -> None:
    loss, expected = gradients(copy.deepcopy(module), given)
    with session(module, task, micro_batch=micro_batch) as trained:
        assert trained.evaluate([given]) == pytest.approx(loss, rel=1e-5)
        assert trained.step(given).loss == pytest.approx(loss, rel=1e-5)
        found = session_gradients(trained)
    assert set(expected) <= set(found)
    for name, grad in found.items():
        reference = expected.get(name, torch.zeros_like(grad))
        torch.testing.assert_close(grad, reference, rtol=2e-4, atol=2e-6 * max(1.0, float(reference.abs().max())), msg=name)


@pytest.mark.parametrize("micro_batch", [ROWS, 1])
@pytest.mark.parametrize("family,task", CASES)
def test_gradients_are_those_of_transformers_loss(family, task, micro_batch) -> None:
    module = model(family, task)
    check(module, task, batch(task, module.config.pad_token_id), micro_batch)


@pytest.mark.parametrize("micro_batch", [ROWS, 3])
@pytest.mark.parametrize("problem,outputs", [(REGRESSION, 1), (REGRESSION, 2), (MULTI, 3)])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_regression_and_multi_label(family, problem, outputs, micro_batch) -> None:
    module = model(family, "classify", num_labels=outputs, problem_type=problem)
    given = batch("classify", module.config.pad_token_id)
    given["labels"] = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])[:, :outputs]
    if outputs == 1:
        given["labels"] = given["labels"][:, 0] + 0.25
    check(module, "classify", given, micro_batch)


def test_the_loss_does_not_depend_on_where_targets_lie() -> None:
    """Micro-batches with many, few and no targets: a mean of their means would weigh them alike."""
    given = batch("tokens", 0)
    given["labels"][1:] = -100
    given["labels"][2, :1] = 1
    check(model("bert", "tokens"), "tokens", given, 1)


def test_a_batch_may_be_shorter_than_what_was_prepared() -> None:
    module = model("bert", "classify")
    given = batch("classify", 0)
    loss, _ = gradients(copy.deepcopy(module), given)
    with session(module, "classify") as trained:
        trained.prepare(8, 64)
        assert trained.step(given).loss == pytest.approx(loss, rel=1e-5)


def test_pair_ids_reach_the_model() -> None:
    module = model("bert", "classify")
    given = batch("classify", 0)
    given["token_type_ids"] = (torch.arange(12)[None] > 3).long().expand(ROWS, 12).clone()
    check(module, "classify", given, 2)


def test_accuracy_is_of_the_last_evaluation() -> None:
    module = model("bert", "tokens")
    given = batch("tokens", 0)
    with torch.no_grad():
        chosen = copy.deepcopy(module).eval()(**given).logits.argmax(-1)
    target = given["labels"] != -100
    with session(module, "tokens", micro_batch=1) as trained:
        trained.evaluate([given])
        assert trained.accuracy == pytest.approx(float((chosen == given["labels"])[target].float().mean()))
        given["labels"] = torch.where(target, chosen, -100)
        trained.evaluate([given])
        assert trained.accuracy == 1.0


REFUSED = {
    "a label too many": ("labels", lambda b: b | {"labels": torch.tensor([0, 1, 2, LABELS])}),
    "labels of tokens": ("labels", lambda b: b | {"labels": b["input_ids"]}),
    "labels of another type": ("labels", lambda b: b | {"labels": torch.zeros(ROWS)}),
    "no labels": ("batch", lambda b: {"input_ids": b["input_ids"]}),
    "a token outside": ("input_ids", lambda b: b | {"input_ids": b["input_ids"] + 100}),
    "a key that nobody takes": ("batch", lambda b: b | {"weights": torch.ones(ROWS)}),
    "a mask of another shape": ("attention_mask", lambda b: b | {"attention_mask": torch.ones(ROWS, 3).long()}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_batches_that_are_refused(case) -> None:
    field, change = REFUSED[case]
    with session(model("bert", "classify", problem_type="single_label_classification"), "classify") as trained:
        with pytest.raises(RatelError) as caught:
            trained.step(change(batch("classify", 0)))
        assert caught.value.field == field
        trained.step(batch("classify", 0))  # nothing was touched


def test_a_class_that_cannot_do_the_task_is_refused() -> None:
    with pytest.raises(RatelError, match="AutoModelForTokenClassification"):
        session(model("bert", "classify"), "tokens")
    with pytest.raises(RatelError, match="no class of model type 'llama'"):
        session(config("llama"), "masked-lm")
    with pytest.raises(RatelError, match="contradicts loss_fn"):
        session(model("bert", "classify"), "classify", loss_fn=lambda m, b: 0)
    with pytest.raises(RatelError, match="one of the tasks"):
        session(config("bert"), "classification")
