"""A module that was given to a session has its own modules again afterwards, also where it could not
be adapted."""

import pytest
import torch
from torch import Tensor, nn

from ratel import RatelError, Session

pytestmark = pytest.mark.unit


class Mix(nn.Module):
    """Has both: a parameter that takes an adapter, and a linear that does."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.gate = nn.Parameter(torch.randn(2, 8, 8) / 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) @ self.stack[0] + x @ self.stack[1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x)


class Own(nn.Module):
    def __init__(self, max_norm: float | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8, max_norm=max_norm), nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).logsumexp(-1).mean()


def test_a_linear_inside_of_a_module_whose_parameter_is_adapted_is_given_back() -> None:
    model = Own()
    modules, values = dict(model.named_modules()), {name: value.clone() for name, value in model.state_dict().items()}
    batch = torch.arange(8).view(1, 8)
    adapter = dict(lora=2, lora_targets=("gate",), lora_parameters=("mix.stack",))
    with Session(model, loss_fn=loss, device="cpu", dtype="fp32", **adapter) as session:
        session.step(batch)
    _assert_as_it_came(model, modules, values)


def test_a_module_that_cannot_be_adapted_is_as_it_came() -> None:
    """The head's adapter is on before the embedding is refused."""
    model = Own(max_norm=1.0)
    modules, values = dict(model.named_modules()), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RatelError, match="max_norm"):
        Session(model, loss_fn=loss, lora=2, lora_targets=("embed", "head"), device="cpu", dtype="fp32")
    _assert_as_it_came(model, modules, values)


def _assert_as_it_came(model: nn.Module, modules: dict[str, nn.Module], values: dict[str, Tensor]) -> None:
    found = dict(model.named_modules())
    assert found.keys() == modules.keys() and all(found[name] is modules[name] for name in modules)
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
