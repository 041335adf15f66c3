"""A session that trains an adapter, against peft with PyTorch's AdamW; and what else must be so of
it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.lora.describe.config import LoraConfig
from ratel.lora.values.fingerprint import base_fingerprint
from ratel.models.load import load
from ratel.runtime.session.session import Session
from ratel.training.export_state import export_state
from tests.support.families import batches, build, loss_fn_of
from tests.support.lora import load_in_peft, make, peft_model, peft_tensors

pytestmark = pytest.mark.numerics
peft = pytest.importorskip("peft", minversion="0.21")
LR, BETAS, EPS = 1e-2, (0.9, 0.99), 1e-4


def session_of(model: nn.Module, lora: Any, **options: Any) -> Session:
    return Session(model, lora=lora, **{"lr": LR, "betas": BETAS, "eps": EPS, "dtype": "fp32", "device": "cpu", "max_grad_norm": 0,
                                        "micro_batch": 2, "router_aux_loss": "off", **options})


def rows_of(count: int, rows: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 64, (rows, 9), generator=generator)} for _ in range(count)]


def written(session: Session, directory: Path) -> dict[str, Tensor]:
    session.export(directory, dtype="fp32")
    return load_file(directory / "adapter_model.safetensors")


def peft_of(name: str, directory: Path) -> nn.Module:
    """peft's model with the adapter in a directory, to be trained on."""
    return peft.PeftModel.from_pretrained(make(name), str(directory), is_trainable=True)


def train_peft(model: nn.Module, batches: list[dict[str, Tensor]], pairs: Sequence[tuple[Tensor, Tensor]] = ()) -> list[float]:
    """``pairs``: parameters and others that are the same memory, transposed, and are not updated by
    themselves; the gradients of both are added."""
    others = {id(other) for _, other in pairs}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad and id(p) not in others], lr=LR, betas=BETAS, eps=EPS,
                                  weight_decay=0)
    losses = []
    model.eval()
    for batch in batches:
        model.zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        for one, other in pairs:
            one.grad += other.grad.t()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", ("llama", "qwen3", "gemma3", "gpt2"))
def test_fifty_steps_are_pefts(tmp_path: Path, name: str) -> None:
    config = LoraConfig(rank=4, alpha=6, rslora=True, rank_pattern={r".*\.1\..*": 3})
    data = rows_of(50)
    with session_of(make(name), config) as session:
        written(session_started(session), tmp_path / "first")
        losses = [session.step(batch).loss for batch in data]
        trained = written(session, tmp_path / "last")
    reference = peft_of(name, tmp_path / "first")
    expected = train_peft(reference, data)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-6, atol=2e-6)
    assert abs(expected[0] - expected[-1]) > 0.05  # it has learned something that could be wrong
    for tensor_name, tensor in peft_tensors(reference).items():
        torch.testing.assert_close(trained[tensor_name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text: f"{tensor_name}: {text}")


def session_started(session: Session) -> Session:
    session.prepare(4, 9)
    return session


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_gradients_are_autograds(tmp_path: Path, name: str) -> None:
    """The first moment after one step is a tenth of the gradient."""
    (batch,) = rows_of(1)
    with session_of(make(name), LoraConfig(rank=4, alpha=9), lr=0.0) as session:
        begun = written(session_started(session), tmp_path / "first")
        session.step(batch)
        session.flush()
        moments = {param.name: session.read_state(unit, "m")[param.offset:param.end].view(param.shape) / (1 - BETAS[0])
                   for unit in session.plan.spec.units if unit.num_trainable for param in unit.params}
        names = session._core.adaptation.names
    model = peft_of(name, tmp_path / "first").eval()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {own.replace(".default.", "."): parameter.grad for own, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(gradients) == set(begun)
    for own, moment in moments.items():
        expected = gradients[names[own]]
        torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max() + 1e-3))


def test_the_base_is_what_it_was(tmp_path: Path) -> None:
    model = make("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    with session_of(model, 4, tier="ssd", ssd=[tmp_path / "ssd"]) as session:
        frozen = [unit for unit in session_started(session).plan.spec.units if not unit.num_trainable]
        read = session._machinery.transfer.read_weights
        first = {unit.name: read(unit).clone() for unit in frozen}
        for batch in rows_of(3):
            session.step(batch)
        session.flush()
        assert len(frozen) == 4 and all(torch.equal(read(unit), first[unit.name]) for unit in frozen)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_before_the_first_step_it_is_the_base(dtype: str) -> None:
    (batch,) = rows_of(1)
    losses = []
    for lora in (None, LoraConfig(rank=4, dropout=0.1)):
        with session_of(make("llama"), lora, dtype=dtype) as session:
            losses.append(session.evaluate([batch]))
    assert losses[0] == losses[1]


def test_an_adapter_is_gone_on_with(tmp_path: Path) -> None:
    """One that peft has made and trained."""
    made = peft_model(make("llama"), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]))
    train_peft(made, rows_of(3))
    made.save_pretrained(tmp_path / "peft")
    (batch,) = rows_of(1)
    with session_of(make("llama"), tmp_path / "peft") as session:
        with torch.no_grad():
            torch.testing.assert_close(session.evaluate([batch]), float(made(**batch, labels=batch["input_ids"]).loss), rtol=1e-5, atol=1e-5)
        found = written(session, tmp_path / "ratel")
        session.step(batch)
        later = written(session, tmp_path / "later")
    expected = peft_tensors(made)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(torch.equal(later[name], found[name]) for name in found)
    load_in_peft(make("llama"), tmp_path / "later")


@pytest.mark.parametrize("init", ("pissa", "olora"))
def test_what_changes_the_base_is_given_for_the_base_as_it_was(tmp_path: Path, init: str) -> None:
    data = rows_of(4)
    with session_of(make("gpt2"), LoraConfig(rank=4, init=init)) as session:
        for batch in data:
            session.step(batch)
        trained = session.evaluate([data[0]])
        written(session, tmp_path / "adapter")
    loaded = load_in_peft(make("gpt2"), tmp_path / "adapter")
    with torch.no_grad():
        found = float(loaded(**data[0], labels=data[0]["input_ids"]).loss)
    assert abs(found - trained) < 2e-5
    with session_of(make("gpt2"), 4) as session:
        assert abs(session.evaluate([data[0]]) - trained) > 1e-2


@pytest.mark.parametrize("init", ("default", "pissa"))
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, init: str) -> None:
    lora, data = LoraConfig(rank=4, dropout=0.2, init=init), rows_of(5)
    results = []
    for parts in ((data,), (data[:2], data[2:])):
        for number, part in enumerate(parts):
            with session_of(make("llama"), lora, tier="ssd", ssd=[tmp_path / "ssd"], max_grad_norm=0.5) as session:
                if number:
                    session.load(tmp_path / "state")
                losses = [session.step(batch).loss for batch in part]
                session.save(tmp_path / "state")
                tensors = written(session, tmp_path / "adapter")
        results.append((losses[-1], tensors))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())
    held = sum(file.stat().st_size for file in (tmp_path / "state").rglob("*") if file.is_file())
    parameters = sum(tensor.numel() for tensor in tensors.values()) // (1 if init == "default" else 2)
    assert held < 12 * parameters + (1 << 18)  # the adapter's states alone: the base has 40,000 parameters, 480 kB


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    data = batches("patches", 3)
    names = [name for name, module in build("patches").named_modules() if isinstance(module, nn.Linear) and "out_proj" not in name]
    with session_of(build("patches"), LoraConfig(rank=2, targets=tuple(names), dropout=0.1), loss_fn=loss_fn_of("patches")) as session:
        losses = [session.step(batch).loss for batch in data + data]
        tensors = written(session, tmp_path / "adapter")
    assert len(tensors) == 2 * len(names) and all(tensor.abs().sum() for tensor in tensors.values())
    assert losses[-1] < losses[0]


def test_a_linear_that_is_not_called_is_refused() -> None:
    """PyTorch's attention reads the weight of its last linear; peft trains nothing there and says
    nothing."""
    with pytest.raises(RatelError, match="lora_targets: .* its weight is read past it.*out_proj.*Leave it out"):
        with session_of(build("patches"), LoraConfig(rank=2, targets=("out_proj",)), loss_fn=loss_fn_of("patches")) as session:
            session.step(batches("patches", 1)[0])


def test_every_adapter_was_trained(tmp_path: Path) -> None:
    with session_of(make("llama"), LoraConfig(rank=4, full=("lm_head",))) as session:
        first = written(session_started(session), tmp_path / "first")
        for batch in rows_of(2):
            session.step(batch)
        last = written(session, tmp_path / "last")
    assert "base_model.model.lm_head.weight" in last
    assert [name for name in last if torch.equal(first[name], last[name])] == []


def test_the_base_has_the_name_that_merging_looks_for(tmp_path: Path) -> None:
    """The name is of all of its parameters, those that nothing uses included."""
    model = make("llama")
    model.left_over = nn.Linear(5, 5)
    parts = load(model, dtype=torch.float32, device=torch.device("cpu"))
    expected = base_fingerprint(parts)
    parts.close()
    with session_of(model, LoraConfig(rank=4, init="pissa", full=("lm_head",))) as session:
        assert session._core.adaptation.fingerprint() == expected
        assert written(session_started(session), tmp_path / "adapter").keys() >= {"base_model.model.left_over.lora_A.weight"}


def test_a_module_that_nothing_uses_is_stored_as_it_was(tmp_path: Path) -> None:
    model = make("llama")
    model.left_over = nn.Linear(5, 5)
    with session_of(model, LoraConfig(rank=4, full=("left_over",))) as session:
        session.step(rows_of(1)[0])
        tensors = written(session, tmp_path / "adapter")
    assert torch.equal(tensors["base_model.model.left_over.weight"], model.left_over.weight)


def test_the_state_of_an_adapter_that_names_what_is_not_there_is_exported(tmp_path: Path) -> None:
    """peft takes names that fit nothing, and what it has made is gone on with."""
    model = make("llama")
    model.save_pretrained(tmp_path / "base")
    made = peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "query_key_value"]))
    made.save_pretrained(tmp_path / "peft")
    with session_of(str(tmp_path / "base"), tmp_path / "peft") as session:
        session.step(rows_of(1)[0])
        expected = written(session, tmp_path / "adapter")
        session.save(tmp_path / "state")
    export_state(tmp_path / "state", tmp_path / "out", model=str(tmp_path / "base"))
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
