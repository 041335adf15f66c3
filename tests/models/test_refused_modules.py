"""Modules that cannot be trained rightly are refused, with the reason and what to do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models import load
from tests.models.test_modules import Layer, PatchRegression, loss_fn, make_patch_model
from tests.support.models import CPU, configs, make_batch
from tests.support.refused_models import refused

pytestmark = pytest.mark.unit


# --- modules --------------------------------------------------------------------------------------------------------


class Odd(PatchRegression):
    """A model whose forward is given by the test."""

    def __init__(self, run: Callable[["Odd", Tensor], Tensor], layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__([layer() for _ in range(3)], with_bias=False)
        self.run = run

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.norm(self.run(self, self.embed(patches) + self.position)))


def changed_between(model: Odd, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = 0.5 * layer(scale=1.0, hidden=x)[0]
    return x


def changed_in_place(model: Odd, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(scale=1.0, hidden=x)[0]
        x += 1
    return x


def skip_around(model: Odd, x: Tensor) -> Tensor:
    first = x * 2
    x = first
    for layer in model.layers:
        x, _ = layer(scale=1.0, hidden=x)
    return x + first


def intermediate_outputs(model: Odd, x: Tensor) -> Tensor:
    seen = []
    for layer in model.layers:
        x, _ = layer(scale=1.0, hidden=x)
        seen.append(x)
    return seen[0] + seen[-1]


def argument_from_a_block(model: Odd, x: Tensor) -> Tensor:
    bias = None
    for layer in model.layers:
        x, _ = layer(scale=1.0, hidden=x, bias=bias)
        bias = x.mean(0) @ x.mean(0).T
    return x


def last_output_unused(model: Odd, x: Tensor) -> Tensor:
    y = x
    for layer in model.layers:
        y, _ = layer(scale=1.0, hidden=y)
    return model.position.sum() + y.detach()


def without_gradient(model: Odd, x: Tensor) -> Tensor:
    with torch.no_grad():
        return plainly(model, x)


def only_one_block(model: Odd, x: Tensor) -> Tensor:
    return model.layers[0](scale=1.0, hidden=x)[0]


def plainly(model: Odd, x: Tensor) -> Tensor:
    for layer in model.layers:
        x, _ = layer(scale=1.0, hidden=x)
    return x


@pytest.mark.parametrize("run, reason", [
    (changed_between, "changed before the next block"), (changed_in_place, "changed in place"),
    (skip_around, "skip connection"), (intermediate_outputs, "earlier block"),
    (argument_from_a_block, "computed from another block's output"), (last_output_unused, "last block's output"),
    (without_gradient, "no gradient"), (only_one_block, "called 1 of the blocks"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_forwards_that_do_more_than_pass_hidden_states_along(run: Callable[..., Tensor], reason: str) -> None:
    refused(f"cannot be run one block at a time: .*{reason}", Odd(run), loss_fn=loss_fn)


class TwoOutputs(Layer):
    def forward(self, *, scale: float, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(scale=scale, hidden=hidden, bias=bias)[0], hidden.mean(0)[:, :PATCH_COUNT]


PATCH_COUNT = 6


def two_tensors_along(model: Odd, x: Tensor) -> Tensor:
    bias = None
    for layer in model.layers:
        x, bias = layer(scale=1.0, hidden=x, bias=bias)
    return x


class FindsItsBias(Layer):
    """Takes what the model has left in an attribute of the class."""

    bias: Tensor

    def forward(self, *, scale: float, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, None]:
        return super().forward(scale=scale, hidden=hidden, bias=FindsItsBias.bias)


def left_in_an_attribute(model: Odd, x: Tensor) -> Tensor:
    FindsItsBias.bias = model.position @ model.position.T
    return plainly(model, x)


def test_a_block_that_finds_what_it_is_not_given() -> None:
    try:
        refused("uses something computed before it that is not among its arguments .*Hand it to the block",
                Odd(left_in_an_attribute, FindsItsBias), loss_fn=loss_fn)
    finally:
        del FindsItsBias.bias


def auxiliary_loss(model: Odd, x: Tensor) -> Tensor:
    extra = 0.0
    for layer in model.layers:
        x, more = layer(scale=1.0, hidden=x)
        extra = extra + more.sum()
    return x + extra


def test_blocks_that_return_more_than_hidden_states() -> None:
    refused("more than one tensor", Odd(two_tensors_along, TwoOutputs), loss_fn=loss_fn)
    refused("earlier block|more of a block's output", Odd(auxiliary_loss, TwoOutputs), loss_fn=loss_fn)


class Counting(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *, scale: float, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, None]:
        self.calls += 1
        return super().forward(scale=scale, hidden=hidden, bias=bias)


def test_a_buffer_that_forward_writes_to() -> None:
    error = refused("forward writes to the buffer", Odd(plainly, Counting), loss_fn=loss_fn)
    assert error.value == "layers.0.calls"


def test_batch_normalization() -> None:
    model = make_patch_model()
    model.layers[1].mlp.add_module("bn", nn.BatchNorm1d(6))
    refused("batch normalization", model, loss_fn=loss_fn)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float64])
def test_parameters_an_fp32_master_cannot_hold(dtype: torch.dtype) -> None:
    model = make_patch_model()
    model.layers[0].extra = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    refused("fp32 master", model, loss_fn=loss_fn)


def test_no_repeated_blocks() -> None:
    refused("no repeated blocks found", nn.Sequential(nn.Linear(5, 5), nn.Conv1d(5, 5, 1)), loss_fn=loss_fn)
    model = make_patch_model()
    model.huge = nn.Linear(1000, 100)
    refused("no repeated blocks found", model, loss_fn=loss_fn)


def test_a_module_without_a_loss() -> None:
    assert refused("how to compute its loss", make_patch_model()).field == "loss_fn"


def test_nothing_to_train() -> None:
    refused("nothing to train", make_patch_model().requires_grad_(False), loss_fn=loss_fn)


def test_meta_modules_that_cannot_be_given_values() -> None:
    with torch.device("meta"):
        model = make_patch_model()
    model.frequencies = torch.empty(16, device="meta")
    refused("the buffer has no values", model, loss_fn=loss_fn)
    model.frequencies = torch.ones(16)
    refused("no reset_parameters", model, loss_fn=loss_fn)


def test_modules_whose_weights_are_partly_elsewhere() -> None:
    model = make_patch_model()
    model.layers[1].to("meta")
    refused("are elsewhere", model, loss_fn=loss_fn)


def test_a_refused_module_is_left_as_it_was() -> None:
    model = make_patch_model().eval()
    weight = model.head.weight.detach().clone()
    model.layers[2].mlp.add_module("bn", nn.BatchNorm1d(6))
    refused("batch normalization", model, loss_fn=loss_fn)
    del model.layers[2].mlp.bn
    model.register_buffer("lost", torch.empty(3, device="meta"))
    refused("no values", model, loss_fn=loss_fn)
    assert torch.equal(model.head.weight, weight) and not model.training
    assert not any("forward" in vars(m) for m in model.modules())


def test_layer_dropping_is_noticed_when_it_happens() -> None:
    from transformers import AutoModelForCausalLM

    config = configs()["opt"]()
    config.layerdrop = 0.9
    with pytest.raises(RatelError, match="layer dropping|called . of the blocks|changed before"):
        parts = load(AutoModelForCausalLM.from_config(config), dtype=torch.float32, device=CPU)
        for _ in range(20):
            parts.head(make_batch())
