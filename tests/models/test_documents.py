"""Documents that share a row are kept apart, layer by layer as the model's own masks say, or rows
hold one document each; what is no causal language model is not trained as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ratel
from ratel import probe_cache
from ratel.data import open_dataset
from ratel.errors import RatelError
from ratel.models import load
from ratel.models.calls.documents import MADE, OWN, MaskFunctions
from ratel.models.calls.running import CausalLMRunner
from ratel.models.checks import family
from ratel.models.checks.family import Family, family_of, judge
from ratel.models.checks.shrink import random_parameters
from tests.support.models import CPU

pytestmark = pytest.mark.numerics
COMMON = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, max_position_embeddings=128)
LENGTHS = (20, 11, 17)


def make(name: str) -> nn.Module:
    import transformers as t

    configs: dict[str, Any] = {
        "gpt-oss": lambda: t.GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
        "afmoe": lambda: t.AfmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2, sliding_window=6, num_dense_layers=1,
                                       moe_intermediate_size=16),
        "gemma3": lambda: t.Gemma3TextConfig(**COMMON, sliding_window=6, query_pre_attn_scalar=8),
        "mpt": lambda: t.MptConfig(vocab_size=96, d_model=32, n_heads=4, n_layers=3, max_seq_len=128),
        "opt": lambda: t.OPTConfig(vocab_size=96, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=3,
                                   num_attention_heads=4, max_position_embeddings=128),
        "mamba": lambda: t.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
        "rwkv": lambda: t.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, context_length=128),
        "qwen3-next": lambda: t.Qwen3NextConfig(
            **COMMON, layer_types=["linear_attention", "full_attention"] * 2, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=8, linear_value_head_dim=8),
        "lfm2": lambda: t.Lfm2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}, layer_types=["conv", "full_attention"] * 2),
        "openai-gpt": lambda: t.OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "bert": lambda: t.BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4),
        "bert-decoder": lambda: t.BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                             num_attention_heads=4, is_decoder=True),
    }
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(configs[name](), dtype=torch.float32)
    return random_parameters(model, seed=3).eval()


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (1, length), generator=generator) for length in LENGTHS]


def packed() -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    ids = torch.cat(documents(), 1)
    return {"input_ids": ids, "labels": torch.where(positions == 0, -100, ids), "position_ids": positions}


@torch.no_grad()
def loss_apart(model: nn.Module) -> float:
    total = sum(F.cross_entropy(model(input_ids=d, use_cache=False).logits[0, :-1], d[0, 1:], reduction="sum").item()
                for d in documents())
    return total / (sum(LENGTHS) - len(LENGTHS))


APART = {"gpt-oss": OWN, "afmoe": OWN, "gemma3": OWN, "mpt": OWN, "opt": OWN, "bert-decoder": OWN}
MIXED = ("mamba", "rwkv", "qwen3-next", "lfm2", "openai-gpt")


@pytest.mark.parametrize("name", APART)
def test_a_packed_row_has_the_loss_of_its_documents(name: str) -> None:
    expected = loss_apart(make(name))
    with ratel.Session(make(name), dtype="fp32", device="cpu") as session:
        assert session.parts.isolates_documents
        assert session.evaluate([packed()]) == pytest.approx(expected, abs=2e-5)


def test_every_kind_of_layer_gets_its_own_mask() -> None:
    parts = load(make("gpt-oss"), dtype=torch.float32, device=CPU)
    masks = [call.kwargs["attention_mask"] for call in parts.head(packed())[1].calls]
    seen = [(mask if mask.dtype is torch.bool else mask == 0)[0, 0] for mask in masks]
    last = LENGTHS[0] - 1
    assert {int(mask[last].sum()) for mask in seen} == {6, LENGTHS[0]}
    assert all(not mask[LENGTHS[0], :LENGTHS[0]].any() for mask in seen)


@pytest.mark.parametrize("name", MIXED)
def test_a_model_that_cannot_keep_them_apart_takes_them_one_by_one(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with ratel.Session(make(name), dtype="fp32", device="cpu") as session:
        assert not session.parts.isolates_documents and "each sequence holds one" in caplog.text
        batch = packed()
        for call in (session.step, lambda batch: session.evaluate([batch])):
            with pytest.raises(RatelError, match="cannot keep them apart") as caught:
                call(batch)
            assert caught.value.field == "position_ids"
        alone = {"input_ids": batch["input_ids"], "position_ids": torch.arange(sum(LENGTHS))[None]}
        assert session.step(alone).loss > 0


def test_what_is_concluded_from_a_copy_is_tried_and_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(make("gpt-oss")) == Family(is_causal=True, documents=OWN)
    monkeypatch.setattr(MaskFunctions, "shown", lambda self, positions: __import__("contextlib").nullcontext())
    found = judge(make("gpt-oss"))  # the only mask left goes to every layer, and takes the windows away
    assert found.is_causal and found.documents is None


def test_a_mask_made_here_is_used_where_it_keeps_documents_apart() -> None:
    model = make("opt")
    runner = CausalLMRunner(model, CPU, torch.float32)
    runner.documents = MADE
    with torch.no_grad():
        logits = runner.run(packed())
        expected = torch.cat([model(input_ids=d).logits for d in documents()], 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_mask_functions_are_put_back_after_an_error() -> None:
    import transformers.models.gpt_oss.modeling_gpt_oss as code

    before, functions = code.create_causal_mask, MaskFunctions(make("gpt-oss"))
    with pytest.raises(KeyError), functions.shown(torch.arange(4)[None]):
        assert code.create_causal_mask is not before
        raise KeyError
    assert code.create_causal_mask is before


def test_a_copy_that_shows_nothing_decides_nothing() -> None:
    model = make("opt")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "out_proj" in name:
                param.zero_()
    found = judge(model)
    assert found.documents is None and "does not show" in found.reason


def test_a_verdict_is_remembered_for_a_class_its_settings_and_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(family, "_KNOWN", {})
    tried: list[str] = []
    trying = family._try
    monkeypatch.setattr(family, "_try", lambda cls, *rest: tried.append(cls.__name__) or trying(cls, *rest))
    first = family_of(make("gpt-oss"))
    family._KNOWN.clear()
    assert family_of(make("gpt-oss")) == first and tried == ["GptOssForCausalLM"]
    assert len(list(probe_cache.cache_directory().iterdir())) == 1
    family_of(make("opt"))
    monkeypatch.setattr(family, "_own_digest", lambda: "other sources")
    family_of(make("gpt-oss"))
    assert tried == ["GptOssForCausalLM", "OPTForCausalLM", "GptOssForCausalLM"]


def test_a_copy_that_does_not_run_leaves_rows_with_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "_KNOWN", {})
    monkeypatch.setattr(family.probe_cache, "load", lambda *_: None)
    monkeypatch.setattr(family, "judge", lambda model: (_ for _ in ()).throw(RuntimeError("no kernel")))
    found = family_of(make("opt"))
    assert found.is_causal is None and found.documents is None and "no kernel" in found.reason


# --- what a model is --------------------------------------------------------------------------------------------------


def test_a_model_whose_tokens_see_the_next_is_refused() -> None:
    with pytest.raises(RatelError, match="tokens see those that come after them") as caught:
        load(make("bert"), dtype=torch.float32, device=CPU)
    assert "masked-lm" in str(caught.value.remedy) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name, task", [("BertForMaskedLM", "masked-lm"), ("LlamaForSequenceClassification", "classify"),
                                        ("Qwen3ForTokenClassification", "tokens"), ("BertForPreTraining", "loss_fn"),
                                        ("LlamaForQuestionAnswering", "loss_fn")])
def test_a_directory_of_another_kind_is_refused_with_what_to_do(name: str, task: str, tmp_path: Path) -> None:
    import transformers

    model_class = getattr(transformers, name)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model_class(model_class.config_class(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(RatelError, match=name) as caught:
        load(tmp_path, dtype=torch.float32, device=CPU)
    assert task in str(caught.value.remedy) and len(str(caught.value)) < 300 and "\n" not in str(caught.value)


# --- rows of one document ---------------------------------------------------------------------------------------------


def write_prompts(path: Path, count: int = 24) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"number {i}:", "completion": " one more" * (i % 5 + 1)}) + "\n"
                            for i in range(count)))
    return path


def rows_of(path: Path, **options: Any) -> dict[str, Tensor]:
    with open_dataset(write_prompts(path), ratel.data.load_tokenizer(None), seq_len=64, batch_size=8, seed=0, **options) as dataset:
        return next(dataset.batches())


def test_rows_hold_one_document_each_where_they_are_not_packed(tmp_path: Path) -> None:
    together, alone = (rows_of(tmp_path / "x.jsonl", packed=packed) for packed in (True, False))
    assert (together["position_ids"] == 0).sum(1).max() > 1
    assert torch.equal(alone["position_ids"], torch.arange(64).expand(8, 64))
    targets = alone["labels"] != -100
    assert targets.any(1).all()  # and what is learned is one stretch in each
    assert all((row[1:].int() - row[:-1].int()).clamp(min=0).sum() + row[0].int() == 1 for row in targets)


def test_a_recurrent_model_trains_on_text(tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=262, hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "in")
    result = ratel.train(tmp_path / "in", write_prompts(tmp_path / "x.jsonl"), steps=2, batch_size=2, seq_len=64, dtype="fp32",
                         device="cpu", out=tmp_path / "out", quiet=True)
    assert len(result.losses) == 2
