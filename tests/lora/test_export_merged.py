"""``ratel export --adapter``: a model directory with an adapter merged in has the weights that
peft's merge gives."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ratel import cli
from ratel.errors import RatelError
from ratel.lora.describe.outline import outline_of
from ratel.lora.describe.peft_config import of_object
from ratel.lora.describe.targets import resolve
from ratel.lora.files import write_adapter
from ratel.lora.values.fingerprint import fingerprint_of
from ratel.training.export_merged import export_merged
from tests.support.lora import logits, make, trained

pytestmark = pytest.mark.numerics
peft = pytest.importorskip("peft", minversion="0.21")

CASES = [("llama", dict(target_modules="all-linear"), "fp32"), ("llama", dict(target_modules=["q_proj", "embed_tokens"], use_dora=True), "bf16"),
         ("gemma3", dict(target_modules=["q_proj"], modules_to_save=["layers.1.mlp"]), "bf16"), ("gpt2", dict(target_modules="all-linear"), "bf16"),
         ("mixtral", dict(target_modules="all-linear"), "bf16"), ("gpt_oss", dict(target_parameters=["experts.down_proj"]), "fp32")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base_in(directory: Path, name: str, dtype: str) -> nn.Module:
    model = make(name, DTYPES[dtype])
    model.save_pretrained(directory)
    return model


def adapter_in(directory: Path, name: str, arguments: dict[str, Any], base: nn.Module, **words: Any) -> None:
    targets = resolve(of_object(peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **arguments})), outline_of(base))
    directory.mkdir()
    write_adapter(directory, targets, trained(targets), base=fingerprint_of(base.named_parameters()), **words)


def load(directory: Path, dtype: str) -> nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype])


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: values.detach() for name, values in model.named_parameters()}


@pytest.mark.parametrize(("name", "arguments", "dtype"), CASES)
def test_the_weights_are_those_of_pefts_merge(tmp_path: Path, name: str, arguments: dict[str, Any], dtype: str) -> None:
    base = base_in(tmp_path / "base", name, dtype)
    adapter_in(tmp_path / "adapter", name, arguments, base)
    export_merged(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    theirs = tensors(peft.PeftModel.from_pretrained(load(tmp_path / "base", dtype), str(tmp_path / "adapter")).merge_and_unload())
    ours = tensors(load(tmp_path / "out", dtype))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(values, theirs[key]) for key, values in ours.items())
    assert any(not torch.equal(values, tensors(base)[key]) for key, values in ours.items())
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_another_dtype_than_the_models(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "llama", "bf16")
    adapter_in(tmp_path / "adapter", "llama", dict(target_modules=["q_proj"]), base)
    assert cli.main(["export", "--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"),
                     "--dtype", "fp32"]) == 0
    theirs = tensors(peft.PeftModel.from_pretrained(load(tmp_path / "base", "fp32"), str(tmp_path / "adapter")).merge_and_unload())
    assert all(torch.equal(values, theirs[key]) for key, values in tensors(load(tmp_path / "out", "fp32")).items())


def refused(tmp_path: Path, **changed: Any) -> str:
    given = {"model": str(tmp_path / "base"), "adapter": tmp_path / "adapter", "out": tmp_path / "out", **changed}
    with pytest.raises(RatelError) as caught:
        export_merged(given.pop("model"), given.pop("adapter"), given.pop("out"), **given)
    assert "\n" not in str(caught.value) and sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []
    return str(caught.value)


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "llama", "bf16")
    with torch.no_grad():
        base.model.norm.weight.mul_(1.5)
    adapter_in(tmp_path / "adapter", "llama", dict(target_modules=["q_proj"]), base)
    assert "--adapter: was made for another base: its base has the fingerprint" in refused(tmp_path)
    assert "--model: is not a directory" in refused(tmp_path, model="llama-8b")


def test_an_embedding_that_was_changed_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "llama", "fp32")
    with torch.no_grad():
        base.model.embed_tokens.weight[3].mul_(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["embed_tokens"])).save_pretrained(tmp_path / "adapter")
    assert "its model.embed_tokens.weight is not the model's" in refused(tmp_path)


@pytest.mark.parametrize("arguments", (dict(target_modules=["lm_head"]), dict(target_modules=["embed_tokens", "wte"]),
                                       dict(target_modules=["q_proj", "c_attn"], modules_to_save=["lm_head"]),
                                       dict(target_modules=["embed_tokens", "wte", "lm_head"]),
                                       dict(target_modules=["lm_head"], ensure_weight_tying=True)))
@pytest.mark.parametrize("name", ("qwen3", "gpt2"))
def test_what_was_one_parameter_is_two_where_the_adapter_makes_it_two(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    """peft's own merge changes both ends; what it computes unmerged is what counts."""
    adapter_in(tmp_path / "adapter", name, arguments, base_in(tmp_path / "base", name, "fp32"))
    export_merged(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    settings, before = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("out", "base"))
    assert settings == before | ({} if "ensure_weight_tying" in arguments else {"tie_word_embeddings": False})
    merged = load(tmp_path / "out", "fp32")
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == ("ensure_weight_tying" in arguments)
    before = logits(load(tmp_path / "base", "fp32").eval())
    expected = logits(peft.PeftModel.from_pretrained(load(tmp_path / "base", "fp32"), str(tmp_path / "adapter")).eval())
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=0, atol=1e-4)
    assert (expected - before).abs().max() > 0.05


def test_options_that_do_not_belong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, words in ((["--optimizer", "--model", "x"], "--optimizer: is for a training state, and an adapter is none"), (["--ssd", "x", "--model", "x"], "--ssd"),
                        ([], "--model: is needed")):
        assert cli.main(["export", "--adapter", str(tmp_path), "--out", str(tmp_path / "out"), *more]) == 2
        assert words in capsys.readouterr().err
