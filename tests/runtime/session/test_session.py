"""The face of the session: dropout, evaluation, frozen parameters, generators, shapes."""

import gc
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ratel.errors import RatelError
from ratel.runtime.session.session import Session
from tests.support.families import batches, build, llama, loss_fn_of
from tests.support.sessions import open_session

pytestmark = pytest.mark.numerics
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def opened(model: object, ssd: Path, device: str = "cpu", **options) -> Session:
    return open_session(ssd, model=model, device=device, **{"tier": "ssd", **options})


def gpt2_with_dropout() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=4, n_head=2, resid_pdrop=0.2,
                                      embd_pdrop=0.2, attn_pdrop=0.2))


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_replayed_and_does_not_depend_on_placement(device: str, ssd_dir: Path) -> None:
    results = []
    for options in (dict(tier="ssd"), dict(tier="gpu", checkpoint_tier="dram"), dict(tier="dram", seed=1)):
        with opened(gpt2_with_dropout(), ssd_dir, device, **options) as session:
            losses = [session.step(batch).loss for batch in batches("llama", 3)]
            results.append((losses, session.state_dict()))
    (first, weights), (second, same), (other_seed, _) = results
    assert first == second and all(torch.equal(weights[name], same[name]) for name in weights)
    assert first != other_seed, "dropout does not depend on the seed: is it on at all?"


def test_dropout_gradient_is_that_of_the_same_masks(ssd_dir: Path) -> None:
    """The directional derivative of the loss along the update: with other masks in recomputation it
    would not match."""
    model = gpt2_with_dropout().double().float()
    batch = batches("llama", 1)[0]
    losses = []
    for scale in (0.0, 1.0):
        with opened(gpt2_with_dropout(), ssd_dir, dtype="fp32", lr=1e-3 * scale or 1e-12, max_grad_norm=0) as session:
            first = session.step(batch)
            session._core.attempts = 0  # the same masks again
            losses.append((first.loss, session.step(batch).loss))
    assert losses[0][0] == losses[1][0] == pytest.approx(losses[0][1], abs=1e-6)
    assert losses[1][1] < losses[1][0] - 0.01, "a step along the gradient must lower the loss under the same masks"
    del model


@pytest.mark.parametrize("tier", ["gpu", "dram", "ssd"])
def test_frozen_parameters_stay_and_have_no_states(tier: str, ssd_dir: Path) -> None:
    model = build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or "layers.1." in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with opened(model, ssd_dir, tier=tier, lr=1e-2) as session:
        for batch in batches("llama", 2):
            session.step(batch)
        assert sum(u.num_trainable_params for u in session.plan.spec.units) == sum(before[n].numel() for n in trained)
        assert not session._machinery.store.has(0, "m"), "a frozen embedding has no moments"
        weights = session.state_dict()
    for name, value in before.items():
        expected_same = name not in trained
        compared = value.bfloat16().float() if expected_same else value
        assert torch.equal(weights[name], compared) == expected_same, name


def test_evaluation_changes_nothing_and_completes_updates(ssd_dir: Path) -> None:
    data = batches("llama", 4)

    def run(evaluate: bool) -> tuple[list[float], dict]:
        with opened(gpt2_with_dropout(), ssd_dir) as session:
            losses = []
            for batch in data:
                losses.append(session.step(batch).loss)
                if evaluate:
                    one, two = session.evaluate(data[:2]), session.evaluate(data[:2])
                    assert one == two, "dropout was on during evaluation"
            return losses, session.state_dict()

    (plain, weights), (evaluated, same) = run(False), run(True)
    assert plain == evaluated and all(torch.equal(weights[name], same[name]) for name in weights)


def test_evaluation_is_the_mean_over_target_tokens(ssd_dir: Path) -> None:
    data = batches("llama", 2, rows=4)
    data[1]["labels"][:, 4:] = -100
    with opened(llama(), ssd_dir, dtype="fp32") as session:
        session.prepare(4, 16)
        both = session.evaluate(data)
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in data]
        parts = [session.evaluate([b]) for b in data]
    assert both == pytest.approx(sum(c * p for c, p in zip(counts, parts)) / sum(counts), rel=1e-6)


def test_evaluation_takes_more_rows_than_a_step(ssd_dir: Path) -> None:
    large = batches("llama", 1, rows=11)[0]
    pieces = [{key: value[begin : begin + 4] for key, value in large.items()} for begin in (0, 4, 8)]
    with opened(llama(), ssd_dir) as session:
        session.step(pieces[0])
        assert session.evaluate([large]) == session.evaluate(pieces)
        with pytest.raises(RatelError, match="prepared for 4 rows of 16 at most"):
            session.step(large)


@pytest.mark.parametrize("kind", ["named tuple", "mapping"])
def test_batches_of_other_containers(kind: str, ssd_dir: Path) -> None:
    class Pair(NamedTuple):
        x: torch.Tensor
        y: torch.Tensor

    def loss_of(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(outputs.float(), targets)

    def loss_after_two(batch: object, loss_fn: Callable) -> float:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        with opened(model, ssd_dir, loss_fn=loss_fn) as session:
            session.step(batch)
            return session.step(batch).loss

    x, y = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(1))
    expected = loss_after_two({"x": x, "y": y}, lambda model, batch: loss_of(model(batch["x"]), batch["y"]))
    if kind == "mapping":
        found = loss_after_two(UserDict(x=x, y=y), lambda model, batch: loss_of(model(batch["x"]), batch["y"]))
    else:
        found = loss_after_two(Pair(x, y), lambda model, batch: loss_of(model(batch.x), batch.y))
    assert found == expected


@pytest.mark.parametrize(("returned", "name"), [(lambda loss: (loss, 1), "tuple"), (lambda loss: {"loss": loss}, "dict"),
                                                (lambda loss: None, "NoneType")])
def test_a_loss_that_is_no_tensor(returned: Callable, name: str, ssd_dir: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    with opened(model, ssd_dir, loss_fn=lambda model, x: returned(model(x).float().mean())) as session:
        with pytest.raises(RatelError, match=f"loss_fn: returned {name}. Return the batch's mean loss"):
            session.step(torch.ones(4, 8))


@pytest.mark.parametrize("family", ["llama", "patches"])
def test_a_module_does_not_answer_while_its_weights_are_with_a_session(family: str, ssd_dir: Path, tmp_path: Path) -> None:
    """Zeros stand in for them: a checkpoint of the module, or samples in the middle of training,
    would be of these."""
    model, (batch,) = build(family), batches(family, 1)
    inputs = batch["input_ids"] if family == "llama" else batch["x"]
    with opened(model, ssd_dir, loss_fn=loss_fn_of(family)) as session:
        for _ in range(2):
            with pytest.raises(RatelError, match="weights are with the session.*Session.evaluate"):
                model(inputs)
            with pytest.raises(RatelError, match="weights are with the session.*Session.export"):
                torch.save(torch.nn.ModuleDict({"wrapped": model}).state_dict(), tmp_path / "model.pt")
            session.step(batch)
            session.evaluate([batch])
        session.export(tmp_path / "model")
        masters = session.state_dict()
    model(inputs)
    assert all(torch.equal(value, masters[name]) for name, value in model.state_dict().items() if name in masters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_callers_default_type_changes_nothing(dtype: torch.dtype, ssd_dir: Path) -> None:
    """People set it to load a model in bf16. Norms and sums stay in fp32."""
    data = batches("llama", 3)

    def run() -> list[tuple[float, float]]:
        with opened(build("llama"), ssd_dir) as session:
            return [(out.loss, out.grad_norm) for out in map(session.step, data)]

    expected = run()
    model = build("llama")
    torch.set_default_dtype(dtype)
    try:
        with opened(model, ssd_dir) as session:
            assert [(out.loss, out.grad_norm) for out in map(session.step, data)] == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_smaller_batches_than_prepared(ssd_dir: Path) -> None:
    data = batches("llama", 1, rows=4)[0]
    small = {key: value[:3, :10] for key, value in data.items()}

    def run(prepare: bool) -> tuple[float, dict]:
        with opened(build("llama"), ssd_dir, checkpoint_tier="dram") as session:
            if prepare:
                session.prepare(4, 16)
            return session.step(small).loss, session.state_dict()

    (one, weights), (two, same) = run(True), run(False)
    assert one == two and all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_callers_generators_are_left_alone(ssd_dir: Path) -> None:
    with opened(gpt2_with_dropout(), ssd_dir) as session:
        session.step(batches("llama", 1)[0])
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        session.step(batches("llama", 1)[0])
        assert torch.equal(torch.rand(3), expected)


def test_a_batch_needs_only_input_ids(ssd_dir: Path) -> None:
    batch = {"input_ids": batches("llama", 1)[0]["input_ids"]}
    with opened(build("llama"), ssd_dir) as session:
        without = session.step(batch).loss
    with opened(build("llama"), ssd_dir) as session:
        assert session.step({**batch, "labels": batch["input_ids"]}).loss == without


def test_eager_updates_cannot_be_clipped(ssd_dir: Path) -> None:
    with pytest.raises(RatelError, match="cannot be clipped"):
        opened(build("llama"), ssd_dir, optimizer="eager", max_grad_norm=1.0)
    with opened(build("llama"), ssd_dir, optimizer="eager", max_grad_norm=0) as session:
        assert not session.step(batches("llama", 1)[0]).skipped


def test_preparing_twice_is_refused(ssd_dir: Path) -> None:
    from ratel.errors import RatelError

    with opened(build("llama"), ssd_dir) as session:
        plan = session.prepare(4, 16)
        with pytest.raises(RatelError, match="prepared already"):
            session.prepare(8, 16)
        assert session.plan is plan and not session.step(batches("llama", 1)[0]).skipped


def test_two_sessions_on_one_directory_are_refused(ssd_dir: Path) -> None:
    from ratel.errors import RatelError

    with opened(build("llama"), ssd_dir) as first:
        first.step(batches("llama", 1)[0])
        with pytest.raises(RatelError, match="in use"), opened(build("llama"), ssd_dir) as second:
            second.step(batches("llama", 1)[0])
        first.step(batches("llama", 1)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [dict(tier="gpu"), dict(tier="dram", optimizer="eager", max_grad_norm=0), dict(tier="ssd"),
                                     dict(tier="ssd", durable="step"), dict(tier="dram", activations="dram"),
                                     dict(placement={"*": "dram", "block.*": {"m": "ssd", "g": "ssd"}}, checkpoint_tier="ssd")],
                         ids=["gpu", "eager", "ssd", "commits", "activations", "mixed"])
def test_what_a_closed_session_held_does_not_wait_for_the_collector(device: str, options: dict, ssd_dir: Path, tmp_path: Path) -> None:
    """A circle of references would keep planes and slots, gigabytes of them, while a next session
    plans with what is free."""
    with collector_off():
        if "durable" in options:
            options = {**options, "commits": tmp_path / "commits"}
        if "optimizer" not in options:
            options = {**options, "optimizer": "speculative", "max_grad_norm": 1e9}
        with opened(build("llama"), ssd_dir, device, **options) as session:
            for batch in batches("llama", 3):
                session.step(batch)
            session.commit() if "durable" in options else session.save(tmp_path / "state")
            session.evaluate(batches("llama", 1))
            machinery = session._machinery
            held = {name: weakref.ref(part) for name, part in vars(machinery).items() if name in HOLDERS and part is not None}
            del machinery
        assert len(held) == len(HOLDERS) and [name for name, part in held.items() if part() is not None] == []


HOLDERS = ("arena", "store", "cache", "updates", "weights", "activations", "gradients", "streamer", "saver")


@contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
