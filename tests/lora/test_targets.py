"""Which layers are adapted: the same names, ranks, scales and shapes as peft gives the same
model."""

from typing import Any

import pytest
import torch
from torch import nn

from ratel.errors import RatelError
from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.mistakes import refuse_mistakes
from ratel.lora.describe.outline import outline_of
from ratel.lora.describe.peft_config import of_object
from ratel.lora.describe.targets import resolve
from ratel.models.structure.skeleton import strip_parameters
from tests.support.lora import EXPERTS, MODELS, TIED, logits, make, peft_model, peft_shapes

pytestmark = pytest.mark.numerics
peft = pytest.importorskip("peft", minversion="0.21")


def cases(name: str) -> list[dict[str, Any]]:
    """Arguments of peft.LoraConfig."""
    found: list[dict[str, Any]] = [dict(target_modules="all-linear"), dict(target_modules="ALL-LINEAR", use_rslora=True, lora_alpha=24)]
    if name == "gpt2":
        return found + [dict(target_modules=["c_attn", "wpe"], use_dora=True), dict(), dict(target_modules=["c_fc", "lm_head"]),
                        dict(target_modules=["c_attn", "lm_head"], ensure_weight_tying=True)]
    found += [
        dict(target_modules=["q_proj", "v_proj", "embed_tokens"], lora_alpha=16, use_rslora=True, modules_to_save=["norm"],
             rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={".*v_proj": 7, "v_proj": 9}),
        dict(target_modules=r".*self_attn\.(q|k)_proj", exclude_modules=r".*layers\.0.*", use_dora=True),
        dict(target_modules=["q_proj", "o_proj"], exclude_modules=["layers.0.self_attn.o_proj"]),
        dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[1], layers_pattern="layers", modules_to_save=["lm_head"]),
        dict(target_modules=["q_proj", "model.layers.0.self_attn.o_proj"], layers_to_transform=1),
        dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
        dict(target_modules=r".*(q_proj|embed_tokens)", ensure_weight_tying=True),
        dict(target_modules=r"lm_head", ensure_weight_tying=True),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
        dict(target_modules=["q_proj"], target_parameters=["v_proj.weight"])]
    if name in EXPERTS:
        found += [
            dict(target_modules=[], target_parameters=["mlp.experts.down_proj", "experts.gate_up_proj"],
                 rank_pattern={"experts.gate_up_proj": 5}, alpha_pattern={"down_proj": 3}),
            dict(target_parameters=["experts.gate_up_proj"]),
            dict(target_modules=r".*\.(q_proj|gate_proj|up_proj|w1|w3|w2|down_proj)")]
    if name == "mixtral":
        found += [dict(target_modules=["k_proj", "w1", "w2", "w3"]), dict(target_modules=["gate", "experts.w2"])]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_peft_adapts_the_same(name: str) -> None:
    for arguments in cases(name):
        given = peft.LoraConfig(**{"r": 4, **arguments})
        model = make(name)
        found = resolve(of_object(given), outline_of(model))  # first: peft changes what it is given
        theirs = peft_model(model, given)
        assert found.file_shapes == peft_shapes(theirs), arguments
        scales = {key: (module.r["default"], module.scaling["default"]) for key, module in theirs.base_model.model.named_modules()
                  if isinstance(module, peft.tuners.lora.LoraLayer)}
        assert {layer.file_name: (layer.rank, layer.scale) for layer in found.layers} == scales, arguments


@pytest.mark.parametrize("name", ("qwen3", "gpt2", "gpt_oss"))
def test_a_skeleton_is_enough(name: str) -> None:
    model = make(name)
    config = LoraConfig(rank=2, targets=("lm_head", "k_proj", "c_attn"), tied=name in TIED)
    before = resolve(config, outline_of(model))
    strip_parameters(model, torch.bfloat16, torch.device("cpu"))
    assert resolve(config, outline_of(model)) == before
    assert [layer.tied_to for layer in before.layers if layer.name == "lm_head"] == [before.outline.embedding if name in TIED else None]


def test_a_module_of_ones_own() -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 9)))
    given = peft.LoraConfig(r=3, target_modules="all-linear")
    found = resolve(of_object(given), outline_of(model))
    assert [layer.name for layer in found.layers] == ["1", "2.0"]
    assert found.file_shapes == peft_shapes(peft_model(model, given))


def test_tokens_are_not_dropped() -> None:
    """In peft an embedding's adapter has a dropout that its forward pass does not use."""
    found = resolve(LoraConfig(targets=("q_proj", "embed_tokens"), dropout=0.25), outline_of(make("llama")))
    assert {layer.name.rpartition(".")[2]: layer.dropout for layer in found.layers} == {"embed_tokens": 0.0, "q_proj": 0.25}
    model = peft_model(make("llama"), peft.LoraConfig(target_modules=["embed_tokens"], lora_dropout=0.9, init_lora_weights=False)).train()
    assert torch.equal(logits(model), logits(model))


def test_trained_parameters_are_counted_once() -> None:
    model = make("qwen3")
    found = resolve(LoraConfig(rank=4, targets=("lm_head",), tied=True), outline_of(model))
    assert found.num_parameters == 4 * 64 + 32 * 4 and len(found.layers) == 2
    given = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    found = resolve(of_object(given), outline_of(make("llama")))
    assert found.num_parameters == peft_model(make("llama"), given).get_nb_trainable_parameters()[0]


# --- mistakes ------------------------------------------------------------------------------------------------------

def refusal(name: str, **settings: Any) -> str:
    with pytest.raises(RatelError) as caught:
        refuse_mistakes(resolve(LoraConfig(**{"rank": 2, **settings}), outline_of(make(name))))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_that_fit_nothing() -> None:
    assert "--lora-targets: fits no layer" in refusal("llama", targets=("q_prj",)) and "q_proj" in refusal("llama", targets=("q_prj",))
    assert "Did you mean v_proj" in refusal("llama", targets=("q_proj", "vproj"))
    assert "(given: vproj)" in refusal("llama", targets=("q_proj", "vproj"))
    assert "layers.0.self_attn.q_proj" in refusal("llama", targets=("layers.0.self_attn.q_prj",))
    assert "--lora-targets: fits no layer" in refusal("llama", targets=r".*\.query")
    assert "the chosen layers" in refusal("llama", targets=("q_proj",), layers=7)
    assert "the chosen layers" in refusal("llama", targets=("q_proj",), layers=0, layers_pattern=("layers|m",)), "as in peft: no number is matched"
    assert "what is excluded" in refusal("llama", targets=("q_proj",), exclude=r".*")
    assert "what is trained as a whole" in refusal("llama", targets=("lm_head",), full=("lm_head",))
    assert "--lora-exclude: fits nothing" in refusal("llama", exclude=("o_pro",))
    assert "Did you mean experts.gate_up_proj" in refusal("gpt_oss", parameters=("experts.gate_up_pro",))
    assert "--lora-full: fits no module" in refusal("llama", full=("lm_haed",)) and "lm_head" in refusal("llama", full=("lm_haed",))
    assert "--lora-full: has no parameters" in refusal("llama", full=("rotary_emb",))
    assert "--lora-rank-pattern: fits no layer" in refusal("llama", rank_pattern={"q_prj": 3})
    assert "--lora-alpha-pattern: fits no layer" in refusal("llama", alpha_pattern={"lm_head": 3})


def test_layers_that_take_no_adapter() -> None:
    assert "is no Linear, Conv1D or Embedding" in refusal("llama", targets=("norm",))
    assert "adapters are for matrices" in refusal("llama", targets=(), parameters=("norm.weight",))
    assert "and so is a parameter of it" in refusal("llama", targets=("q_proj",), parameters=("q_proj.weight",))
    assert "are one parameter in the model (gate_up_proj)" in refusal("mixtral", targets=("q_proj", "w1"))


def test_experts_take_neither_dropout_nor_dora() -> None:
    assert "--lora-dropout: is not possible for parameters" in refusal("mixtral", dropout=0.1)
    assert "--dora: is not possible for parameters" in refusal("qwen3_moe", dora=True)
    assert "--lora-init: is not possible for parameters" in refusal("gpt_oss", parameters=("experts.down_proj",), init="pissa")


def test_a_rank_above_the_layer() -> None:
    message = refusal("llama", rank=17)
    assert "--lora: is above the size of model.layers.0.self_attn.k_proj, 32 by 16" in message and "at most 16" in message
    refuse_mistakes(resolve(LoraConfig(rank=16), outline_of(make("llama"))))
    refuse_mistakes(resolve(LoraConfig(rank=17, exclude=r".*\.[kv]_proj"), outline_of(make("llama"))))
    assert "--lora-rank-pattern: is above the size" in refusal("llama", rank_pattern={"k_proj": 20})
    assert "gate_up_proj" in refusal("gpt_oss", targets=("q_proj",), parameters=("experts.gate_up_proj",), rank_pattern={"gate_up_proj": 40})


def test_routers_take_the_rank_of_the_others() -> None:
    """peft's all-linear has them among its targets; they have as many outputs as there are experts,
    or one."""
    refuse_mistakes(resolve(LoraConfig(rank=8), outline_of(make("qwen2_moe"))))
    assert "mlp.gate" in refusal("mixtral", rank=8, targets=("q_proj", "gate"))
    assert "is above the size" in refusal("qwen2_moe", rank=60)


def test_quantised_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0]._parameters["weight"] = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RatelError, match="has quantised weights"):
        outline_of(model)


class OtherNames(nn.Module):
    """An embedding and a head that are one parameter, under names that peft does not tie by."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.middle, self.back = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.back.weight = self.words.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.words


def test_ties_that_cannot_be_kept() -> None:
    assert "--dora: gives an embedding and a head that are one parameter lengths of their own" in refusal(
        "qwen3", targets=("q_proj", "lm_head"), tied=True, dora=True)
    resolve(LoraConfig(targets=("q_proj", "lm_head"), dora=True), outline_of(make("qwen3")))
    resolve(LoraConfig(targets=("q_proj",), dora=True, tied=True), outline_of(make("qwen3")))
    outline = outline_of(OtherNames())
    assert outline.tied == ("back",)
    for settings in (dict(targets=("back",)), dict(targets=("middle",), full=("words",))):
        resolve(LoraConfig(rank=2, **settings), outline)
        with pytest.raises(RatelError, match="--lora-tied: is possible in peft for modules called embed_tokens or lm_head, and here they are "
                                             "back and words"):
            resolve(LoraConfig(rank=2, tied=True, **settings), outline)
