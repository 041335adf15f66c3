"""What cannot be trained on the next token is refused in one line that says what it is and what to
do."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from ratel.errors import RatelError
from ratel.models import load
from tests.models.test_loading import SIZES, configs, write
from tests.support.models import CPU

pytestmark = pytest.mark.unit


def refused(source: object, *words: str, **options: object) -> str:
    with pytest.raises(RatelError) as caught:
        load(source, dtype=torch.float32, device=CPU, **options).stored.check_source()
    text = str(caught.value)
    assert len(text) < 330 and "\n" not in text and caught.value.field == "model", text
    assert all(word in text for word in words), text
    return text


FILES = {
    "GGUF": (["model-Q4_K_M.gguf"], "gguf_file=NAME"), "Mistral's": (["params.json", "consolidated.safetensors", "tekken.json"], "config.json"),
    "diffusion": (["model_index.json"], "language model"), "sentence-transformers": (["modules.json"], "--task"),
    "ONNX": (["model.onnx"], "safetensors"), "TensorFlow": (["tf_model.h5"], "safetensors"), "pickled": (["pytorch_model.bin"], "save_pretrained")}


@pytest.mark.parametrize("word", FILES)
def test_directories_of_something_else(word: str, tmp_path: Path) -> None:
    names, remedy = FILES[word]
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    refused(tmp_path, word, remedy, "no config.json")


@pytest.mark.parametrize("name, word", [("model-Q4.gguf", "GGUF"), ("model.onnx", "ONNX"), ("flax_model.msgpack", "Flax"),
                                        ("pytorch_model-00001-of-00002.bin", "pickled"), ("model.fp16.safetensors", "variant"),
                                        ("consolidated.safetensors", "Mistral"), ("weights.pt", "pickled"), (None, "no model.safetensors")])
def test_a_configuration_without_weights_of_transformers(name: str | None, word: str, tmp_path: Path) -> None:
    configs()["llama"].save_pretrained(tmp_path)
    if name:
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, word)


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "m.gguf", "GGUF", "safetensors directory")


@pytest.mark.parametrize("with_model", [False, True])
def test_an_adapter_directory(with_model: bool, tmp_path: Path) -> None:
    """`from_pretrained` would put the adapter on the model that lies beside it."""
    if with_model:
        write(configs()["llama"], tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base", "peft_type": "LORA"}))
    refused(tmp_path, "adapter", '"some/base"', "ratel export --adapter")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8"])
def test_quantized_directories(method: str, tmp_path: Path) -> None:
    write(configs()["llama"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    refused(tmp_path, f"({method})", "unquantized")


@pytest.mark.parametrize("name", ["special.safetensors", "shard-00000-model-00001-of-00001.safetensors"])
def test_weights_that_transformers_would_take_instead(name: str, tmp_path: Path) -> None:
    write(configs()["llama"], tmp_path)
    if name.startswith("shard"):
        (tmp_path / name).write_bytes(b"")
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    refused(tmp_path, name, "save_pretrained")


@pytest.mark.parametrize("head, words", [
    ("LlamaForSequenceClassification", ("classifier", "--task classify")), ("LlamaForTokenClassification", ("classifier", "--task tokens")),
    ("LlamaForQuestionAnswering", ("no causal language model", "loss_fn"))])
def test_heads_for_something_else(head: str, words: tuple[str, ...], tmp_path: Path) -> None:
    getattr(transformers, head)(transformers.LlamaConfig(**SIZES, pad_token_id=0)).save_pretrained(tmp_path)
    refused(tmp_path, head, *words)


def test_a_model_for_masked_tokens(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "BertForMaskedLM", "masked tokens", "--task masked-lm")


def test_a_model_type_without_a_causal_language_model(tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                                 image_size=28, patch_size=14)).save_pretrained(tmp_path)
    refused(tmp_path, "no causal language model of model type 'vit'", "loss_fn")


def test_layers_that_share_keys(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_hidden_layers": 5, "intermediate_size": [64] * 5}
    config = transformers.Gemma3nTextConfig(
        **sizes, head_dim=8, num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=96, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 5, sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"])
    refused(config, "last 2 layers", "keys and values of earlier layers")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["kernels-community/flash-attn", {"": "someone/evil:attention"}])
def test_a_configuration_may_not_choose_code_that_is_fetched(key: str, value: object, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import hub_kernels

    def fetch(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"fetches {args}")

    for name in ("load_and_register_attn_kernel", "get_kernel", "lazy_load_kernel"):
        if hasattr(hub_kernels, name):
            monkeypatch.setattr(hub_kernels, name, fetch)
    write(configs()["llama"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    try:
        parts = load(tmp_path, dtype=torch.float32, device=CPU)
    except RatelError as error:
        assert "would be fetched and run" in str(error) or "does not accept" in str(error)
        return
    assert parts.module.config._attn_implementation in ("sdpa", "eager"), "read past"
    parts.close()


def test_objects_with_adapters() -> None:
    peft = pytest.importorskip("peft", reason="peft is in the extra `test`")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(configs()["llama"]), settings)

    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss

    for given in (model, model.base_model.model):
        refused(given, "adapters of PEFT", "merge_and_unload")
        refused(given, "adapters of PEFT", "merge_and_unload", loss_fn=loss_fn)
    merged = model.merge_and_unload().requires_grad_(True)
    load(merged, dtype=torch.float32, device=CPU).close()
