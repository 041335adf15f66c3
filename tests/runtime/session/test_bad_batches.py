"""Batches that cannot be trained on, or would be trained on as something else, are refused and harm nothing."""

from pathlib import Path

import pytest
import torch

import ratel
from ratel.errors import RatelError
from ratel.runtime.session.session import Session
from tests.support.families import VOCAB, batches, build, llama, loss_fn_of
from tests.support.refusals import Untouched, opened, refused

pytestmark = pytest.mark.numerics


def ids(rows: int = 4, positions: int = 16) -> torch.Tensor:
    return torch.zeros(rows, positions, dtype=torch.long)


FIRST = torch.where(torch.arange(16) == 0, 1, -100).expand(4, 16)
BATCHES = {
    "no dict": (ids(), "a dict with input_ids", "batch"),
    "nothing known": ({"x": ids()}, "a dict with input_ids", "batch"),
    "a list of ids": ({"input_ids": [[1, 2]]}, "must be a tensor", "input_ids"),
    "fractions": ({"input_ids": ids().float()}, "whole numbers", "input_ids"),
    "one dimension": ({"input_ids": ids()[0]}, "whole numbers of shape", "input_ids"),
    "no rows": ({"input_ids": ids(0)}, "empty", "input_ids"),
    "more rows than prepared": ({"input_ids": ids(5)},
                                "prepared for 4 rows of 16.*5 rows of 16.*largest shape first, or call Session.prepare", "batch"),
    "longer than prepared": ({"input_ids": ids(4, 17)}, "prepared for 4 rows of 16.*4 rows of 17", "batch"),
    "ids past the vocabulary": ({"input_ids": ids() + VOCAB}, f"outside the .* vocabulary of {VOCAB}", "input_ids"),
    "negative ids": ({"input_ids": ids() - 1}, "outside the model's vocabulary", "input_ids"),
    "no targets": ({"input_ids": ids(), "labels": ids() - 100}, "no token of the batch is a target", "labels"),
    "only the first token a target": ({"input_ids": ids(), "labels": FIRST},
                                      "no token of the batch is a target", "labels"),
    "labels past the vocabulary": ({"input_ids": ids(), "labels": ids() + VOCAB}, "outside the model's voc", "labels"),
    "labels below": ({"input_ids": ids(), "labels": ids() - 1}, "outside the model's vocabulary", "labels"),
    "labels of another shape": ({"input_ids": ids(), "labels": ids(4, 15)}, "the shape of input_ids", "labels"),
    "positions past the model's": ({"input_ids": ids(), "position_ids": ids() + 64}, "at most 64", "position_ids"),
    "a key that nothing takes": ({"input_ids": ids(), "extra": ids(3)}, "would not be given .given: extra.", "batch"),
}


@pytest.fixture(scope="module")
def prepared() -> Session:
    with opened(llama()) as session:
        session.prepare(4, 16)
        yield session


@pytest.mark.parametrize("what", BATCHES)
def test_batches(what: str, prepared: Session) -> None:
    """Refused before the step begins: the session goes on with the next batch."""
    batch, message, field = BATCHES[what]
    before = prepared.state_dict()
    refused(message, field, lambda: prepared.step(batch))
    assert all(torch.equal(before[name], tensor) for name, tensor in prepared.state_dict().items())
    assert not prepared.step(batches("llama", 1)[0]).skipped


def test_sequences_longer_than_the_model(ssd_dir: Path) -> None:
    untouched = Untouched(ssd_dir)
    with opened(untouched.model, ssd_dir, tier="ssd") as session:
        refused("at most 64 tokens", "seq_len", lambda: session.prepare(4, 65))
        refused("at most 64 tokens", "seq_len", lambda: session.step({"input_ids": ids(1, 65)}))
        untouched.check_machine()
    untouched.check()


def test_evaluation_without_targets(prepared: Session) -> None:
    refused("no target token to evaluate on", "eval_data", lambda: prepared.evaluate([]))
    refused("no target token", "eval_data", lambda: prepared.evaluate([{"input_ids": ids(), "labels": ids() - 100}]))
    assert prepared.evaluate(batches("llama", 1)) > 0


def test_batches_of_a_model_with_its_own_loss(ssd_dir: Path) -> None:
    with opened(build("patches"), ssd_dir, loss_fn=loss_fn_of("patches"), tier="dram") as session:
        good = batches("patches", 1)[0]
        refused("is prepared by its first batch", "prepare", lambda: session.prepare(4, 16))
        refused("first dimension, of one length", "batch", lambda: session.step({**good, "y": good["y"][:3]}))
        session.step(good)
        twice = {key: torch.cat([tensor, tensor]) for key, tensor in good.items()}
        refused("prepared for 4 rows", "batch", lambda: session.step(twice))
        assert not session.step(good).skipped


def test_a_loss_that_is_no_scalar() -> None:
    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    with Session(Blocks(), device="cpu", dtype="fp32", loss_fn=lambda model, x: model(x).square().mean(-1)) as session:
        with pytest.raises(RatelError, match=r"loss_fn: returned a tensor of shape \(4,\). Return the batch's mean loss"):
            session.step(torch.ones(4, 8))


# --- what a newcomer met ------------------------------------------------------------------------------------------------


def masked(rows: list[list[int]], *, labels: bool = True) -> dict[str, torch.Tensor]:
    mask, ids = torch.tensor(rows), torch.arange(len(rows) * len(rows[0])).view(len(rows), -1) % VOCAB
    return {"input_ids": ids, "attention_mask": mask, **({"labels": ids.masked_fill(mask == 0, -100)} if labels else {})}


@pytest.mark.parametrize(("batch", "message", "field"), [
    (masked([[0, 1, 1, 1], [1, 1, 1, 1]]), "hides tokens before others.*Pad on the right", "attention_mask"),
    (masked([[1, 1, 0, 0], [1, 1, 1, 1]], labels=False), "hides tokens that are to be learned", "attention_mask"),
    ({**masked([[1, 1, 0, 0]]), "labels": torch.ones(1, 4, dtype=torch.long)}, "hides tokens that are to be learned", "attention_mask"),
    ({**masked([[1, 1, 1, 1]]), "attention_mask": torch.ones(1, 3)}, "of the shape of input_ids", "attention_mask"),
    ({**masked([[1, 1, 1, 1]]), "token_type_ids": torch.ones(1, 4)}, r"would not be given \(given: token_type_ids\)", "batch"),
    ({**masked([[1, 1, 1, 1]]), "labels": torch.ones(1, 4)}, "must be whole numbers", "labels")])
def test_batches_that_would_be_trained_on_as_something_else(batch: dict, message: str, field: str, ssd_dir: Path) -> None:
    with opened(build("llama"), ssd_dir) as session:
        refused(message, field, lambda: session.step(batch))
        assert session.step(batches("llama", 1)[0]).loss > 0


def test_a_padding_on_the_right_is_trained_on_as_transformers_does(ssd_dir: Path) -> None:
    """Also as a tokenizer's own type, in integers of 32 bits."""
    from transformers import BatchEncoding

    model, batch = build("llama"), masked([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    expected = model.float()(**batch).loss.item()
    given = BatchEncoding({key: tensor.int() for key, tensor in batch.items()})
    with opened(model, ssd_dir, dtype="fp32") as session:
        assert session.step(given).loss == pytest.approx(expected, rel=1e-5)


def test_a_generator_without_a_batch(tmp_path: Path) -> None:
    refused("there is no batch in it", "data", lambda: ratel.train(build("llama"), iter(()), steps=1, device="cpu",
                                                                   out=str(tmp_path / "run")))


def test_micro_batches_are_parts_of_the_batches_there_are(tmp_path: Path) -> None:
    options = dict(steps=1, micro_batch=3, seq_len=16, device="cpu", out=str(tmp_path / "run"))
    refused("does not divide --batch-size", "--micro-batch", lambda: ratel.train("demo", **options))
    assert not (tmp_path / "run").exists()
    assert ratel.train(build("llama"), batches("llama", 1), **options).steps == 1  # of 4 rows, whatever --batch-size is


def test_held_out_batches_that_cannot_be_evaluated_end_a_run_after_its_first_step(tmp_path: Path) -> None:
    given = batches("llama", 1)
    longer = [{"input_ids": torch.zeros(4, 32, dtype=torch.long)}]
    with pytest.raises(RatelError):
        ratel.train(build("llama"), given, eval_data=longer, steps=5, device="cpu", out=str(tmp_path / "run"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_data_that_ends_early_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (3, 2):
        ratel.train(build("llama"), iter(batches("llama", 2)), steps=steps, device="cpu", out=str(tmp_path / str(steps)))
        captured = capsys.readouterr()
        assert ("the data ended after step 2 of 3" in captured.out + captured.err) == (steps == 3)
