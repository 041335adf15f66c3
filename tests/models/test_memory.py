"""Models of any size come apart in little memory, and no buffer changes on the way."""

import resource
import subprocess
import sys

import pytest
import torch

from ratel.models import load
from ratel.models.presets import PRESETS
from ratel.models.structure.skeleton import parameters_on_meta
from tests.support.models import CPU, FAMILIES, attach_all, configs, make_batch, make_model, vertical_pass
from tests.support.patience import patience

pytestmark = pytest.mark.unit

LARGE = """
import resource, torch
from ratel.models import load
cpu = torch.device("cpu")
load("demo", dtype=torch.bfloat16, device=cpu)  # imports, once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, billions in (("gpt-412b", 413.2), ("qwen3-30b-a3b", 30.53)):
    parts = load(name, dtype=torch.bfloat16, device=cpu)
    parts.stored.check_source()
    assert abs(parts.spec.num_params / 1e9 - billions) < 0.1, parts.spec.num_params
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_the_largest_models_take_less_than_a_hundred_mib() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=patience(100))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 100


@pytest.mark.parametrize("name, billions", [
    ("demo", 0.0128), ("gpt-6b", 5.85), ("llama-160m", 0.162), ("llama-1b", 1.10), ("llama-3b", 3.015),
    ("llama-8b", 8.03), ("qwen3-0.6b", 0.596)])
def test_presets_have_the_sizes_they_are_named_for(name: str, billions: float) -> None:
    spec = load(name, dtype=torch.bfloat16, device=CPU).spec
    assert spec.num_params / 1e9 == pytest.approx(billions, rel=0.005)
    assert spec.num_trainable_params == spec.num_params and spec.name == name
    assert spec.vocab_size and spec.hidden_size and spec.max_seq_len


def test_every_preset_is_a_configuration_transformers_accepts() -> None:
    from ratel.models.presets import preset_config

    for name in PRESETS:
        config = preset_config(name)
        assert config.hidden_size % config.num_attention_heads == 0 or config.head_dim, name


def test_placeholders_hold_one_element_each_until_attached_and_after() -> None:
    parts = load(make_model("qwen3-moe"), dtype=torch.bfloat16, device=CPU)

    def held() -> int:
        return sum(p.untyped_storage().nbytes() for p in parts.module.parameters())

    empty = held()
    assert empty == 2 * len(list(parts.module.parameters()))
    weights, grads = attach_all(parts)
    for param in parts.module.parameters():
        home = next(w for w in weights if w.untyped_storage().data_ptr() == param.untyped_storage().data_ptr())
        assert param.is_contiguous() and param.data_ptr() % 256 == home.data_ptr() % 256
    vertical_pass(parts, make_batch())
    assert all(g.any() for g in grads if g.numel())
    for unit in parts.spec.units:
        parts.parameters.attach(unit.index, None)
        parts.parameters.take_grads(unit.index)
    assert held() == empty and not any(p.grad is not None for p in parts.module.parameters())


def test_a_unit_may_lie_anywhere_in_a_larger_buffer() -> None:
    parts = load(make_model("llama"), dtype=torch.float32, device=CPU)
    unit = parts.spec.units[1]
    slot = torch.zeros(3 * unit.num_elements)
    middle = slot[unit.num_elements:2 * unit.num_elements]
    parts.stored.read_unit(1, middle)
    parts.parameters.attach(1, middle)
    alone = torch.empty(unit.num_elements)
    parts.stored.read_unit(1, alone)
    for p in unit.params:
        assert torch.equal(parts.module.get_parameter(p.name), alone[p.offset:p.end].view(p.shape))
    parts.module.get_parameter(unit.params[0].name).data.add_(1)
    assert torch.equal(middle[:unit.params[0].num_elements], alone[:unit.params[0].num_elements] + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_are_those_of_an_ordinary_construction(family: str, dtype: torch.dtype) -> None:
    import transformers

    ordinary = transformers.AutoModelForCausalLM.from_config(configs()[family](), dtype=dtype)
    from_config = load(configs()[family](), dtype=dtype, device=CPU).module
    from_module = load(make_model(family), dtype=dtype, device=CPU).module
    expected = dict(ordinary.named_buffers())
    for module in (from_config, from_module):
        found = dict(module.named_buffers())
        assert set(found) == set(expected)
        for name, buffer in expected.items():
            assert found[name].dtype is buffer.dtype, name
    for name, buffer in expected.items():
        assert torch.equal(dict(from_config.named_buffers())[name], buffer), name


def test_ties_survive_construction_without_memory() -> None:
    import transformers

    with parameters_on_meta():
        model = transformers.AutoModelForCausalLM.from_config(configs()["qwen3"]())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_meta
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_model_of_many_blocks_is_taken_apart_with_a_small_stack() -> None:
    """Freed as a whole, the graph of its outline goes down the stack block by block: 8 MiB were too
    few for 1000."""
    code = """if True:
        import torch
        from transformers import LlamaConfig
        from ratel import models
        config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=200, num_attention_heads=2,
                             num_key_value_heads=1, vocab_size=64, tie_word_embeddings=False)
        print(models.load(config, dtype=torch.float32, device=torch.device("cpu")).num_blocks)
    """

    def small_stack() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=small_stack, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
