"""Adapted linears inside transformers' models: gradients are peft's and plain autograd's, siblings
share a reading, second runs agree."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ratel.errors import RatelError
from ratel.lora.compute import AdaptedLinear, Adapter, Draws, adapt, function, modules
from ratel.runtime.blocks.op_trace import trace

pytestmark = pytest.mark.numerics
LLAMA_TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
                 "mlp.down_proj")


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, max_position_embeddings=64))


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0,
                                      attn_pdrop=0))


MODELS = {"llama": (tiny_llama, [f"model.layers.{n}.{target}" for n in range(2) for target in LLAMA_TARGETS]),
          "gpt2": (tiny_gpt2, [f"transformer.h.{n}.{target}" for n in range(2)
                               for target in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")])}


def adapters_of(model: nn.Module, names: list[str], rank: int = 4, scale: float = 2.0) -> dict[str, Adapter]:
    rng, found = torch.Generator().manual_seed(1), {}
    for name in names:
        base = model.get_submodule(name)
        j, i = base.weight.shape if isinstance(base, nn.Linear) else base.weight.shape[::-1]
        a, b = (torch.randn(shape, generator=rng).to(base.weight.dtype) * 0.2 for shape in ((rank, i), (j, rank)))
        found[name] = Adapter(a=a, b=b, scale=scale)
    return found


def loss_and_grads(model: nn.Module, ids: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def own_leaves(made: dict[str, AdaptedLinear]) -> dict[str, Tensor]:
    return {f"{name}.{which}": getattr(module, f"lora_{which}") for name, module in made.items() for which in "AB"}


@pytest.mark.parametrize("graph", ["auto", "f1+b1", "f2+b5"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_pefts(kind: str, graph: str) -> None:
    from peft import LoraConfig, get_peft_model

    make, names = MODELS[kind]
    ids = torch.randint(61, (3, 11), generator=torch.Generator().manual_seed(2))
    ours, theirs = make().double(), make().double()
    adapters = adapters_of(ours, names)
    made = adapt(ours, adapters, draws=Draws(seed=0), graph=graph)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=kind == "gpt2"))
    leaves = {}
    for name, adapter in adapters.items():
        layer = theirs.base_model.model.get_submodule(name)
        for which, values in (("A", adapter.a), ("B", adapter.b)):
            parameter = getattr(layer, f"lora_{which}")["default"].weight
            parameter.data.copy_(values)
            leaves[f"{name}.{which}"] = parameter
    loss, grads = loss_and_grads(ours, ids, own_leaves(made))
    expected_loss, expected = loss_and_grads(theirs, ids, leaves)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-12)
    for name, grad in grads.items():
        assert float((grad - expected[name]).norm()) < 1e-12 * float(expected[name].norm()), name


def test_names_of_the_base_stay_and_it_gets_no_gradients() -> None:
    model = tiny_llama()
    before = dict(model.named_parameters())
    made = adapt(model, adapters_of(model, MODELS["llama"][1]), draws=Draws(seed=0))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {f"{name}.lora_{which}" for name in made for which in "AB"}
    assert not any(after[f"{name}.weight"].requires_grad for name in made)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[modules.AdaptedLinear]]]:
    """The linears of each computation."""
    calls: list[list[modules.AdaptedLinear]] = []
    real = modules.compute
    monkeypatch.setattr(modules, "compute", lambda taker, x: calls.append(list(taker.members)) or real(taker, x))
    yield calls


def test_siblings_are_computed_together(computed: list[list[modules.AdaptedLinear]]) -> None:
    model = tiny_llama()
    made = adapt(model, adapters_of(model, MODELS["llama"][1]), draws=Draws(seed=0))
    model(input_ids=torch.zeros(1, 5, dtype=torch.long))
    ends = [[name.rpartition(".")[2] for one in call for name in made if made[name] is one] for call in computed]
    assert ends == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_siblings_alone_and_together_are_equal() -> None:
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))
    results = []
    for shared in (modules.SHARED, ()):
        model = tiny_llama()
        draws = Draws(seed=3)
        made = adapt(model, adapters_of(model, MODELS["llama"][1]), draws=draws, dropout=0.3, shared=shared)
        draws.begin(step=4)
        model.train()
        results.append(loss_and_grads(model, ids, own_leaves(made)))
    (loss, grads), (other_loss, others) = results
    assert torch.equal(loss, other_loss)
    for name, grad in grads.items():
        assert float((grad - others[name]).norm()) <= 2e-6 * float(others[name].norm()), name


def _pair() -> tuple[nn.Module, Draws]:
    root = nn.Module()
    root.q_proj, root.k_proj = nn.Linear(8, 6), nn.Linear(8, 6)
    draws = Draws(seed=1)
    adapt(root, adapters_of(root, ["q_proj", "k_proj"]), draws=draws, dropout=0.5)
    draws.begin(step=0)
    return root, draws


@pytest.mark.parametrize("change", ["another tensor", "in place", "step", "row", "eval", "no graph", "adapter"])
def test_what_lies_ready_is_used_for_what_it_was_made_of_alone(change: str) -> None:
    root, draws = _pair()
    x = torch.randn(4, 8)
    root.q_proj(x)
    if change == "another tensor":
        x = x.clone() + 1
    elif change == "in place":
        x.add_(1)
    elif change == "step":
        draws.begin(step=1)
    elif change == "row":
        draws.begin(step=0, first_row=4)
    elif change == "eval":
        root.eval()
    elif change == "adapter":
        root.k_proj.lora_A.data.add_(1)
        root.k_proj.lora_A.add_(0) if not root.k_proj.lora_A.requires_grad else torch._C._increment_version([root.k_proj.lora_A])
    with torch.set_grad_enabled(change != "no graph"):
        found = root.k_proj(x)
        assert found.requires_grad == (change != "no graph")
        assert torch.equal(found, modules.compute(root.k_proj, x)[0])


def test_nothing_lies_ready_after_all_have_taken() -> None:
    root, _ = _pair()
    x = torch.randn(4, 8)
    first = root.q_proj(x), root.k_proj(x)
    assert not root.q_proj.shared._ready and root.q_proj.shared._given is None
    assert all(torch.equal(one, other) for one, other in zip(first, (root.q_proj(x), root.k_proj(x)), strict=True))


def test_a_copy_shares_with_itself() -> None:
    root, _ = _pair()
    copied = copy.deepcopy(root)
    assert copied.q_proj.shared is copied.k_proj.shared is not root.q_proj.shared
    assert copied.q_proj.shared.members[0] is copied.q_proj and copied.q_proj.shared.members[1] is copied.k_proj


def test_a_checkpointed_block_draws_the_same_masks() -> None:
    """Recomputed by somebody who saves no generator's state."""
    root, draws = _pair()
    x = torch.randn(4, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return root.q_proj(x) * root.k_proj(x)

    leaves = [x, root.q_proj.lora_A, root.k_proj.lora_B]
    plain = torch.autograd.grad(block(x).sum(), leaves)
    again = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    torch.rand(3)
    for one, other in zip(plain, torch.autograd.grad(again.sum(), leaves), strict=True):
        assert torch.equal(one, other)
    draws.begin(step=1)
    assert not torch.equal(torch.autograd.grad(block(x).sum(), leaves)[1], plain[1]), "another step draws another mask"


def test_a_step_does_what_the_step_before_did_for_whoever_traces_it() -> None:
    """Keys change and operations do not: else a block would be learned anew at every step."""
    root, draws = _pair()
    root.forward = lambda x: root.q_proj(x) * root.k_proj(x)
    x, traces = torch.randn(4, 8, requires_grad=True), []
    for step in range(2):
        draws.begin(step, first_row=4 * step)
        traces.append(trace(lambda: root.forward(x), root, keep_graph=True)[1])
    names = [op.func.name() for op in traces[0].ops]
    assert names.count("ratel_lora::down") == 1 and names.count("ratel_lora::linear") == 2
    assert traces[0].is_like(traces[1])


def test_compiled_equals_eager() -> None:
    root, _ = _pair()
    x = torch.randn(4, 8)
    compiled = torch.compile(lambda x: root.q_proj(x) + root.k_proj(x), backend="aot_eager")
    assert torch.allclose(compiled(x), root.q_proj(x) + root.k_proj(x), atol=1e-6)
    grads = [torch.autograd.grad(run(x).square().sum(), [root.q_proj.lora_A, root.k_proj.lora_B])
             for run in (compiled, lambda x: root.q_proj(x) + root.k_proj(x))]
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(*grads, strict=True))


def test_what_cannot_be_adapted_is_refused() -> None:
    root = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6))
    with pytest.raises(RatelError, match="cannot be put on a LayerNorm.*Name linear layers"):
        adapt(root, {"0": Adapter(a=torch.zeros(2, 4), b=torch.zeros(4, 2), scale=1.0)}, draws=Draws(seed=0))
    with pytest.raises(RatelError, match=r"6 x 4 has A and B of the shapes \(2, 4\) and \(6, 2\), not \(2, 6\)"):
        adapt(root, {"1": Adapter(a=torch.zeros(2, 6), b=torch.zeros(4, 2), scale=1.0)}, draws=Draws(seed=0))
    assert isinstance(root[1], nn.Linear) and function.SMALL_SHARE > 1
