"""What an adapter is, from options, from peft's object and from `adapter_config.json`: read
strictly, and what is not supported is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from ratel.errors import RatelError
from ratel.lora.describe.config import LoraConfig, names_or_pattern
from ratel.lora.describe.peft_config import encode, is_peft_config, of_directory, of_object, settings_of

pytestmark = pytest.mark.unit


def write(directory: Path, **settings: Any) -> Path:
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], **settings}))
    return directory


def refused(directory: Path, **settings: Any) -> str:
    with pytest.raises(RatelError) as caught:
        of_directory(write(directory, **settings))
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") >= 1, "a remedy"
    return str(caught.value)


@pytest.mark.parametrize(("settings", "words"), [
    (dict(rank=0), "--lora: must be a whole number of at least 1 (given: 0)"), (dict(rank=1.5), "--lora: must be a whole"),
    (dict(rank=True), "--lora: must be"), (dict(alpha=0), "--lora-alpha: must be a number above 0"),
    (dict(alpha=float("nan")), "--lora-alpha"), (dict(alpha=float("inf")), "--lora-alpha"), (dict(dropout=1), "--lora-dropout: must be"),
    (dict(dropout=-0.1), "--lora-dropout"), (dict(rslora=1), "--rslora: must be true or false"),
    (dict(layers=-1), "--lora-layers"), (dict(targets=r"q_(proj"), "--lora-targets: is not a regular expression"),
    (dict(exclude=r"["), "--lora-exclude: is not a regular"), (dict(rank_pattern={"(": 2}), "--lora-rank-pattern: is not a regular"),
    (dict(rank_pattern={"q": 0}), "--lora-rank-pattern: must be a whole number"), (dict(alpha_pattern={"q": -1}), "--lora-alpha-pattern"),
    (dict(targets=("q", "")), "--lora-targets: must be names"), (dict(full=("",)), "--lora-full: must be names"),
    (dict(layers=1), "--lora-layers: is for a list of targets"), (dict(targets=("q",), layers_pattern=("h",)), "says nothing without layers"),
    *[(dict(init=name), f"--lora-init: is not an init that is supported (given: '{name}')")
      for name in ("corda", "loftq", "eva", "lora_ga", "orthogonal", "mica", "pissa_niter_x", "")]])
def test_values_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RatelError) as caught:
        LoraConfig(**settings)
    assert words in str(caught.value)


def test_a_text_of_the_command_line() -> None:
    assert names_or_pattern("all-linear") == "all-linear"
    assert names_or_pattern("q_proj") == ("q_proj",) and names_or_pattern("q_proj, model.layers.0.v_proj") == ("q_proj", "model.layers.0.v_proj")
    assert names_or_pattern(r".*\.(q|k)_proj") == r".*\.(q|k)_proj"


def test_scales_and_patterns() -> None:
    config = LoraConfig(rank=16, alpha=8, rank_pattern={"layers.0.q": 4, "q": 2}, alpha_pattern={r".*\.q": 6})
    assert config.scale_of("m.layers.1.v") == 0.5 and config.scale_of("m.layers.0.q") == 1.5 and config.scale_of("layers.1.q") == 3
    assert config.rank_of("xq") == 16, "an end begins after a dot"
    assert LoraConfig(rank=16, alpha=8, rslora=True).scale_of("v") == 2


def test_a_directory_is_read_and_written_alike(tmp_path: Path) -> None:
    config = LoraConfig(rank=3, alpha=5, dropout=0.25, targets=("k_proj", "q_proj"), exclude=r".*0.*", init="gaussian", rslora=True, dora=True,
                        rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 1.5}, full=("lm_head",), layers=(0, 2), layers_pattern=("layers",),
                        tied=True)
    (tmp_path / "adapter_config.json").write_bytes(encode(settings_of(config, base="some/base")))
    found = of_directory(tmp_path)
    assert found == LoraConfig(**{**{name: getattr(config, name) for name in config.__dataclass_fields__}, "init": "default"})
    assert found.words["rank"] == "lora.r"


@pytest.mark.parametrize(("settings", "words"), [
    (dict(peft_type="LOHA"), "is an adapter of peft's type 'LOHA'"), (dict(peft_type="ADALORA", r="x"), "'ADALORA'"),
    (dict(peft_type="PREFIX_TUNING", num_virtual_tokens=3), "'PREFIX_TUNING'"), (dict(peft_type=3), "peft_type must be a text"),
    (dict(bias="all"), "trains biases of the base (bias 'all')"), (dict(lora_bias=True), "biases of its own"),
    (dict(use_qalora=True), "quantised adapters"), (dict(alora_invocation_tokens=[3]), "aLoRA"), (dict(trainable_token_indices=[1]), "single tokens"),
    (dict(layer_replication=[[0, 2]]), "layers that are there more than once"), (dict(kasa_config={"beta": 1}), "kasa_config"),
    (dict(megatron_config={"a": 1}), "Megatron"), (dict(something_new={"a": 1}), "uses a setting that is not supported: something_new is"),
    *[(dict(init_lora_weights=name), "its training has changed") for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")],
    (dict(init_lora_weights="mica"), "mica"), (dict(r=0), "r must be a whole number from 1"), (dict(r=True), "r must be a whole number"),
    (dict(lora_alpha=-1), "lora_alpha must be a number"), (dict(lora_dropout="0.1"), "lora_dropout must be a number"),
    (dict(lora_dropout=1), "lora.lora_dropout: must be a number of at least 0 and below 1"),
    (dict(target_modules=3), "target_modules must be a list"), (dict(target_modules="("), "lora.target_modules: is not a regular expression"),
    (dict(rank_pattern={"q": 1.5}), "rank_pattern.q must be a whole number"), (dict(modules_to_save="lm_head"), "modules_to_save must be a list"),
    (dict(use_dora="yes"), "use_dora must be true or false"), (dict(layers_to_transform=[-1]), "layers_to_transform[0]")])
def test_what_is_not_supported_is_named(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, **settings)


def test_what_says_nothing_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, something_new=None, other_new=False, more=[], runtime_config={"a": 1}, eva_config={"rho": 2}, init_lora_weights="eva",
          megatron_core="megatron.core", loftq_config={}, auto_mapping={"base_model_class": "X"}, revision="main", lora_bias=False)
    assert of_directory(tmp_path).targets == ("q_proj",)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "not JSON"), (b"[]", "must be an object"), (b"{}", "peft_type is missing"), (b'{"peft_type": "LORA"', "not JSON"),
    (b'{"peft_type": "LORA", "r": 1, "r": 2}', "stands twice"), (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"), (b"\xff", "not UTF-8"),
    (b'{"peft_type": "LORA", "r": 99999999999999999999999}', "r must be a whole number")])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(RatelError, match=words):
        of_directory(tmp_path)


def test_a_directory_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(RatelError, match="holds no adapter_config.json"):
        of_directory(tmp_path)
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(RatelError, match="cannot be read"):
        of_directory(tmp_path)


def test_an_object_of_peft() -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    given = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.5, target_modules=["q", "k"], init_lora_weights="gaussian", use_rslora=True,
                            layers_to_transform=2, layers_pattern="h", modules_to_save=["s"], task_type="CAUSAL_LM", rank_pattern={"q": 9})
    assert is_peft_config(given) and not is_peft_config(LoraConfig()) and not is_peft_config("LORA")
    assert of_object(given) == LoraConfig(rank=3, alpha=7, dropout=0.5, targets=("k", "q"), init="gaussian", rslora=True, layers=2,
                                          layers_pattern=("h",), full=("s",), rank_pattern={"q": 9})
    assert of_object(peft.LoraConfig()) == LoraConfig(targets=None), "peft's defaults are ours, but for the targets"
    assert of_object(peft.LoraConfig(target_modules=".*q")).targets == ".*q"


def test_objects_of_peft_that_are_refused() -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    for given, words in ((peft.LoHaConfig(), "LOHA"), (peft.LoraConfig(bias="lora_only"), "biases of the base"), (peft.IA3Config(), "IA3"),
                         (peft.LoraConfig(init_lora_weights="eva"), "asks for init_lora_weights 'eva'"),
                         (peft.LoraConfig(init_lora_weights=False), "asks for init_lora_weights False"),
                         (peft.LoraConfig(init_lora_weights="orthogonal"), "orthogonal"), (peft.LoraConfig(lora_bias=True), "biases of its own"),
                         (peft.PrefixTuningConfig(num_virtual_tokens=4), "PREFIX_TUNING")):
        with pytest.raises(RatelError) as caught:
            of_object(given)
        assert words in str(caught.value)


def test_every_field_of_peft_is_known() -> None:
    """A field of a later peft that says something is refused; those of this one are each decided
    on."""
    peft = pytest.importorskip("peft", minversion="0.21")
    from ratel.lora.describe.config import PEFT_FIELDS
    from ratel.lora.describe.peft_config import _FULL_NAMES, _WITHOUT_EFFECT

    refused = {*_FULL_NAMES, "kasa_config", "arrow_config", "use_bdlora", "velora_config", "monteclora_config"}
    unknown = set(peft.LoraConfig.__dataclass_fields__) - _WITHOUT_EFFECT - set(PEFT_FIELDS.values()) - refused
    assert not unknown
