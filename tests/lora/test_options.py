"""What is asked for on a command line, in a file and in Python, and what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ratel
from ratel.config import TrainConfig, resolve
from ratel.errors import RatelError
from ratel.lora.describe.as_json import of_json, to_json
from ratel.lora.describe.config import LoraConfig
from ratel.lora.request import AdapterRequest, adapter_request, described
from ratel.planner.search.options import SessionOptions
from ratel.runtime.session.session import Session
from tests.support.lora import make

peft = pytest.importorskip("peft", minversion="0.21")
pytestmark = pytest.mark.numerics


def written(directory: Path, **settings: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **settings}
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


def request(**options: Any) -> AdapterRequest | None:
    return adapter_request(TrainConfig(**options))


def test_flags_and_files_and_arguments_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('lora = 4\nlora-alpha = 6\nlora-targets = ["q_proj", "v_proj"]\nlora-layers = [0, 1]\nrslora = true\n'
                    'lora-rank-pattern = {"layers.0.*" = 2}\n')
    flags = dict(lora="4", lora_alpha="6", lora_targets="q_proj,v_proj", lora_layers="0,1", rslora=True, lora_rank_pattern="layers.0.*=2")
    expected = LoraConfig(rank=4, alpha=6, targets=("q_proj", "v_proj"), layers=(0, 1), rslora=True, rank_pattern={"layers.0.*": 2})
    for config in (resolve({}, file), resolve(flags)):
        assert adapter_request(config) == AdapterRequest(config=expected)
        assert resolve(config.to_json()) == config
    assert adapter_request(SessionOptions(lora=described(expected))) == AdapterRequest(config=expected)


def test_a_text_of_targets_may_be_an_expression() -> None:
    assert request(lora=4, lora_targets=r".*\.(q|v)_proj").config.targets == r".*\.(q|v)_proj"
    assert request(lora=4, lora_targets="all-linear").config.targets == "all-linear"


@pytest.mark.parametrize("config", (LoraConfig(rank=3), LoraConfig(rank=16, targets=None, parameters=("experts.down_proj",)), LoraConfig(
    rank=8, alpha=2.5, dropout=0.1, targets=("a", "b.c"), exclude=".*x", init="pissa_niter_4", rslora=True, dora=True, rank_pattern={"q": 2},
    alpha_pattern={"q": 1.5}, full=("lm_head",), layers=(1, 2), layers_pattern=("h",), tied=True)))
def test_descriptions_survive_json(config: LoraConfig) -> None:
    assert of_json(json.loads(json.dumps(to_json(config)))) == config


def test_objects_of_peft_and_directories_are_taken(tmp_path: Path) -> None:
    given = described(peft.LoraConfig(r=3, target_modules=["q"], lora_dropout=0.2))
    assert adapter_request(SessionOptions(lora=given)).config == LoraConfig(rank=3, targets=("q",), dropout=0.2)
    found = request(lora=str(written(tmp_path)))
    assert found == AdapterRequest(config=LoraConfig(rank=3, alpha=5, targets=("q_proj",)), directory=tmp_path)
    assert request(lora=str(tmp_path), lora_dropout=0.3).config.dropout == 0.3
    written(tmp_path, lora_dropout=0.1)
    assert [request(lora=str(tmp_path), lora_dropout=p).config.dropout for p in (None, 0.0)] == [0.1, 0.0]


def test_the_learning_rate_of_adapters() -> None:
    assert (TrainConfig().lr, TrainConfig(lora=4).lr, TrainConfig(lora=4, lr=3e-5).lr, SessionOptions(lora=4).lr) == (1e-5, 1e-4, 3e-5, 1e-4)


@pytest.mark.parametrize(("options", "words"), (
    (dict(lora_alpha=3), "--lora-alpha: says something of an adapter, and there is none"),
    (dict(dora=True), "--dora: says something of an adapter"),
    (dict(lora_graph="time"), "--lora-graph: says something of an adapter"),
    (dict(lora=0), "--lora: must be at least 1"), (dict(lora=True), "--lora: not a whole number"), (dict(lora=1.5), "--lora: not a whole number"),
    (dict(lora="16x"), "--lora: is neither a rank nor the directory of an adapter"),
    (dict(lora=4, lora_graph="f9"), "lora_graph: is not an order for adapters"),
    (dict(lora=4, lora_dropout=1), "--lora-dropout: must be below 1"), (dict(lora=4, lora_alpha=0), "--lora-alpha: must be above 0"),
    (dict(lora=4, lora_init="eva"), "--lora-init: is not an init that is supported"),
    (dict(lora=4, lora_rank_pattern="q_proj"), "--lora-rank-pattern: must be numbers by pattern"),
    (dict(lora=4, lora_rank_pattern="q_proj=x"), "--lora-rank-pattern: not a whole number"),
    (dict(lora=4, lora_targets="("), "--lora-targets: is not a regular expression"),
    (dict(lora=4, lora_layers="-1"), "--lora-layers: must be at least 0"),
    (dict(lora={"rank": 4, "what": 1}), "--lora: is no description of an adapter")))
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RatelError) as caught:
        request(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    for options, words in ((dict(lora_alpha=9), "--lora-alpha: contradicts --lora, whose adapter has 5 there"),
                           (dict(lora_targets="v_proj"), "--lora-targets: contradicts --lora")):
        with pytest.raises(RatelError, match=words):
            request(lora=str(tmp_path), **options)


def refused(words: str, lora: Any, name: str = "llama", **options: Any) -> None:
    with pytest.raises(RatelError) as caught:
        Session(make(name), lora=lora, device="cpu", dtype="fp32", **options)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_targets_that_match_nothing() -> None:
    refused("lora_targets: fits no layer of the model (given: q_prj). Did you mean q_proj", 4, lora_targets="q_prj")
    refused("lora_targets: fits nothing in the model (given: q_prj). Did you mean q_proj", 4, lora_targets="v_proj,q_prj")


def test_a_rank_above_the_layers_size() -> None:
    refused("lora: is above the size of model.layers.0.self_attn.q_proj, 32 by 32, which has no higher rank than 32 (given: 33)", 33)


def stored(directory: Path, name: str = "llama", **settings: Any) -> Path:
    """An adapter that a session has written."""
    with Session(make(name), lora=LoraConfig(rank=4, **settings), device="cpu", dtype="fp32") as session:
        session.prepare(2, 8)
        return session.export(directory)


def test_an_adapter_for_another_base(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "adapter")
    refused("fits no layer of the model (given: down_proj", adapter, "gpt2")
    model = make("llama", seed=1)
    with pytest.raises(RatelError, match="lora: was made for another base: its base has the fingerprint"):
        Session(model, lora=adapter, device="cpu", dtype="fp32")
    Session(make("llama"), lora=adapter, device="cpu", dtype="fp32").close()


def test_a_module_to_save_that_is_missing(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "adapter", full=("lm_head",))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "lm_head" not in name}, adapter / "adapter_model.safetensors")
    refused("lacks lm_head.weight, which adapter_config.json says was trained as a whole (modules_to_save)", adapter)


def test_other_types_of_adapters(tmp_path: Path) -> None:
    refused("is an adapter of peft's type 'IA3'", written(tmp_path / "a", peft_type="IA3"))
    refused("with init_lora_weights 'loftq'", written(tmp_path / "b", init_lora_weights="loftq"))
    adapter = stored(tmp_path / "c")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    refused("not in floating point", adapter)


def test_directories_that_are_cut_off(tmp_path: Path) -> None:
    refused("is cut off: it has adapter_config.json and no adapter_model.safetensors", written(tmp_path / "a"))
    adapter = stored(tmp_path / "b")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("lora:", adapter)
    (tmp_path / "c").mkdir()
    refused("holds no adapter_config.json, and is no adapter of peft's", tmp_path / "c")


@pytest.mark.parametrize("other", (
    dict(lora=5), dict(lora_alpha=3), dict(lora_dropout=0.1), dict(lora_targets="q_proj"), dict(lora_exclude="q_proj"),
    dict(lora_parameters="a.b"), dict(lora_init="pissa"), dict(rslora=True), dict(dora=True), dict(lora_rank_pattern="q=2"),
    dict(lora_alpha_pattern="q=2"), dict(lora_full="lm_head"), dict(lora_layers="1"), dict(lora_layers_pattern="h"), dict(lora_tied=True),
    dict(lora_graph="flops")))
def test_a_plan_for_another_adapter_is_another_one(other: dict[str, Any]) -> None:
    """What is remembered of plans has these in its key."""
    assert SessionOptions(**{"lora": 4, **other}).of_plan != SessionOptions(lora=4).of_plan


def test_a_plan_counts_the_products_that_it_makes() -> None:
    """A frozen weight has no gradient."""
    found = ratel.plan("llama-1b", lora=ratel.LoraConfig(rank=16), hardware="4090", batch_size=8, seq_len=256, gpu_memory="24GiB",
                       dram="64GiB", advice=False)
    spec, rate = found.plan.spec, found.prediction.tokens_per_s
    flops = (4 * spec.num_params + 2 * spec.num_trainable_params) * rate
    assert f"{flops / 1e12:,.1f} TFLOP/s counted as 6 per parameter and token, 4 where it is frozen" in found.describe()


def test_a_plan_has_the_adapter() -> None:
    plan = ratel.plan("llama-1b", lora=16, hardware="4090", batch_size=8, seq_len=256, gpu_memory="24GiB", dram="64GiB").plan
    whole = ratel.plan("llama-1b", hardware="4090", batch_size=8, seq_len=256, gpu_memory="24GiB", dram="64GiB").plan
    assert plan.spec.num_trainable_params * 50 < whole.spec.num_trainable_params
    adapters = [unit for unit in plan.spec.units if unit.num_trainable]
    assert all(unit.name.endswith(".adapters") and plan.placement(unit).on_gpu for unit in adapters)
    assert plan.profiles[0].backward_flops < 1.2 * plan.profiles[0].forward_flops  # no gradient of a frozen weight


def test_a_plan_spares_ssds_where_dram_has_room() -> None:
    """Activations that return in time from either lie in DRAM: a drive wears."""
    plan = ratel.plan("llama-8b", lora=16, hardware="4090", batch_size=8).plan
    assert not {"checkpoints", "inner activations"} & plan.ssd_items.keys() and "inner activations" in plan.dram_items


def test_a_plan_says_from_how_many_tokens_on_the_base_is_unseen() -> None:
    """Twice the weights over the link, against 4 operations a parameter and token, and those of the
    second run that is not spared."""
    report = ratel.plan("llama-8b", lora=16, hardware="4090", batch_size=8, gpu_memory="8GiB", dram="100GiB", activations="recompute").report
    machine, plan = report.hardware, report.plan
    streamed = 2 * sum(2 * unit.num_elements for unit in plan.spec.units if not plan.placement(unit).on_gpu)
    flops_a_token = 6 * plan.spec.num_params
    expected = streamed / machine.h2d_bps * machine.gpu_flops / flops_a_token
    assert 0.7 * expected < report.hiding_tokens < 1.2 * expected
    assert f"from {report.hiding_tokens:,} tokens a step on" in report.describe()
    assert ratel.plan("llama-1b", hardware="4090", batch_size=8, gpu_memory="4GiB", dram="64GiB").report.hiding_tokens is None
