"""Buffers and extra state belong to the model: trained with, saved, resumed, exported, given
back."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from ratel.errors import RatelError
from ratel.runtime.session.session import Session
from ratel.runtime.states.saved_state import SavedState
from ratel.training.export_state import export_state
from tests.models.test_loading import configs, write

pytestmark = pytest.mark.e2e


class Scaled(nn.Module):
    """A block with a persistent buffer, one that is not, and an extra state that forward uses."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("scale", torch.full((16,), 1.0 + number / 3))
        self.register_buffer("shift", torch.full((16,), 0.25), persistent=False)
        self.factor: Any = {"factor": 1.0 + number}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.linear(hidden) * self.scale + self.shift) * self.factor["factor"]

    def get_extra_state(self) -> Any:
        return self.factor

    def set_extra_state(self, state: Any) -> None:
        self.factor = state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(16))
        self.register_buffer("seen", torch.tensor(7))
        self.blocks = nn.ModuleList(Scaled(number) for number in range(3))
        self.head = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.offset
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def net(seed: int = 0, number: float = 0.5) -> Net:
    torch.manual_seed(seed)
    model = Net()
    model.offset.fill_(number)
    for block in model.blocks:
        block.scale.mul_(number + 0.3)
        block.set_extra_state({"factor": number, "note": "x", "table": torch.arange(3)})
    return model


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(4, 16, generator=generator), "y": torch.randn(4, 1, generator=generator)}


def opened(model: nn.Module, **options: Any) -> Session:
    return Session(model, **{**dict(loss_fn=loss_fn, device="cpu", dtype="fp32", lr=1e-2, max_grad_norm=None), **options})


def test_the_routing_bias_of_a_directory_is_trained_with_and_exported(tmp_path: Path) -> None:
    model = write(configs()["deepseek-v3"], tmp_path / "in")
    biases = {n: b for n, b in model.state_dict().items() if n.endswith("e_score_correction_bias")}
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1))
    expected = model.eval()(input_ids=ids, labels=ids).loss.item()
    with Session(tmp_path / "in", dtype="fp32", device="cpu") as session:
        assert session.evaluate([{"input_ids": ids}]) == pytest.approx(expected, abs=1e-5)
        assert all(torch.equal(session.state_dict()[name], bias) for name, bias in biases.items())
        session.export(tmp_path / "out", dtype="fp32")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert biases and all(torch.equal(exported[name], bias) for name, bias in biases.items())


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "commit"])
def test_a_state_keeps_what_changed_between_steps(in_place: bool, ssd_dir: Path, tmp_path: Path) -> None:
    """Buffers that the user's program moves (loads of experts) are of the step that they were saved
    with."""
    options = dict(ssd=[ssd_dir], tier="ssd", durable="step", commits=tmp_path / "s") if in_place else {}
    model = net()
    with opened(model, **options) as session:
        for number in range(3):
            session.step(batch(number))
            model.blocks[1].scale.add_(0.125)
            model.blocks[2].factor = {"factor": 2.0 + number}
            session.commit(wait=True) if in_place else session.save(tmp_path / "s")
        saved = session.state_dict()
        expected = [session.step(batch(9)).loss for _ in range(2)]
    assert SavedState(tmp_path / "s").verify() > 0
    assert 1 <= len(list((tmp_path / "s").glob("buffers-*"))) <= 2
    with opened(net(seed=5, number=0.9), **options) as session:
        session.load(tmp_path / "s")
        losses = [session.step(batch(9)).loss]
        assert session.parts.module.blocks[2].factor == {"factor": 4.0}
        assert torch.equal(session.state_dict()["blocks.1.scale"], saved["blocks.1.scale"])
        losses.append(session.step(batch(9)).loss)
    assert losses == expected


def test_damage_to_buffers_is_found(tmp_path: Path) -> None:
    with opened(net()) as session:
        session.step(batch())
        session.save(tmp_path / "s")
    file = next((tmp_path / "s").glob("buffers-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RatelError, match="is damaged: buffers"):
        SavedState(tmp_path / "s").verify()
    with opened(net()) as session, pytest.raises(RatelError, match="is damaged: buffers"):
        session.load(tmp_path / "s")


def test_a_state_of_a_model_with_other_buffers_is_refused(tmp_path: Path) -> None:
    with opened(net()) as session:
        session.step(batch())
        session.save(tmp_path / "s")
    other = net()
    del other.blocks[0]._buffers["scale"]
    other.blocks[0].scale = 1.0
    with opened(other) as session, pytest.raises(RatelError, match="has not the buffers .*blocks.0.scale"):
        session.load(tmp_path / "s")


def test_an_export_of_a_module_has_all_of_its_state_dict(tmp_path: Path) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    with opened(model, dtype="bf16") as session:
        session.step(batch())
        session.export(tmp_path / "out", dtype="fp32")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == model.state_dict().keys()
    for name in ("offset", "seen", "blocks.0.scale"):
        assert torch.equal(exported[name], before[name]), name
        assert torch.equal(model.state_dict()[name], before[name]), "given back with the precision that it had"


def test_a_buffer_that_was_changed_is_given_back_changed() -> None:
    model = net()
    with opened(model, dtype="bf16") as session:
        session.step(batch())
        model.blocks[0].scale.add_(1)
        changed = model.blocks[0].scale.float().clone()
    assert model.blocks[0].scale.dtype is torch.float32 and torch.equal(model.blocks[0].scale, changed)


def test_an_extra_state_that_no_save_could_keep_is_refused_at_once() -> None:
    model = net()
    model.blocks[0].set_extra_state({"factor": 1.0, "rule": lambda x: x})
    with pytest.raises(RatelError, match="blocks.0._extra_state") as caught:
        opened(model)
    assert "get_extra_state" in str(caught.value) and model(batch()["x"]).shape == (4, 1)


def test_an_export_from_a_state_has_the_buffers_of_the_state(tmp_path: Path) -> None:
    import ratel

    write(configs()["deepseek-v3"], tmp_path / "in")
    batches = [{"input_ids": torch.randint(3, 96, (2, 16))} for _ in range(2)]
    ratel.train(str(tmp_path / "in"), batches, steps=2, batch_size=2, seq_len=16, dtype="fp32", device="cpu", save_every=1,
                out=str(tmp_path / "run"), quiet=True)
    export_state(tmp_path / "run", tmp_path / "out", dtype="fp32")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "run/model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(loaded.state_dict()[name], load_file(tmp_path / "in" / "model.safetensors")[name])
