"""Runs that train an adapter, from what is given to what lies in OUT; what they are continued with,
exported as, and refused for."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ratel
from ratel import cli
from ratel.errors import RatelError
from ratel.training.export_state import export_state
from tests.support.lora import make, peft_tensors

peft = pytest.importorskip("peft", minversion="0.21")
pytestmark = pytest.mark.numerics
STEPS, SAVED = 4, 2
OPTIONS: dict[str, Any] = dict(device="cpu", dtype="fp32", quiet=True, eval_fraction=0.0, lr=1e-2, warmup_steps=0,
                               schedule="constant", unchecked=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def batches(count: int = STEPS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 64, (4, 9), generator=generator)} for _ in range(count)]


def train(base: Path, out: Path, **options: Any) -> Path:
    ratel.train(str(base), batches(), out=str(out), **{**OPTIONS, "steps": STEPS, **options})
    return out


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_peft(base: Path, adapter: Path) -> Any:
    """Raises where peft warns: of tensors that are missing or left over."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(model, str(adapter))


def test_a_run_ends_with_an_adapter_that_peft_loads(tmp_path: Path, base: Path) -> None:
    out = train(base, tmp_path / "run", lora=4, lora_alpha=6, lora_targets="q_proj,down_proj", lora_dropout=0.1)
    assert not (out / "model").exists()
    found, config = tensors(out / "adapter"), json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert len(found) == 8 and all(tensor.dtype is torch.float32 and tensor.abs().max() > 0 for tensor in found.values())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.1)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    assert config["base_model_name_or_path"] == str(base)
    assert_equal(peft_tensors(in_peft(base, out / "adapter")), found)


def test_a_run_that_exports_nothing_has_no_adapter(tmp_path: Path, base: Path) -> None:
    out = train(base, tmp_path / "run", lora=4, export=False)
    assert not (out / "adapter").exists() and not (out / "model").exists()


@pytest.mark.parametrize("init", ("default", "pissa"))
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, base: Path, init: str) -> None:
    """Half a run, then the rest of it with what config.json says: an object of peft's was given."""
    asked = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
                            rank_pattern={"layers.0.mlp.down_proj": 2}, init_lora_weights=True if init == "default" else init)
    whole = train(base, tmp_path / "whole", lora=asked)
    half = train(base, tmp_path / "half", lora=asked, steps=SAVED, save_every=SAVED)
    assert not all(map(torch.equal, tensors(whole / "adapter").values(), tensors(half / "adapter").values()))
    ratel.train(str(base), batches(), out=str(half), resume=True, steps=STEPS)
    assert_equal(tensors(half / "adapter"), tensors(whole / "adapter"))
    assert export_state(half, tmp_path / "exported", optimizer=True) == tmp_path / "exported"
    assert_equal(tensors(tmp_path / "exported"), tensors(whole / "adapter"))
    with_moments = {name.partition(".")[2] for name in load_file(tmp_path / "exported" / "optimizer.safetensors") if name != "step"}
    assert len(with_moments) == 2 * 2 * 2 + 1 and all("lora_" in name or name == "lm_head.weight" for name in with_moments)


@pytest.mark.parametrize(("options", "words"), (
    (dict(lora=3), "lora: the state was trained with 4 there (given: 3)"),
    (dict(lora_alpha=3), "lora_alpha: the state was trained with 8"),
    (dict(lora_targets="v_proj"), "lora_targets: the state was trained with"),
    (dict(lora_init="gaussian"), "lora_init: the state was trained with")))
def test_a_run_is_not_continued_with_another_adapter(tmp_path: Path, base: Path, options: dict[str, Any], words: str) -> None:
    out = train(base, tmp_path / "run", lora=4, steps=SAVED, save_every=SAVED)
    before = (out / "metrics.jsonl").read_bytes(), tensors(out / "adapter")
    with pytest.raises(RatelError) as caught:
        ratel.train(str(base), batches(), out=str(out), resume=True, steps=STEPS, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert (out / "metrics.jsonl").read_bytes() == before[0]
    assert_equal(tensors(out / "adapter"), before[1])


def test_a_state_without_an_adapter_is_not_continued_with_one(tmp_path: Path, base: Path) -> None:
    out = train(base, tmp_path / "run", steps=SAVED, save_every=SAVED)
    with pytest.raises(RatelError, match="without an adapter"):
        ratel.train(str(base), batches(), out=str(out), resume=True, steps=STEPS, lora=4)
    with pytest.raises(RatelError, match="--merge: has no adapter to merge"):
        export_state(out, tmp_path / "merged", merge=True)


def test_an_adapter_is_gone_on_with(tmp_path: Path, base: Path) -> None:
    """Without a step's learning rate to speak of it is what it was; what was trained goes up from
    there."""
    first = train(base, tmp_path / "first", lora=4, lora_targets="q_proj") / "adapter"
    again = train(base, tmp_path / "again", lora=str(first), lr=1e-30, steps=1)
    assert_equal(tensors(again / "adapter"), tensors(first))
    more = train(base, tmp_path / "more", lora=str(first))
    assert all(not torch.equal(tensors(more / "adapter")[name], tensor) for name, tensor in tensors(first).items())
    with pytest.raises(RatelError, match="--lora: "):
        train(base, tmp_path / "more", lora=str(more / "adapter"), overwrite=True)
    assert (more / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_a_merged_state_is_pefts_merge(tmp_path: Path, base: Path, dtype: str) -> None:
    import transformers

    out = train(base, tmp_path / "run", lora=4, save_every=STEPS)
    status = cli.main(["export", "--state", str(out), "--merge", "--out", str(tmp_path / "merged"), "--dtype", dtype])
    assert status == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "run"]
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=kind)
    expected = peft.PeftModel.from_pretrained(model, str(out / "adapter")).merge_and_unload()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=kind)
    assert_equal(dict(merged.state_dict()), dict(expected.state_dict()))


def test_flags_train_an_adapter(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a few words to learn from"}\n' * 8)
    (tmp_path / "run.toml").write_text('lora = 4\n[lora-rank-pattern]\n"layers.0.self_attn.q_proj" = 2\n')
    model = make("llama")
    model.config.vocab_size = 300
    model.resize_token_embeddings(300)
    model.save_pretrained(base)
    out = tmp_path / "run"
    assert cli.main(["train", "--config", str(tmp_path / "run.toml"), "--model", str(base), "--data", str(tmp_path / "text.jsonl"),
                     "--steps", "1", "--batch-size", "2", "--seq-len", "8", "--device", "cpu", "--unchecked", "--eval-fraction", "0",
                     "--out", str(out), "--lora-targets", "q_proj,v_proj", "--save-every", "1"]) == 0
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(out / "adapter").items() if "q_proj.lora_A" in name}
    assert [shape for _, shape in sorted(shapes.items())] == [(2, 32), (4, 32)]
    assert f"{out}: metrics.jsonl (one object per step), adapter/ (loads with peft)" in capsys.readouterr().out
    assert (out / "adapter" / "tokenizer.json").is_file()
    assert cli.main(["export", "--state", str(out), "--out", str(tmp_path / "exported")]) == 0
    files = sorted(os.listdir(out / "adapter"))
    assert sorted(os.listdir(tmp_path / "exported")) == files
    assert all((tmp_path / "exported" / name).read_bytes() == (out / "adapter" / name).read_bytes() for name in files)


def test_a_head_that_is_new_must_be_trained(tmp_path: Path, base: Path) -> None:
    """A frozen head of random numbers classifies nothing."""
    rows = {"input_ids": torch.arange(3, 12).repeat(2, 1), "labels": torch.tensor([0, 1])}
    options = dict(task=ratel.Task(name="classify", labels=("a", "b")), lora=4, device="cpu", dtype="fp32")
    with pytest.raises(RatelError, match="lora_full: .*score"):
        with ratel.Session(str(base), **options) as session:
            session.prepare(2, 9)
    with ratel.Session(str(base), **options, lora_full=["score"], lr=1e-2) as session:
        session.step(rows)
        session.export(tmp_path / "adapter")
    assert any("score" in name for name in tensors(tmp_path / "adapter"))
