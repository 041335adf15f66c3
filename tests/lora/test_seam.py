"""An adapter that is described, begun and stored here computes, in Ratel's modules, what peft
computes with its files."""

from pathlib import Path

import pytest
import torch

from ratel.lora.compute import Adapter, Draws, adapt
from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.outline import outline_of
from ratel.lora.describe.targets import resolve
from ratel.lora.files import read_adapter, tensors_of, write_adapter
from tests.support.lora import load_in_peft, logits, make, trained

pytestmark = pytest.mark.numerics
peft = pytest.importorskip("peft", minversion="0.21")


@pytest.mark.parametrize("name", ("llama", "qwen3", "gemma3", "gpt2"))
def test_ratels_modules_compute_what_peft_loads(tmp_path: Path, name: str) -> None:
    model = make(name)
    before = logits(model)
    targets = resolve(LoraConfig(rank=3, alpha=7, rslora=True, rank_pattern={r".*\.1\..*proj": 5}), outline_of(model))
    write_adapter(tmp_path, targets, trained(targets))
    read = read_adapter(tmp_path, targets.outline)
    adapters = {layer.name: Adapter(a=values.a, b=values.b, scale=layer.scale)
                for layer in read.targets.layers for values in [tensors_of(layer, read.targets, read.tensors)]}
    adapt(model, adapters, draws=Draws(0))
    found = logits(model)
    torch.testing.assert_close(found, logits(load_in_peft(make(name), tmp_path)), rtol=0, atol=1e-5)
    assert (found - before).abs().max() > 0.05
