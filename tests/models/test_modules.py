"""Modules that people write themselves: any loss, any arguments to the blocks, any sharing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratel.models import Parts, load
from tests.support.models import CPU, attach_all, make_batch, make_model, named, plain_copy, vertical_pass

pytestmark = pytest.mark.numerics

WIDTH, PATCHES = 16, 6


class Layer(nn.Module):
    """Pre-norm attention and MLP. Takes the hidden states by keyword and returns a tuple, as some
    models do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH), nn.Dropout(dropout))

    def forward(self, *, scale: float, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, None]:
        # Written out: torch's fused attention takes another kernel, of other rounding, if the mask
        # needs a gradient.
        q, k, v = self.qkv(self.norm1(hidden)).chunk(3, -1)
        scores = q @ k.transpose(1, 2) * WIDTH ** -0.5
        attended = (scores if bias is None else scores + bias).softmax(-1) @ v
        hidden = hidden + scale * self.out(attended)
        return hidden + self.mlp(self.norm2(hidden)), None


class PatchRegression(nn.Module):
    """Predicts a vector per patch. A raw position parameter, and a bias all blocks share, computed
    before them."""

    def __init__(self, layers: list[nn.Module], *, with_bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.position = nn.Parameter(torch.randn(PATCHES, WIDTH) * 0.1)
        self.bias = nn.Parameter(torch.randn(PATCHES, PATCHES)) if with_bias else None
        self.register_buffer("frequencies", torch.linspace(0.1, 1, WIDTH))
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embed(patches) + self.position + self.frequencies
        bias = None if self.bias is None else self.bias.tanh()
        for number, layer in enumerate(self.layers):
            x, _ = layer(scale=1 / (number + 1), hidden=x, bias=bias)
        return self.head(self.norm(x))


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["patches"]).float(), batch["targets"])


def make_patches(rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"patches": torch.randn(rows, PATCHES, 5, generator=generator),
            "targets": torch.randn(rows, PATCHES, 3, generator=generator)}


def make_patch_model(**settings: Any) -> PatchRegression:
    torch.manual_seed(0)
    return PatchRegression([Layer(dropout=0.1) for _ in range(3)], **settings)


def open_parts(model: nn.Module, dtype: torch.dtype = torch.float32, batch: Any = None,
               loss: Callable[..., Tensor] = loss_fn) -> Parts:
    parts = load(model, dtype=dtype, device=CPU, loss_fn=loss)
    parts.stored.check_source()
    parts.probe(make_patches() if batch is None else batch)
    return parts


def compare(model: nn.Module, batch: Any, dtype: torch.dtype = torch.float32,
            loss: Callable[..., Tensor] = loss_fn, cast: Callable[[Any], Any] = lambda b: b) -> Parts:
    """Loss and gradients of a vertical pass against plain autograd, bitwise."""
    plain = plain_copy(model, dtype)
    parts = open_parts(model, dtype, batch, loss)
    _, grads = attach_all(parts)
    torch.manual_seed(1)
    expected = loss(plain, cast(batch))
    expected.backward()
    torch.manual_seed(1)
    assert torch.equal(vertical_pass(parts, batch), expected.detach())
    got = named(parts, grads, trained_only=True)
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad and p.grad is not None}
    assert set(got) == set(wanted)
    for name, grad in wanted.items():
        assert torch.equal(got[name], grad), name
    return parts


def test_a_hand_written_transformer_with_a_loss() -> None:
    parts = compare(make_patch_model(), make_patches())
    kinds = {u.name: {p.name for p in u.params} for u in parts.spec.units}
    assert kinds["pre"] == {"embed.weight", "embed.bias", "position", "bias"}
    assert kinds["post"] == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert len(parts.head(make_patches())[1].differentiable) == 1


def test_in_bf16_the_inputs_of_the_module_are_cast_and_the_targets_are_not() -> None:
    model = make_patch_model()
    model.frequencies = model.frequencies.bfloat16()  # what plain .to(bf16) does, and load too
    parts = compare(model, make_patches(), torch.bfloat16,
                    cast=lambda b: {"patches": b["patches"].bfloat16(), "targets": b["targets"]})
    assert parts.module.frequencies.dtype is torch.bfloat16


def test_without_a_learned_bias_nothing_before_the_blocks_is_differentiable_but_the_hidden_states() -> None:
    parts = compare(make_patch_model(with_bias=False), make_patches())
    hidden, inputs = parts.head(make_patches())
    assert inputs.differentiable == [] and inputs.with_leaves() is inputs
    assert len(parts.pre(make_patches())) == 1


def test_frozen_parameters_have_no_gradient_and_come_last() -> None:
    model = make_patch_model()
    for param in (model.embed.weight, model.bias, *model.layers[1].qkv.parameters(), *model.layers[2].parameters()):
        param.requires_grad_(False)
    parts = compare(model, make_patches())
    units = {u.name: u for u in parts.spec.units}
    assert units["block.2"].num_trainable == 0 and units["block.2"].num_params > 0
    assert {p.name for p in units["block.1"].params if not p.trainable} == {"layers.1.qkv.weight", "layers.1.qkv.bias"}
    assert all(p.offset >= u.num_trainable for u in units.values() for p in u.params if not p.trainable)
    assert parts.head(make_patches())[1].differentiable == []  # nothing trained is behind the bias any more
    parts.close()
    assert not model.bias.requires_grad and model.position.requires_grad


def test_one_layer_used_three_times_is_one_shared_unit() -> None:
    torch.manual_seed(0)
    layer = Layer()
    parts = compare(PatchRegression([layer, layer, layer]), make_patches())
    assert [u.name for u in parts.spec.units] == ["pre", "post", "shared"]
    assert [s.units for s in parts.spec.stages] == [(0,), (2,), (2,), (2,), (1,)]
    shared = {p.name: p.aliases for p in parts.spec.units[2].params}
    assert shared["layers.0.qkv.weight"] == ("layers.1.qkv.weight", "layers.2.qkv.weight")


class Looped(PatchRegression):
    """Goes through its layers twice."""

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embed(patches) + self.position
        for layer in (*self.layers, *self.layers):
            x, _ = layer(scale=1.0, hidden=x)
        return self.head(self.norm(x))


def test_a_loop_over_the_layers_makes_a_stage_of_every_call() -> None:
    torch.manual_seed(0)
    parts = compare(Looped([Layer(), Layer()], with_bias=False), make_patches())
    assert parts.num_blocks == 4 and parts.spec.units[-1].name == "shared"


def test_a_matrix_that_only_two_blocks_share() -> None:
    model = make_patch_model()
    model.layers[2].out.weight = model.layers[0].out.weight
    parts = compare(model, make_patches())
    assert [p.name for p in parts.spec.units[-1].params] == ["layers.0.out.weight"]
    users = [s.name for s in parts.spec.stages if parts.spec.units[-1].index in s.units]
    assert users == ["block.0", "block.2"]


class EarlyScale(PatchRegression):
    """Takes a learned scale first and uses it last."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers, with_bias=False)
        self.log_scale = nn.Parameter(torch.tensor([0.3]))

    def forward(self, patches: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        return super().forward(patches) * scale


def penalized_first(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    penalty = sum(param.square().sum() for param in model.parameters())
    return loss_fn(model, batch) + 1e-3 * penalty


def penalized_last(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = loss_fn(model, batch)
    return loss + 1e-3 * sum(param.square().sum() for param in model.parameters())


@pytest.mark.parametrize("loss", [loss_fn, penalized_first, penalized_last])
def test_what_is_computed_before_the_blocks_and_used_after_them(loss: Callable) -> None:
    """The tail has no weights of other stages, and runs what comes before the blocks without
    gradient, unless it must."""
    torch.manual_seed(0)
    compare(EarlyScale([Layer() for _ in range(3)]), make_patches(), loss=loss)


class Assembled(nn.Module):
    """Writes parts of a new tensor one by one, some of them small, as models that put keys together
    do."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.back = nn.Linear(WIDTH, 60), nn.Linear(WIDTH, 4), nn.Linear(64, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = hidden.new_empty(*hidden.shape[:-1], 64)
        parts[..., :60].copy_(self.wide(hidden))
        parts[..., 60:].copy_(self.narrow(hidden))
        return hidden + self.back(parts.tanh())


def test_a_block_that_writes_small_parts_of_a_large_tensor() -> None:
    model = nn.Sequential(nn.Linear(12, WIDTH), *(Assembled() for _ in range(3)), nn.Linear(WIDTH, 2))
    batch = {"x": torch.randn(40, PATCHES, 12), "y": torch.randn(40, PATCHES, 2)}
    compare(model, batch, loss=lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"]))


class Positions(PatchRegression):
    """Converts its table of positions when it is called, and remembers what follows from it, as
    CTRL and others do."""

    def __init__(self) -> None:
        super().__init__([Layer() for _ in range(3)])
        self.register_buffer("table", torch.randn(400, WIDTH))

    def forward(self, patches: Tensor) -> Tensor:
        self.table = self.table.float()
        if not hasattr(self, "remembered"):
            self.remembered = self.table.cumsum(0)
        return super().forward(patches) * (self.table + self.remembered).std()


def test_what_a_module_assigns_to_itself_in_outline_is_taken_back() -> None:
    torch.manual_seed(0)
    model, batch = Positions(), make_patches()
    plain = plain_copy(model, torch.bfloat16)
    plain.table, plain.frequencies = plain.table.bfloat16(), plain.frequencies.bfloat16()
    expected = loss_fn(plain, {**batch, "patches": batch["patches"].bfloat16()})
    parts = open_parts(model, torch.bfloat16, batch)
    attach_all(parts)
    assert torch.equal(vertical_pass(parts, batch), expected.detach())


def test_an_activation_that_models_share_is_no_reason_to_refuse_the_second() -> None:
    activation = nn.GELU()

    def model() -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(5, 5), activation) for _ in range(3)]
        return nn.Sequential(nn.Linear(5, 5), *blocks, nn.Linear(5, 3))

    first, second = open_parts(model()), open_parts(model())
    first.close(), second.close()


def test_a_sequential_of_everything() -> None:
    torch.manual_seed(0)
    block = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(nn.Linear(5, WIDTH), *block, nn.Linear(WIDTH, 3))
    parts = compare(model, make_patches())
    assert [u.name for u in parts.spec.units] == ["pre", *(f"block.{i}" for i in range(4)), "post"]


class WithLeftovers(PatchRegression):
    """A head that nothing calls, and one whose output goes nowhere."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.never_called, self.ignored = nn.Linear(WIDTH, 40), nn.Linear(3, 3)

    def forward(self, patches: Tensor) -> Tensor:
        result = super().forward(patches)
        self.ignored(result)
        return result


def test_parameters_the_loss_does_not_use_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = WithLeftovers([Layer() for _ in range(3)])
    before = copy.deepcopy(model)
    parts = compare(model, make_patches())
    assert parts.unused is not None and {p.name for p in parts.unused.params} == {"never_called.weight",
                                                                                   "never_called.bias"}
    assert not any(p.trainable for u in parts.spec.units for p in u.params if p.name.startswith("ignored"))
    assert "never_called" in caplog.text and "ignored" in caplog.text
    layout = parts.stored.export_layout(torch.float32)
    assert {name for unit in (*layout.units, *layout.unused) for name in unit.stored_names} == {n for n, _ in before.named_parameters()}

    parts.stored.restore(lambda unit: torch.ones(unit.num_elements))
    parts.close()
    assert torch.equal(model.never_called.weight, before.never_called.weight)
    assert torch.equal(model.ignored.weight, before.ignored.weight)
    assert torch.equal(model.head.weight, torch.ones(3, WIDTH))


def test_decay_leaves_out_vectors_norms_and_biases() -> None:
    parts = open_parts(make_patch_model())
    decayed = {p.name for u in parts.spec.units for p in u.params if p.decay}
    assert {"embed.weight", "position", "layers.0.qkv.weight", "head.weight"} <= decayed
    assert not {n for n in decayed if "norm" in n or n.endswith("bias")}
    for unit in parts.spec.units:
        assert all((p.offset < unit.num_decay) == p.decay for p in unit.params)


def test_a_causal_model_with_a_loss_of_ones_own() -> None:
    def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return -logits.log_softmax(-1)[..., 5].mean()

    parts = compare(make_model("llama-tied-bias"), make_batch(), loss=own_loss)
    assert not parts.is_causal_lm


def test_a_compiled_module_is_taken_apart_inside() -> None:
    model = make_patch_model()
    assert open_parts(torch.compile(model)).module is model


def test_the_example_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip() == str(["pre", "block.0", "block.1", "block.2", "block.3", "post"])
