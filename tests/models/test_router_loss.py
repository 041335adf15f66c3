"""The auxiliary loss of routers against transformers' own total loss and autograd."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ratel
from ratel.errors import RatelError
from ratel.models.calls.router import Balance, _Watch
from tests.support.tasks import batch as task_batch
from tests.support.tasks import gradients, model, session_gradients

pytestmark = pytest.mark.numerics
ROWS, POSITIONS, COEFFICIENT = 4, 12, 0.5
_SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
_ROUTED = dict(output_router_logits=True, router_aux_loss_coef=COEFFICIENT)


def config(family: str, **changes: Any) -> Any:
    import transformers as t

    both, mixture = {**_SHAPE, **_ROUTED, **changes}, dict(num_experts=4, num_experts_per_tok=2)
    local = dict(num_local_experts=4, num_experts_per_tok=2)
    return {
        "mixtral": lambda: t.MixtralConfig(**both, **local),
        "qwen2-moe": lambda: t.Qwen2MoeConfig(**both, **mixture, moe_intermediate_size=16, shared_expert_intermediate_size=24),
        "qwen3-moe": lambda: t.Qwen3MoeConfig(**both, **mixture, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[1]),
        "olmoe": lambda: t.OlmoeConfig(**both, **mixture),
        "granite-moe": lambda: t.GraniteMoeConfig(**both, **local),
        "gpt-oss": lambda: t.GptOssConfig(**both, **local, head_dim=8),
        "phimoe": lambda: t.PhimoeConfig(**both, **local, router_jitter_noise=0.0, input_jitter_noise=0.0),
        "jetmoe": lambda: t.JetMoeConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_key_value_heads=2, kv_channels=8,
                                         intermediate_size=48, **local, output_router_logits=True, aux_loss_coef=COEFFICIENT),
        "jamba": lambda: t.JambaConfig(**{**both, "num_hidden_layers": 4}, **mixture, attn_layer_period=2, attn_layer_offset=1,
                                       expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, use_mamba_kernels=False),
        "llama": lambda: t.LlamaConfig(**_SHAPE),
    }[family]()


FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "granite-moe", "gpt-oss", "phimoe", "jetmoe", "jamba"]


def made(family: str, **changes: Any) -> nn.Module:
    """Weights large enough for routers to prefer some experts."""
    import transformers

    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config(family, **changes)).train()
    with torch.no_grad():
        for param in module.parameters():
            param.mul_(3 if param.dim() > 1 else 1)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module


def tokens(*, padded: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 96, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": ids, "labels": ids.clone()}
    shown = (torch.arange(POSITIONS)[None] < torch.tensor([12, 7, 12, 5])[:, None]).long()
    return {"input_ids": ids * shown, "labels": torch.where(shown > 0, ids, -100), "attention_mask": shown}


def session(module: nn.Module, **options: Any) -> ratel.Session:
    return ratel.Session(copy.deepcopy(module), device="cpu", **{"dtype": "fp32", "max_grad_norm": None, **options})


def trained(module: nn.Module, given: dict[str, torch.Tensor], **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    with session(module, **options) as one:
        return one.step(given).loss, session_gradients(one)


def expected(module: nn.Module, given: dict[str, torch.Tensor], **more: Any) -> tuple[float, dict[str, torch.Tensor]]:
    return gradients(copy.deepcopy(module), {**given, "use_cache": False, **more})


def compare(found: tuple[float, dict], reference: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(reference[0], rel=1e-5)
    assert reference[1].keys() <= found[1].keys()
    for name, grad in found[1].items():
        other = reference[1].get(name, torch.zeros_like(grad))
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5 * max(0.1, float(other.abs().max())), msg=name)


def adds_one(module: nn.Module, given: dict[str, torch.Tensor]) -> bool:
    """transformers 5.17 fails on its own Granite MoE, and does not look at the configuration of
    JetMoE."""
    try:
        with torch.no_grad():
            return module(**given, use_cache=False).aux_loss is not None
    except AttributeError:
        return False


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.allclose(one[name], other[name], rtol=1e-2, atol=1e-4) for name in one)


@pytest.mark.parametrize("micro_batch", [ROWS, 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_total_loss_and_gradients_are_those_of_transformers(family: str, padded: bool, micro_batch: int) -> None:
    module, given = made(family), tokens(padded=padded)
    if not adds_one(module, given):
        pytest.skip("this version of transformers records no router logits in this class")
    reference = expected(module, given)
    without = expected(module, given, output_router_logits=False)
    assert reference[0] > without[0] + 0.4 and differ(reference[1], without[1])  # else nothing would be compared
    compare(trained(module, given, micro_batch=micro_batch), reference)


@pytest.mark.parametrize("options", [{"activations": "gpu"}, {"activations": "dram"}, {"activations": "spill"},
                                     {"activations": "recompute", "micro_batch": 3}, {"optimizer": "speculative"}])
def test_whatever_is_kept_of_blocks(options: dict[str, Any]) -> None:
    module, given = made("mixtral"), tokens(padded=True)
    compare(trained(module, given, **options), expected(module, given))


def test_kept_inside_is_used_and_changes_no_bit() -> None:
    """Not only where blocks are run again in full."""
    module, given = made("gpt-oss"), tokens()
    plain, kept = (trained(module, given, activations=activations, micro_batch=2) for activations in ("recompute", "dram"))
    assert plain[0] == kept[0] and all(torch.equal(grad, kept[1][name]) for name, grad in plain[1].items())


def test_it_is_not_added_unasked() -> None:
    module, given = made("mixtral", output_router_logits=False), tokens()
    reference = expected(module, given)
    compare(trained(module, given), reference)
    compare(trained(made("mixtral"), given, router_aux_loss="off"), reference)


def test_where_transformers_adds_none_none_is_added(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A class that records no router logits hands its function None (5.17: Granite MoE)."""
    call = _Watch.__call__
    monkeypatch.setattr(_Watch, "__call__", lambda self, logits, *more: call(self, None, *more))
    module, given = made("mixtral"), tokens()
    compare(trained(module, given), expected(module, given, output_router_logits=False))
    assert "of this transformers adds none" in caplog.text
    with pytest.raises(RatelError, match="adds no auxiliary loss"):
        session(module, router_aux_loss=0.1)


def test_a_coefficient_that_is_asked_for() -> None:
    module, given = made("olmoe", output_router_logits=False), tokens()
    other = made("olmoe", router_aux_loss_coef=0.25)
    compare(trained(module, given, router_aux_loss=0.25, micro_batch=2), expected(other, given))


def test_steps_do_not_depend_on_the_size_of_micro_batches() -> None:
    """The mean over tokens of a step is no mean of means: rows of unlike lengths, each a
    micro-batch."""
    module, given = made("qwen3-moe"), tokens(padded=True)
    one, four = (trained(module, given, micro_batch=rows) for rows in (ROWS, 1))
    assert one[0] == pytest.approx(four[0], rel=1e-6)
    compare(four, one)


def test_evaluations_leave_it_out() -> None:
    module, given = made("mixtral"), tokens()
    with session(module) as one:
        assert one.evaluate([given]) == pytest.approx(expected(module, given, output_router_logits=False)[0], rel=1e-5)
        assert one.step(given).loss == pytest.approx(expected(module, given)[0], rel=1e-5)
        assert one.accuracy is None


def test_several_steps_are_those_of_a_plain_loop() -> None:
    module, given = made("mixtral"), tokens()
    reference = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = reference(**given, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with session(module, lr=1e-3, micro_batch=2) as one:
        assert [one.step(given).loss for _ in range(4)] == pytest.approx(losses, rel=1e-4)


def test_bf16_is_near_fp32() -> None:
    module, given = made("olmoe").bfloat16(), tokens()
    plain = expected(module, given)
    exact = expected(module.float(), given)
    loss, found = trained(module, given, dtype="bf16", micro_batch=2)
    assert loss == pytest.approx(exact[0], rel=2e-2)
    for name in (n for n in exact[1] if n.endswith("mlp.gate.weight")):
        scale = float(exact[1][name].norm())
        ours, theirs = (float((grads[name].float() - exact[1][name]).norm()) / scale for grads in (found, plain[1]))
        assert ours < max(2 * theirs, 0.05), name


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RatelError, match="adds no auxiliary loss") as caught:
        session(made("llama"), router_aux_loss=0.1)
    assert caught.value.field == "router_aux_loss"
    with pytest.raises(RatelError, match="does not go together"):
        session(made("mixtral"), compile="on")
    with pytest.raises(RatelError, match="causal language models only"):
        session(model("bert", "classify"), task="classify", router_aux_loss=0.1)
    with pytest.raises(RatelError, match="not a number"):
        session(made("mixtral"), router_aux_loss="on")
    assert trained(model("bert", "classify"), task_batch("classify", 0), task="classify")[0] > 0


def test_the_module_is_given_back_without_hooks_of_ours() -> None:
    module = made("mixtral")
    gates = [m for name, m in module.named_modules() if name.endswith("mlp.gate")]
    before = [len(gate._forward_hooks) for gate in gates]
    with ratel.Session(module, device="cpu", dtype="fp32") as one:
        assert one.parts.routing is not None
        during = [len(gate._forward_hooks) for gate in gates]
    assert len(gates) == 3 and [n - 1 for n in during] == [len(gate._forward_hooks) for gate in gates] >= before


def test_padding_of_sequences_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches made of text say where it is: the loss is that of transformers, given the mask."""
    module = made("mixtral", vocab_size=264)
    module.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": "ab" * n, "completion": "cd" * n}) + "\n" for n in (7, 8, 9)))
    seen: list[Any] = []
    step = ratel.Session.step
    monkeypatch.setattr(ratel.Session, "step", lambda self, given, **more: (seen.append(given), step(self, given, **more))[1])
    result = ratel.train(str(tmp_path / "model"), str(tmp_path / "data.jsonl"), out=str(tmp_path / "out"), steps=1, batch_size=2,
                         seq_len=40, eval_fraction=0, device="cpu", dtype="fp32", quiet=True, export=False, unchecked=True)
    given = seen[-1]
    assert 0 < (given["attention_mask"] == 0).sum() and (given["labels"][given["attention_mask"] == 0] == -100).all()
    counted = []
    original = Balance.add
    monkeypatch.setattr(Balance, "add", lambda self, probs, shown: (counted.append(int(shown.sum())), original(self, probs, shown))[1])
    with session(module) as one:
        assert one.step(given).loss == pytest.approx(result.losses[0], rel=1e-6)
    assert set(counted) == {int(given["attention_mask"].sum())}
