"""Adapters of every kind on models of transformers: what peft computes, and its gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.lora.compute import Draws, adapt_layers
from ratel.lora.describe.layers import AdaptedLayer
from ratel.lora.describe.outline import outline_of
from ratel.lora.describe.peft_config import of_object
from ratel.lora.describe.targets import Targets, resolve
from ratel.runtime.blocks.op_trace import trace
from tests.support.lora import logits, make, peft_model, tokens, trained

pytestmark = pytest.mark.numerics
peft = pytest.importorskip("peft", minversion="0.21")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linears": ("llama", dict(target_modules="all-linear")),
    "conv1d": ("gpt2", dict(target_modules="all-linear", use_rslora=True)),
    "mixtral": ("mixtral", dict(target_modules="all-linear")),
    "gpt_oss": ("gpt_oss", dict(target_modules=["o_proj"], target_parameters=EXPERTS, rank_pattern={"down_proj": 5})),
    "one of two": ("gpt_oss", dict(target_modules=[], target_parameters=["experts.down_proj"], use_rslora=True)),
    "routers": ("qwen3_moe", dict(target_modules=[], target_parameters=["gate.weight", *EXPERTS])),
    "shared experts": ("qwen2_moe", dict(target_modules=["gate_proj"], target_parameters=EXPERTS)),
    "parameter of a linear": ("llama", dict(target_modules=[], target_parameters=["o_proj.weight"])),
    "embedding": ("llama", dict(target_modules=["q_proj", "embed_tokens"], use_rslora=True)),
    "scaled embedding": ("gemma3", dict(target_modules=["embed_tokens", "v_proj"])),
    "positions": ("gpt2", dict(target_modules=["wpe", "wte", "c_fc"])),
    "tied head": ("qwen3", dict(target_modules=["lm_head", "q_proj"], ensure_weight_tying=True)),
    "scaled tied head": ("gemma3", dict(target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "tied head of gpt2": ("gpt2", dict(target_modules=["lm_head", "c_attn"], ensure_weight_tying=True)),
    "head": ("qwen3", dict(target_modules=["lm_head"])),
    "dora": ("llama", dict(target_modules="all-linear", use_dora=True, use_rslora=True)),
    "dora of conv1d": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], use_dora=True)),
    "dora of embeddings": ("gemma3", dict(target_modules=["embed_tokens", "k_proj"], use_dora=True)),
    "dora of positions": ("gpt2", dict(target_modules=["wpe", "c_fc"], use_dora=True)),
}
EXPERT_MODELS = ("mixtral", "gpt_oss", "qwen3_moe", "qwen2_moe")


class Both:
    """Our model and peft's with the same adapter; their adapters' parameters by the file's names."""

    def __init__(self, case: str, dtype: torch.dtype, experts: str = "grouped_mm", weights: torch.dtype | None = None) -> None:
        """``weights``: what the base was rounded to, if not to the dtype of the computation."""
        name, arguments = CASES[case]
        given = peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **arguments})
        self.ours, theirs = (make(name, weights or dtype).to(dtype) for _ in range(2))
        self.targets = resolve(of_object(given), outline_of(self.ours))
        stored = trained(self.targets)
        if name in EXPERT_MODELS:
            for model in (self.ours, theirs):
                model.set_experts_implementation(experts)
        self.peft = peft_model(theirs, given)
        for layer in self.targets.layers:
            if layer.magnitude_name is not None:  # near what they begin as, or the model would be another
                vector = self._peft_module(layer).lora_magnitude_vector["default"].weight.detach().float()
                stored[layer.magnitude_name] = vector * (0.9 + 0.2 * stored[layer.magnitude_name])
        assert not peft.set_peft_model_state_dict(self.peft, dict(stored)).unexpected_keys
        for layer, first in self._ties():  # in bf16 peft's two ends do not share their memory
            self._peft_module(layer).lora_A["default"].weight.data.copy_(stored[first.b_name].t())
            self._peft_module(layer).lora_B["default"].weight.data.copy_(stored[first.a_name].t())
        own = {own: in_file for layer in self.targets.layers for own, in_file in layer.added.items()}
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {name: stored[in_file].to(wide) for name, in_file in own.items()}
        adapt_layers(self.ours, self.targets.layers, tensors, draws=Draws(seed=0))
        parameters = dict(self.ours.named_parameters())
        self.leaves = {in_file: parameters[name] for name, in_file in own.items()}
        assert {name for name, parameter in parameters.items() if parameter.requires_grad and "lora_" in name} == own.keys()

    def _peft_module(self, layer: AdaptedLayer) -> nn.Module:
        return self.peft.base_model.model.get_submodule(layer.name)

    def _ties(self) -> list[tuple[AdaptedLayer, AdaptedLayer]]:
        """Heads, with the embedding whose tensors they have."""
        by_name = {layer.name: layer for layer in self.targets.layers}
        return [(layer, by_name[layer.tied_to]) for layer in self.targets.layers if layer.tied_to]

    def inputs(self) -> Tensor | None:
        """Embedded tokens, where no embedding is adapted."""
        if any(layer.kind == "embedding" for layer in self.targets.layers):
            return None
        width = self.ours.get_input_embeddings().weight.shape[1]
        return torch.randn(2, 7, width, generator=torch.Generator().manual_seed(1))

    def found(self) -> dict[str, Tensor]:
        return results(self.ours, self.leaves, self.inputs())

    def expected(self) -> dict[str, Tensor]:
        """A head that is tied has parameters of its own in peft, in the memory of the embedding's."""
        leaves = {name.replace(".default", "").replace("vector.weight", "vector"): parameter
                  for name, parameter in self.peft.named_parameters() if parameter.requires_grad}
        found = results(self.peft, leaves, self.inputs())
        for layer, first in self._ties():
            found[first.a_name] = found[first.a_name] + found.pop(layer.b_name).t()
            found[first.b_name] = found[first.b_name] + found.pop(layer.a_name).t()
        return found


def results(model: nn.Module, leaves: dict[str, nn.Parameter], inputs: Tensor | None) -> dict[str, Tensor]:
    """Logits, and gradients of a loss that all of them are part of: of adapters, and of embedded
    tokens."""
    wanted: dict[str, Tensor] = dict(leaves)
    if inputs is not None:
        wanted["inputs"] = inputs = inputs.to(next(model.parameters()).dtype).requires_grad_()
    out = model(input_ids=tokens()).logits if inputs is None else model(inputs_embeds=inputs).logits
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    grads = torch.autograd.grad((out.double() * weights).sum(), list(wanted.values()))
    return {"logits": out.detach(), **dict(zip(wanted, grads, strict=True))}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30))


def all_apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: apart(tensor, expected[name]) for name, tensor in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_computes_in_fp64(case: str) -> None:
    pair = Both(case, torch.float64, "eager")
    found = pair.found()
    assert max(all_apart(found, pair.expected()).values()) < 1e-12
    assert all(grad.count_nonzero() > 0 for grad in found.values())


@pytest.mark.parametrize("case", CASES)
def test_what_peft_computes_in_fp32(case: str) -> None:
    """Two layers and more round one after the other."""
    pair = Both(case, torch.float32)
    assert max(all_apart(pair.found(), pair.expected()).values()) < 3e-6


@pytest.mark.parametrize("experts", ("eager", "batched_mm"))
@pytest.mark.parametrize("case", ("mixtral", "gpt_oss", "one of two"))
def test_every_way_to_compute_experts(case: str, experts: str) -> None:
    pair = Both(case, torch.float32, experts)
    assert max(all_apart(pair.found(), pair.expected()).values()) < 3e-6


@pytest.mark.parametrize("case", CASES)
def test_what_peft_computes_in_bf16(case: str) -> None:
    """As near to the same in fp64 as peft is."""
    pair, exact = Both(case, torch.bfloat16, "eager"), Both(case, torch.float64, "eager", torch.bfloat16).found()
    found, expected = all_apart(pair.found(), exact), all_apart(pair.expected(), exact)
    assert sum(found.values()) < 1.5 * sum(expected.values())
    assert all(error < 3 * expected[name] for name, error in found.items())


@pytest.mark.parametrize("case", ("mixtral", "gpt_oss", "tied head", "dora of embeddings", "dora"))
def test_every_adapter_is_updated(case: str) -> None:
    """From what a new one begins with, in two steps: the gradient of the half that is not zero is
    zero in the first. Each expert of A and B has its update."""
    pair = Both(case, torch.float32)
    layers = [layer for layer in pair.targets.layers if layer.tied_to is None]
    with torch.no_grad():
        for layer in layers:
            pair.leaves[layer.a_name if layer.kind == "embedding" else layer.b_name].zero_()
    before = {name: leaf.detach().clone() for name, leaf in pair.leaves.items()}
    optimizer = torch.optim.AdamW(pair.leaves.values(), lr=1e-2, weight_decay=0)
    for _ in range(2):
        optimizer.zero_grad()
        pair.ours(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    changes = {name: leaf.detach() - before[name] for name, leaf in pair.leaves.items()}
    for layer in layers:
        assert changes[layer.a_name].view(layer.experts, -1).count_nonzero(1).min() > 0, layer.a_name
        assert changes[layer.b_name].view(-1, layer.experts).count_nonzero(0).min() > 0, layer.b_name
        assert layer.magnitude_name is None or changes[layer.magnitude_name].count_nonzero() > 0


@pytest.mark.parametrize("case", ("mixtral", "tied head", "dora of embeddings", "linears"))
def test_names_and_objects_of_the_base_stay(case: str) -> None:
    name, arguments = CASES[case]
    model = make(name)
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    expected = logits(model)
    targets = resolve(of_object(peft.LoraConfig(r=4, **arguments)), outline_of(model))
    shapes = {own: layer.file_shapes[in_file] for layer in targets.layers for own, in_file in layer.added.items()}
    tensors = {own: torch.ones(shape) for own, shape in shapes.items()}
    made = adapt_layers(model, targets.layers, tensors, draws=Draws(seed=0))
    after = dict(model.named_parameters())
    assert all(after[own] is parameter for own, parameter in before.items()) and after.keys() - before.keys() == tensors.keys()
    assert made.keys() == {layer.key for layer in targets.layers}
    assert all(model.get_submodule(layer.name) is made[layer.key] for layer in targets.layers)
    assert not any(after[layer.weight].requires_grad for layer in targets.layers if layer.weight in after)
    assert not torch.equal(logits(model), expected)
    for layer in targets.layers:
        parent, _, child = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), child, modules[layer.name])
    assert dict(model.named_parameters()).keys() == before.keys() and torch.equal(logits(model), expected)


def test_embeddings_keep_their_attributes_and_their_padding() -> None:
    targets = resolve(of_object(peft.LoraConfig(r=2, target_modules=["embed"])), outline_of(root := Embedded()))
    layer, = targets.layers
    own = root.embed
    values = {name: torch.randn(layer.file_shapes[in_file]) for name, in_file in layer.added.items()}
    module = adapt_layers(root, targets.layers, values, draws=Draws(seed=0))["embed"]
    assert isinstance(module, nn.Embedding) and module.weight is own.weight
    assert (module.padding_idx, module.num_embeddings, module.embedding_dim) == (1, 6, 4)
    ids = torch.tensor([[1, 2, 2], [5, 1, 0]])
    a, b = module.lora_A, module.lora_B
    plain = F.embedding(ids, own.weight + layer.scale * (b @ a).t(), padding_idx=1)
    found = root.embed(ids)
    torch.testing.assert_close(found, plain)
    dy = torch.randn_like(found)
    added = F.embedding(ids, (b @ a).t()) * layer.scale
    (da, db), (plain_da, plain_db) = (torch.autograd.grad(y, [a, b], dy) for y in (found, added))
    theirs = peft_model(root_of_peft := Embedded(), peft.LoraConfig(r=2, target_modules=["embed"])).base_model.model
    with torch.no_grad():
        root_of_peft.embed.base_layer.weight.copy_(own.weight)
        for which, values in (("A", a), ("B", b)):
            getattr(theirs.embed, f"lora_embedding_{which}")["default"].copy_(values)
    expected = theirs.embed(ids)
    torch.testing.assert_close(found, expected)
    leaves = [getattr(theirs.embed, f"lora_embedding_{which}")["default"] for which in "AB"]
    for grad, other in zip((da, db), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(grad, other)
    assert not da[:, 1].any() and plain_da[:, 1].any(), "padding does not train A"
    torch.testing.assert_close(da[:, [0, 2, 3, 4, 5]], plain_da[:, [0, 2, 3, 4, 5]])
    torch.testing.assert_close(db, plain_db)


class Embedded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=1, **options)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


def test_an_embedding_that_is_written_to_is_refused() -> None:
    targets = resolve(of_object(peft.LoraConfig(r=2, target_modules=["embed"])), outline_of(root := Embedded(max_norm=1.0)))
    tensors = {"embed.lora_A": torch.zeros(2, 6), "embed.lora_B": torch.zeros(4, 2)}
    with pytest.raises(RatelError, match="max_norm.*Exclude it"):
        adapt_layers(root, targets.layers, tensors, draws=Draws(seed=0))


@pytest.mark.parametrize("case", ("one of two", "dora"))
def test_compiled_equals_eager(case: str) -> None:
    pair = Both(case, torch.float32)
    compiled = torch.compile(pair.ours, backend="aot_eager")
    assert max(all_apart(results(compiled, pair.leaves, pair.inputs()), pair.found()).values()) < 3e-6


@pytest.mark.parametrize("case", ("mixtral", "gpt_oss", "dora", "dora of embeddings", "tied head"))
def test_runs_are_equal_and_are_traced_alike(case: str) -> None:
    pair = Both(case, torch.float32)
    runs = [trace(lambda: pair.ours(input_ids=tokens()).logits, pair.ours, keep_graph=True) for _ in range(2)]
    (first, one), (second, other) = runs
    assert torch.equal(first, second) and one.is_like(other) and torch.equal(logits(pair.ours), first)
