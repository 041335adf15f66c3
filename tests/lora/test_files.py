"""An adapter's files: peft loads what is written, strictly and with the same results; what peft
writes is read; the rest is refused."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ratel import models
from ratel.errors import RatelError
from ratel.lora.describe.outline import outline_of
from ratel.lora.describe.peft_config import of_object
from ratel.lora.describe.targets import Targets, resolve
from ratel.lora.files import BASE_KEY, named, read_adapter, tensors_of, write_adapter
from ratel.lora.values.converted import converted_targets, converted_tensors
from ratel.lora.values.fingerprint import base_fingerprint, digest_of, fingerprint, fingerprint_of
from ratel.lora.values.initial import initial, residual
from tests.support.lora import MODELS, TIED, load_in_peft, logits, make, peft_model, peft_tensors, trained

pytestmark = pytest.mark.numerics
peft = pytest.importorskip("peft", minversion="0.21")

DENSE = [dict(target_modules="all-linear", use_rslora=True),
         dict(target_modules=["q_proj", "embed_tokens", "c_attn", "wte"], rank_pattern={"q_proj": 3, "c_attn": 5}, alpha_pattern={".*0.*": 3}),
         dict(target_modules=r".*\.(q_proj|down_proj|c_proj)", exclude_modules=r".*layers\.0.*", use_dora=True),
         dict(target_modules=["v_proj", "c_fc", "o_proj"], layers_to_transform=[1], modules_to_save=["lm_head"]),
         dict(target_modules=["k_proj", "c_attn", "lm_head"], ensure_weight_tying=True),
         dict(target_modules=["k_proj", "c_attn"], modules_to_save=["lm_head"], ensure_weight_tying=True)]
FUSED = [dict(target_modules="all-linear"), dict(target_modules=["v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
                                                  rank_pattern={"gate_up_proj": 5})]
CASES = [(name, index) for name in ("llama", "qwen3", "gemma3", "gpt2") for index in range(len(DENSE))
         if index < 4 or name in TIED] + [(name, -1 - index) for name in ("mixtral", "gpt_oss", "qwen3_moe") for index in range(len(FUSED))]


def arguments_of(index: int) -> dict[str, Any]:
    """Copies: peft changes lists that it is given."""
    return {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **deepcopy(DENSE[index] if index >= 0 else FUSED[-1 - index])}


def written(tmp_path: Path, name: str, index: int, **words: Any) -> tuple[Targets, dict[str, Tensor]]:
    targets = resolve(of_object(peft.LoraConfig(**arguments_of(index))), outline_of(make(name)))
    tensors = trained(targets)
    write_adapter(tmp_path, targets, tensors, **words)
    return targets, tensors


@pytest.mark.parametrize(("name", "index"), CASES)
def test_peft_computes_what_was_written(tmp_path: Path, name: str, index: int) -> None:
    """Against the same tensors, put into a model that peft has adapted from its own description."""
    targets, tensors = written(tmp_path, name, index, base="sha256:" + "0" * 64)
    adapted = load_in_peft(make(name), tmp_path)
    own = peft_model(make(name), peft.LoraConfig(**arguments_of(index)))
    every = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(every[key], values) for key, values in tensors.items())
    assert not peft.set_peft_model_state_dict(own, every).unexpected_keys
    assert peft_tensors(own).keys() == every.keys()
    found = logits(adapted)
    torch.testing.assert_close(found, logits(own), rtol=0, atol=1e-5)
    assert (found - logits(make(name))).abs().max() > 0.05, "the adapter does something"


@pytest.mark.parametrize(("name", "index"), CASES)
def test_what_was_written_is_read(tmp_path: Path, name: str, index: int) -> None:
    targets, tensors = written(tmp_path, name, index, base="sha256:1", base_name="some/base")
    found = read_adapter(tmp_path, outline_of(make(name)), base="sha256:1")
    assert found.tensors.keys() == tensors.keys() and all(torch.equal(values, tensors[key]) for key, values in found.tensors.items())
    assert {layer.key: layer for layer in found.targets.layers} == {layer.key: layer for layer in targets.layers}
    assert {part.name: part for part in found.targets.full} == {part.name: part for part in targets.full}
    assert (found.base, found.base_copies) == ("sha256:1", {})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/base" and settings["peft_type"] == "LORA"


@pytest.mark.parametrize(("name", "index"), CASES)
def test_what_peft_has_written_is_read(tmp_path: Path, name: str, index: int) -> None:
    """To go on with, or to merge."""
    if (name, index) == ("gpt2", 4) or (name, index) == ("gpt2", 5):
        pytest.skip("peft cannot read its own: it forgets that wte and lm_head are tied when it writes their description")
    theirs = peft_model(make(name), peft.LoraConfig(**arguments_of(index)))
    with torch.no_grad():
        for key, values in theirs.named_parameters():
            if "lora_" in key and "lm_head" not in key:
                values.copy_(torch.rand_like(values))
    expected = {key: values.float() for key, values in peft_tensors(theirs).items()}
    theirs.save_pretrained(tmp_path)
    model = make(name)
    found = read_adapter(tmp_path, outline_of(model), base="sha256:of a base that peft knows nothing of")
    assert found.base is None
    stored = {key: values for layer in found.targets.layers for key, values in named(layer, tensors_of(layer, found.targets, found.tensors)).items()}
    assert all(torch.equal(values, expected[key]) for key, values in (stored | found.tensors).items())
    assert (stored.keys() | {key for part in found.targets.full for key in part.file_shapes}) == expected.keys()
    assert all(torch.equal(values, dict(model.named_parameters())[key]) for key, values in found.base_copies.items())


def test_peft_passes_over_what_is_ours(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The fingerprint is in the metadata of the weights; nothing in the description is unknown to
    peft."""
    written(tmp_path, "llama", 0, base="sha256:" + "7" * 64)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()[BASE_KEY] == "sha256:" + "7" * 64 and file.metadata()["format"] == "pt"
    peft.PeftModel.from_pretrained(make("llama"), str(tmp_path))
    assert not [str(warning.message) for warning in recwarn if "Unexpected keyword" in str(warning.message)]


@pytest.mark.parametrize(("name", "index"), (("llama", 0), ("qwen3", 4), ("gpt_oss", -2)))
def test_transformers_loads_what_was_written(tmp_path: Path, name: str, index: int) -> None:
    """Without a model of peft's around it."""
    written(tmp_path, name, index, base="sha256:" + "0" * 64)
    model = make(name)
    model.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(model.eval()), logits(load_in_peft(make(name), tmp_path)), rtol=0, atol=1e-5)


def test_an_adapter_in_bf16(tmp_path: Path) -> None:
    _, tensors = written(tmp_path, "llama", 0, dtype=torch.bfloat16)
    found = read_adapter(tmp_path, outline_of(make("llama"))).tensors
    assert all(values.dtype == torch.float32 and torch.equal(values, tensors[key].bfloat16().float()) for key, values in found.items())
    load_in_peft(make("llama"), tmp_path)


def test_the_description_lists_what_is_adapted(tmp_path: Path) -> None:
    """By last parts where these say it, so that servers that look for them find them."""
    targets, _ = written(tmp_path, "llama", 0)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    (tmp_path / "other").mkdir()
    written(tmp_path / "other", "llama", 2)
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["target_modules"] == [
        "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]


# --- inits that change the base --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ("llama", "gpt2"))
@pytest.mark.parametrize("settings", (dict(init_lora_weights="pissa"), dict(init_lora_weights="olora", use_rslora=True),
                                      dict(init_lora_weights="pissa", rank_pattern={"q_proj": 2, "c_attn": 2}, alpha_pattern={".*0.*": 3}),
                                      dict(init_lora_weights="pissa", use_dora=True)))
def test_the_original_base_and_the_adapter_give_the_trained_model(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    config = of_object(peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "c_attn", "embed_tokens"], **settings}))
    model = make(name)
    targets = resolve(config, outline_of(model))
    weights = {key: values.data for key, values in model.named_parameters()}
    begun = {layer.key: initial(layer, config, 0, weights[layer.weight]) for layer in targets.layers}
    ended = {layer.key: tensors_of(layer, targets, trained(targets)) for layer in targets.layers}
    stored = {key: values for layer in targets.layers for before, after in zip(
        [layer], [next(new for new in converted_targets(targets).layers if new.key == layer.key)])
        for key, values in named(after, converted_tensors(before, ended[layer.key], begun[layer.key])).items()}
    write_adapter(tmp_path, converted_targets(targets), stored)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 8 and settings["init_lora_weights"] is True
    assert {key: layer.scale for key, layer in ((layer.key, layer) for layer in read_adapter(tmp_path, targets.outline).targets.layers)} == \
        pytest.approx({layer.key: layer.scale for layer in targets.layers}, rel=1e-12)

    changed = make(name)
    for layer in targets.layers:
        if "embed" not in layer.key:
            changed.get_submodule(layer.name).weight.data = residual(layer, weights[layer.weight], begun[layer.key].a, begun[layer.key].b)
    arguments = {**arguments_of(1), "target_modules": list(config.targets), "rank_pattern": dict(config.rank_pattern),
                 "alpha_pattern": dict(config.alpha_pattern), "use_dora": config.dora, "use_rslora": config.rslora}
    on_changed = peft_model(changed, peft.LoraConfig(**arguments))
    peft.set_peft_model_state_dict(on_changed, {key: values for layer in targets.layers for key, values in named(layer, ended[layer.key]).items()})
    expected = logits(on_changed)
    torch.testing.assert_close(logits(load_in_peft(make(name), tmp_path)), expected, rtol=0, atol=2e-5)
    assert (expected - logits(make(name))).abs().max() > 0.05


# --- what is refused -------------------------------------------------------------------------------------------------

def refused(directory: Path, model: nn.Module, **words: Any) -> str:
    with pytest.raises(RatelError) as caught:
        read_adapter(directory, outline_of(model), **words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(directory: Path, **tensors: Tensor | None) -> None:
    """The part of names that ends with the key; None: left out."""
    path = directory / "adapter_model.safetensors"
    found = load_file(path)
    for end, values in tensors.items():
        for name in [name for name in found if name.endswith(end)] or [end]:
            found.pop(name, None)
            if values is not None:
                found[name] = values
    save_file(found, path)


def test_another_base(tmp_path: Path) -> None:
    written(tmp_path, "llama", 0, base="sha256:" + "a" * 64)
    assert "was made for another base: its base has the fingerprint sha256:aaaa" in refused(tmp_path, make("llama"), base="sha256:" + "b" * 64)
    wide = dict(MODELS["llama"][1], intermediate_size=40)
    MODELS["llama_wide"] = ("LlamaConfig", wide)
    try:
        message = refused(tmp_path, make("llama_wide"))
    finally:
        del MODELS["llama_wide"]
    assert "was made for another base" in message and "[4, 48]" in message and "[4, 40]" in message
    assert "fits no layer of the model" in refused(tmp_path, make("gpt2"))
    MODELS["llama_deep"] = ("LlamaConfig", dict(MODELS["llama"][1], num_hidden_layers=3))
    try:
        assert "lacks model.layers.2." in refused(tmp_path, make("llama_deep"))
    finally:
        del MODELS["llama_deep"]


def test_a_directory_that_is_cut_off(tmp_path: Path) -> None:
    written(tmp_path, "llama", 3)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "adapter_model.safetensors" in refused(tmp_path, make("llama"))
    path.write_bytes(whole + b"x")
    assert "bytes follow the last tensor" in refused(tmp_path, make("llama"))
    path.unlink()
    assert "is cut off: it has adapter_config.json and no adapter_model.safetensors" in refused(tmp_path, make("llama"))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "a pickle" in refused(tmp_path, make("llama"))
    path.mkdir()
    assert "not a readable safetensors file" in refused(tmp_path, make("llama"))
    (tmp_path / "adapter_config.json").unlink()
    assert "holds no adapter_config.json" in refused(tmp_path, make("llama"))


def test_tensors_that_do_not_belong(tmp_path: Path) -> None:
    written(tmp_path, "llama", 3)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()

    def again(**tensors: Tensor | None) -> str:
        (tmp_path / "adapter_model.safetensors").write_bytes(whole)
        change(tmp_path, **tensors)
        return refused(tmp_path, make("llama"))

    assert "lacks lm_head.weight, which adapter_config.json says was trained as a whole (modules_to_save)" in again(**{"lm_head.weight": None})
    assert "lacks model.layers.1.self_attn.o_proj.lora_A.weight" in again(**{"o_proj.lora_A.weight": None})
    assert "q_proj.lora_A.weight is not what" in again(**{"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)})
    assert "not finite" in again(**{"o_proj.lora_A.weight": torch.full((4, 32), torch.nan)})
    assert "has adapters for single experts (model.layers.0.mlp.experts.1.w1.lora_A.weight)" in again(**{"base_model.model.model.layers.0.mlp.experts.1.w1.lora_A.weight": torch.zeros(4, 32)})
    assert "is stored as I8" in again(**{"o_proj.lora_A.weight": torch.zeros((4, 32), dtype=torch.int8)})


def test_two_adapters_for_one_weight(tmp_path: Path) -> None:
    written(tmp_path, "qwen3", 4)
    change(tmp_path, **{"lm_head.lora_A.weight": torch.ones(4, 32)})
    assert "has two adapters where the model has one weight: lm_head.lora_A.weight" in refused(tmp_path, make("qwen3"))


def test_embeddings_that_were_made_longer(tmp_path: Path) -> None:
    written(tmp_path, "llama", 0)
    change(tmp_path, **{"base_model.model.model.embed_tokens.weight": torch.zeros(70, 32)})
    assert "embed_tokens.weight has the shape [70, 32], and this model gives it [64, 32]" in refused(tmp_path, make("llama"))


# --- experts as they were before transformers 5 ------------------------------------------------------------------------

OLDER = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), 48), "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 20)}


def older_adapter(directory: Path, name: str, router: bool) -> dict[str, Tensor]:
    """An adapter for each of three experts alone; the second layer of Qwen's model here has
    none."""
    block, names, inner = OLDER[name]
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, int]] = {f"{layer}.self_attn.q_proj": (32, 32) for layer in range(2)}
    for layer in range(2 if name == "mixtral" else 1):
        shapes |= {f"{layer}.{block}.gate": (32, 3)} if router else {}
        shapes |= {f"{layer}.{block}.experts.{expert}.{part}": (inner, 32) if part == names[2] else (32, inner)
                   for expert in range(3) for part in names}
    tensors = {f"base_model.model.model.layers.{key}.lora_{letter}.weight": torch.randn(size, generator=generator) * 0.15
               for key, (inputs, outputs) in shapes.items() for letter, size in (("A", (4, inputs)), ("B", (outputs, 4)))}
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", *names, *(["gate"] * router)]}))
    return tensors


@pytest.mark.parametrize("name", OLDER)
@pytest.mark.parametrize("router", (False, True))
def test_adapters_of_single_experts_are_fused_as_peft_does_it(tmp_path: Path, name: str, router: bool) -> None:
    older_adapter(tmp_path, name, router)
    found = read_adapter(tmp_path, outline_of(make(name)))
    adapted = load_in_peft(make(name), tmp_path)
    theirs = peft.get_peft_model_state_dict(adapted, adapter_name="given", save_embedding_layers=False)
    assert found.tensors.keys() == theirs.keys() and all(torch.equal(values, theirs[key]) for key, values in found.tensors.items())
    (tmp_path / "again").mkdir()
    write_adapter(tmp_path / "again", found.targets, found.tensors)
    torch.testing.assert_close(logits(load_in_peft(make(name), tmp_path / "again")), logits(adapted), rtol=0, atol=1e-5)


def test_experts_that_are_not_all_there(tmp_path: Path) -> None:
    tensors = older_adapter(tmp_path, "mixtral", False)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    change(tmp_path, **{"experts.2.w3.lora_B.weight": None})
    assert "has adapters for single experts" in refused(tmp_path, make("mixtral"))
    (tmp_path / "adapter_model.safetensors").write_bytes(whole)
    change(tmp_path, **{"layers.0.block_sparse_moe.experts.2.w3.lora_A.weight": torch.zeros(4, 31)})
    assert "parts of model.layers.0.mlp.experts.base_layer.lora_A.weight that do not fit together" in refused(tmp_path, make("mixtral"))
    save_file({**tensors, **{name: torch.zeros(5, 32) for name in tensors if "w1.lora_A" in name}}, tmp_path / "adapter_model.safetensors")
    assert "was made for another base: model.layers.0.mlp.experts.base_layer.lora_A.weight has the shape [27, 32]" in refused(tmp_path, make("mixtral"))


# --- the fingerprint -------------------------------------------------------------------------------------------------

def test_a_fingerprint_is_of_the_values() -> None:
    model = make("qwen3")
    whole = fingerprint_of(model.named_parameters())
    assert whole.startswith("sha256:") and len(whole) == 71
    assert fingerprint_of(reversed(list(model.named_parameters()))) == whole
    assert fingerprint_of(make("qwen3", torch.bfloat16).named_parameters()) == whole
    digests = {name: digest_of(values.shape, values.flatten().split(7)) for name, values in model.named_parameters()}
    assert fingerprint(digests) == whole
    for change_ in (lambda: model.lm_head.weight.data[3].mul_(1.01), lambda: model.model.norm.weight.data.add_(0.1)):
        before = fingerprint_of(model.named_parameters())
        change_()
        assert fingerprint_of(model.named_parameters()) != before
    first, second = torch.zeros(2, 3), torch.zeros(3, 2)
    assert digest_of(first.shape, [first]) != digest_of(second.shape, [second])
    assert fingerprint({"a": "1"}) != fingerprint({"b": "1"})


@pytest.mark.parametrize("name", ("gemma3", "mixtral"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_directory_has_the_fingerprint_of_its_model(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Whatever the weights are stored as, however they are called there, and whatever they are loaded in."""
    model = make(name, torch.bfloat16)
    model.to(dtype).save_pretrained(tmp_path)
    for loaded in (torch.float32, torch.bfloat16):
        parts = models.load(tmp_path, dtype=loaded, device=torch.device("cpu"))
        try:
            assert base_fingerprint(parts) == fingerprint_of(model.named_parameters())
        finally:
            parts.close()
