"""An export is the directory that was trained, with other weights: every file beside them,
config.json key by key, tensors as the checkpoint had them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import ratel
from ratel.data import byte_level_tokenizer
from ratel.errors import RatelError
from ratel.models.safetensors import writer as shards
from ratel.models.safetensors.writer import Outline, Piece, write_shards
from ratel.runtime.session.session import Session
from tests.models.test_loading import SIZES, configs, rewrite, write

pytestmark = pytest.mark.e2e

BESIDE = {"generation_config.json": b'{"eos_token_id": [2,5,7],   "temperature": 0.6}', "LICENSE": b"free\r\n",
          "README.md": "Mod\u00e8le".encode(), "chat_template.jinja": b"{{ messages }}", "preprocessor_config.json": b"{}",
          "modeling_mine.py": b"raise SystemExit('ran')\n", "tokenizer.model": bytes(range(256))}
LEFT = {"pytorch_model.bin": b"old", "consolidated.safetensors.index.json": b"{}", "model.gguf": b"GGUF", ".gitattributes": b"x",
        "optimizer.pt": b"old"}


def directory(tmp_path: Path, family: str = "llama", **settings: Any) -> Path:
    path = tmp_path / "in"
    write(configs()[family], path)
    for name, content in {**BESIDE, **LEFT}.items():
        (path / name).write_bytes(content)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_bytes(b"{{ tools }}")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))
    return path


def exported(path: Path, out: Path, dtype: str = "fp32", computes_in: str = "fp32") -> Path:
    with Session(path, dtype=computes_in, device="cpu", lr=1e-3) as session:
        session.step({"input_ids": torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))})
        return session.export(out, dtype=dtype)


def test_every_file_beside_the_weights_goes_along(tmp_path: Path) -> None:
    path = directory(tmp_path)
    out = exported(path, tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {*BESIDE, "config.json", "model.safetensors", "additional_chat_templates"}
    assert all((out / name).read_bytes() == content for name, content in BESIDE.items())
    assert (out / "additional_chat_templates" / "tool.jinja").read_bytes() == b"{{ tools }}"


def test_a_link_of_a_hubs_cache_becomes_a_file(tmp_path: Path) -> None:
    path = directory(tmp_path)
    (path / "LICENSE").rename(tmp_path / "blob")
    (path / "LICENSE").symlink_to(tmp_path / "blob")
    out = exported(path, tmp_path / "out")
    assert not (out / "LICENSE").is_symlink() and (out / "LICENSE").read_bytes() == BESIDE["LICENSE"]


def test_a_file_without_end_beside_the_weights_is_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would fill the disk; a file of holes has any size."""
    path = directory(tmp_path)
    for name in ("generation_config.json", "additional_chat_templates/long.jinja"):
        with (path / name).open("wb") as file:
            file.truncate(1 << 36)
    out = exported(path, tmp_path / "out")
    assert not (out / "generation_config.json").exists() and "generation_config.json is larger than 256 MiB" in caplog.text
    assert [file.name for file in (out / "additional_chat_templates").iterdir()] == ["tool.jinja"]


def test_a_file_that_is_gone_does_not_cost_the_trained_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = directory(tmp_path)
    with Session(path, dtype="fp32", device="cpu", lr=1e-3) as session:
        session.step({"input_ids": torch.randint(3, 96, (2, 16))})
        (path / "LICENSE").unlink()
        (path / "config.json").unlink()
        (path / "late.txt").write_text("not there when the model was loaded")
        out = session.export(tmp_path / "out", dtype="fp32")
    assert {p.name for p in out.iterdir()} == {*BESIDE, "config.json", "model.safetensors", "additional_chat_templates"} - {"LICENSE"}
    assert "LICENSE cannot be read any more" in caplog.text
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_config_json_keeps_every_key(tmp_path: Path) -> None:
    mine = {"use_cache": True, "my_key": [1, {"x": None}], "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"},
            "transformers_version": "4.30.0", "torch_dtype": "float16", "_name_or_path": "someone/else"}
    path = directory(tmp_path, **mine)
    before = json.loads((path / "config.json").read_text())
    after = json.loads((exported(path, tmp_path / "out", "bf16") / "config.json").read_text())
    changed = {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    assert after == {**before, **{key: value for key, value in changed.items() if key in before}}


def test_the_dtype_of_each_part_is_that_of_the_weights(tmp_path: Path) -> None:
    from ratel.models.checkpoints.beside import Origin, write_beside

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(
        {"text_config": {"dtype": "float32", "x": 1}, "vision_config": {"torch_dtype": "float16"}, "architectures": ["Old"]}))
    write_beside(Origin.of_directory(tmp_path / "in", {}), torch.nn.Linear(1, 1), tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "text_config": {"dtype": "bfloat16", "x": 1}, "vision_config": {"torch_dtype": "bfloat16"}, "architectures": ["Linear"],
        "dtype": "bfloat16"}


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3", "qwen3-tied"])
def test_tensors_are_as_the_checkpoint_had_them(family: str, tmp_path: Path) -> None:
    path = directory(tmp_path, family)
    out = exported(path, tmp_path / "out")
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert ("model.layers.0.block_sparse_moe.experts.1.w2.weight" in after) == (family == "mixtral")
    assert any(not torch.equal(after[name], before[name]) for name in before)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_experts_that_were_merged_stay_merged(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = directory(tmp_path, "mixtral")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors",
              metadata={"format": "pt"})
    after = load_file(exported(path, tmp_path / "out") / "model.safetensors")
    assert after.keys() == load_file(path / "model.safetensors").keys()


def test_tensors_that_were_never_tied_are_not_said_to_be(tmp_path: Path) -> None:
    path = directory(tmp_path, "qwen3-tied")
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    out = exported(path, tmp_path / "out")
    after = load_file(out / "model.safetensors")
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded.lm_head.weight, after["lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, after["model.embed_tokens.weight"])


@pytest.mark.parametrize("own_batches", [True, False])
def test_the_tokenizer_goes_along_however_the_data_is_given(own_batches: bool, tmp_path: Path) -> None:
    path = directory(tmp_path, "llama")
    write(transformers.LlamaConfig(**{**SIZES, "vocab_size": 259}), path)
    (path / "tokenizer.model").unlink()
    (path / "chat_template.jinja").unlink()
    byte_level_tokenizer().save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "my_key": 1}, indent=7))
    (tmp_path / "text.txt").write_text("words and words. " * 500)
    data = [{"input_ids": torch.randint(3, 96, (2, 16))}] if own_batches else str(tmp_path / "text.txt")
    ratel.train(str(path), data, steps=1, batch_size=2, seq_len=16, dtype="fp32", device="cpu", out=str(tmp_path / "run"), quiet=True)
    names = {p.name for p in path.iterdir() if p.is_file()} - {*LEFT, "config.json", "model.safetensors"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert all((tmp_path / "run" / "model" / name).read_bytes() == (path / name).read_bytes() for name in names)


def test_a_chat_template_that_the_tokenizer_lacked_is_added_alone(tmp_path: Path) -> None:
    from ratel.data.tokens.tokenizer import own_tokenizer, write_tokenizer

    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "in")
    own = own_tokenizer(tmp_path / "in", tokenizer)
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", own)
    assert not list((tmp_path / "out").iterdir())
    tokenizer.chat_template = "{{ messages }}"
    write_tokenizer(tokenizer, tmp_path / "out", own)
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [("chat_template.jinja", "{{ messages }}")]
    write_tokenizer(tokenizer, tmp_path / "other", None)
    assert (tmp_path / "other" / "tokenizer.json").is_file()


def test_a_model_that_came_from_no_directory_has_what_transformers_writes(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(configs()["llama"])
    model.generation_config.temperature = 0.3  # which save_pretrained refuses without do_sample
    with Session(model, dtype="fp32", device="cpu") as session:
        session.step({"input_ids": torch.randint(3, 96, (2, 16))})
        session.export(tmp_path / "out", dtype="fp32")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32" and config.get("use_cache", True)


# --- files ------------------------------------------------------------------------------------------------------------


def pieces(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    return [Piece(outlines={name: Outline.of(tensor)}, make=lambda name=name, tensor=tensor: [(name, tensor)])
            for name, tensor in tensors.items()]


TENSORS = {"flags": torch.tensor([True, False, True]), "half": torch.randn(3, 5).bfloat16(), "whole": torch.arange(7),
           "single": torch.tensor(3.5), "none": torch.zeros(0, 4), "turned": torch.randn(4, 6).t()}


@pytest.mark.parametrize("shard_bytes, files", [(10_000, 1), (60, 4), (0, 6)])
def test_whatever_is_written_is_read(shard_bytes: int, files: int, tmp_path: Path) -> None:
    write_shards(tmp_path, "model", pieces(TENSORS), metadata={"format": "pt"}, shard_bytes=shard_bytes)
    written = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for path in written for name, tensor in load_file(path).items()}
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in found)
    assert len(written) <= files and (len(written) == 1) == (not (tmp_path / "model.safetensors.index.json").exists())
    for path in written:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    if len(written) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == TENSORS.keys()
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_every_tensor_begins_at_a_multiple_of_its_elements(tmp_path: Path) -> None:
    write_shards(tmp_path, "model", pieces(TENSORS), metadata={}, shard_bytes=10_000)
    content = (tmp_path / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    for name, tensor in TENSORS.items():
        assert begin % 8 == 0 and header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_a_model_below_five_gigabytes_is_one_file() -> None:
    assert shards.SHARD_BYTES == 5_000_000_000


def test_a_tensor_that_never_comes_is_noticed(tmp_path: Path) -> None:
    piece = Piece(outlines={"a": Outline(shape=(1,), dtype=torch.float32)}, make=lambda: [])
    with pytest.raises(AssertionError, match="never written"):
        write_shards(tmp_path, "model", [piece], metadata={}, shard_bytes=10)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Session(path, dtype="fp32", device="cpu") as session:
        session.step({"input_ids": torch.randint(3, 96, (2, 16))})
        monkeypatch.setattr(shards.os, "pwrite", full)
        with pytest.raises(RatelError, match="cannot be written.*No space left.*model.safetensors"):
            session.export(tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
