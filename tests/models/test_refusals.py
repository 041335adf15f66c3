"""Directories, names and sizes that no model can be made of are refused, with the reason, before
anything is touched."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ratel.models import load
from tests.support.models import CPU, make_model
from tests.support.refused_models import refused

pytestmark = pytest.mark.unit


# --- directories ----------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_missing_tensors(directory: Path) -> None:
    rewrite(directory, lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)])
    error = refused("lack model.layers.0.mlp.up_proj.weight, model.layers.1.*, model.layers.2", directory)
    assert error.remedy and str(directory) in str(error)


def test_an_untied_head_that_is_missing(directory: Path) -> None:
    rewrite(directory, lambda t: t.pop("lm_head.weight"))
    refused("lack lm_head.weight", directory)


def test_a_wrong_shape(directory: Path) -> None:
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    refused(r"model.norm.weight is \[31\], the model needs \[32\]", directory)


def test_a_missing_expert(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if "experts.2." in n)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    refused("layers.0.mlp.experts", tmp_path)


def test_weights_in_integers(directory: Path) -> None:
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    refused("stored as I8", directory)


@pytest.mark.parametrize("keep", [0, 5, 100, -100])
def test_a_file_that_is_cut_off(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    error = refused("cut off|not a readable safetensors file", directory)
    assert error.value == path


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [3],'
                                    b' "data_offsets": [0, 4]}}'])
def test_a_corrupt_header(directory: Path, header: bytes) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused("not a readable safetensors file", directory)


def test_a_missing_shard_and_a_corrupt_index(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    refused("a file that the index names is missing", tmp_path)
    shard.write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [')
    refused("not an index", tmp_path)


def test_no_weights_or_only_pickled_ones(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refused("no model.safetensors", directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "save_pretrained" in str(refused("pickled", directory).remedy)


def test_configurations(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())

    def with_config(text: str | None) -> Path:
        (directory / "config.json").unlink() if text is None else (directory / "config.json").write_text(text)
        return directory

    refused("unknown model type 'lama'", with_config(json.dumps(config | {"model_type": "lama"})))
    refused("no model_type", with_config(json.dumps({k: v for k, v in config.items() if k != "model_type"})))
    refused("quantized", with_config(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})))
    refused("not a readable configuration", with_config("{"))
    refused("no config.json", with_config(None))


def test_names_that_are_neither_directory_nor_preset(tmp_path: Path) -> None:
    assert "llama-7b" in str(refused("neither a directory nor a preset", "llama-7").remedy)
    assert "nothing is downloaded" in str(refused("neither", "meta-llama/Llama-3.1-8B").remedy)
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused("is a file", tmp_path / "model.safetensors")
    refused("not a model", 3)


def test_options() -> None:
    refused("unknown attention", "demo", attention="fast")
    refused("on a CUDA device", "demo", attention="flash", dtype=torch.bfloat16)
    error = refused("at most 1024 tokens", "demo", max_seq_len=2000)
    assert error.field == "--seq-len"


def test_an_encoder_decoder() -> None:
    from transformers import T5Config

    refused("encoder-decoder", T5Config())


# --- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [({"vocab_size": -1}, "transformers cannot build it"),
                                                 ({"num_key_value_heads": 3}, "of this configuration cannot run.*Check the sizes")])
def test_sizes_that_do_not_go_together(change: dict[str, int], message: str, directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    error = refused(message, directory)
    assert error.field == "model"


def test_weights_that_config_json_has_no_place_for_are_named(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(directory, dtype=torch.float32, device=CPU).close()
    assert caplog.text == ""
    path = directory / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "num_hidden_layers": content["num_hidden_layers"] - 1}))
    load(directory, dtype=torch.float32, device=CPU).close()
    assert "of the weights model.layers." in caplog.text and "more are not used" in caplog.text


def test_a_model_without_a_limit_says_so_with_minus_one() -> None:
    """XLNet."""
    from types import SimpleNamespace

    from ratel.models.structure.unit_layout import longest_sequence

    for said, limit in ((-1, None), (None, None), (64, 64)):
        module = nn.Linear(2, 2)
        module.config = SimpleNamespace(max_position_embeddings=said)
        assert longest_sequence(module) == limit
