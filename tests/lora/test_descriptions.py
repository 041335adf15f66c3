"""Descriptions from anywhere: each is refused in one line, or means the same once it has been
stored."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ratel.errors import RatelError
from ratel.lora.describe.mistakes import refuse_mistakes
from ratel.lora.describe.outline import ModelOutline, outline_of
from ratel.lora.describe.peft_config import of_directory
from ratel.lora.describe.stored_config import stored_config
from ratel.lora.describe.targets import resolve
from tests.support.lora import make

pytestmark = pytest.mark.unit

USUAL: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "c_attn"], "exclude_modules": None,
    "target_parameters": None, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
    "layers_pattern": None, "init_lora_weights": True, "bias": "none", "use_rslora": False, "use_dora": False, "ensure_weight_tying": False}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, 1e308, 10**30, "", "q_proj", ".*", "all-linear", "ALL-LINEAR", ")(", "(?i)q", "[", "lm_head", "a|b", "\\",
    "\\1", "(?P<x>a)", "norm", "experts", "mlp", "wte", "x" * 100000, "pissa", "pissa_niter_2", "gaussian", "eva", [], ["q_proj"], [""],
    ["lm_head"], ["embed_tokens"], [".*"], [")("], ["experts.gate_up_proj"], ["gate_up_proj", "down_proj"], ["gate.weight"], ["w1"],
    ["w1", "w3"], [0], [1, 2], [None], [["a"]], ["layers.0"], ["model.layers.0.self_attn"], ["wte"], ["norm.weight"], ["lm_head.weight"],
    {}, {"q_proj": 2}, {"(": 1}, {")(": 3}, {"q": True}, {"experts.gate_up_proj": 2}, {"a": None}]


@pytest.fixture(scope="module")
def outlines() -> list[ModelOutline]:
    return [outline_of(make(name)) for name in ("llama", "gpt2", "mixtral", "qwen3")]


def test_whatever_is_described(tmp_path: Path, outlines: list[ModelOutline]) -> None:
    """Two fields of a usual description are made odd, six hundred times."""
    source = random.Random(11)
    num_resolved = 0
    for _ in range(600):
        settings = {**USUAL, **{source.choice([*USUAL, "something_new"]): source.choice(ODD) for _ in range(source.randint(0, 2))}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        try:
            targets = resolve(of_directory(tmp_path), source.choice(outlines))
            again = resolve(stored_config(targets), targets.outline)
            num_resolved += 1
            assert again.file_shapes == targets.file_shapes, settings
            assert {layer.key: layer.scale for layer in again.layers} == {layer.key: layer.scale for layer in targets.layers}, settings
            refuse_mistakes(targets)
        except RatelError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, settings
    assert 150 < num_resolved < 550
