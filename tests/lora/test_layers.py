"""Adapters of every kind on models of transformers: what peft computes, and its gradients."""

import pytest
import torch

from ratel.lora.compute import Draws, adapt_layers
from ratel.lora.describe.outline import outline_of
from ratel.lora.describe.peft_config import of_object
from ratel.lora.describe.targets import resolve
from tests.support.lora import logits, make, peft_model, trained

pytestmark = pytest.mark.numerics
peft = pytest.importorskip("peft", minversion="0.21")


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_what_peft_computes(name: str) -> None:
    given = peft.LoraConfig(r=4, lora_alpha=7, target_modules="all-linear")
    model = make(name)
    targets = resolve(of_object(given), outline_of(model))
    stored = trained(targets)
    theirs = peft_model(make(name), given)
    assert not peft.set_peft_model_state_dict(theirs, dict(stored)).unexpected_keys
    tensors = {own: stored[in_file] for layer in targets.layers for own, in_file in layer.added.items()}
    made = adapt_layers(model, targets.layers, tensors, draws=Draws(seed=0))
    assert made.keys() == {layer.key for layer in targets.layers}
    assert {own for own, _ in model.named_parameters() if "lora_" in own} == tensors.keys()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
