"""Small models of several families, and what peft does with them."""

import warnings
from typing import Any

import torch
from torch import nn

COMMON = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FEW_EXPERTS = dict(num_experts_per_tok=2)
"""Three experts, a rank of 4, gate and up of other sizes than down: no two sizes can be taken for
each other."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON), "qwen3": ("Qwen3Config", COMMON | {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", COMMON | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, attn_pdrop=0.0, resid_pdrop=0.0,
                                embd_pdrop=0.0)),
    "mixtral": ("MixtralConfig", COMMON | FEW_EXPERTS | {"num_local_experts": 3}),
    "gpt_oss": ("GptOssConfig", COMMON | FEW_EXPERTS | {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeConfig", COMMON | FEW_EXPERTS | {"num_experts": 3, "moe_intermediate_size": 20, "mlp_only_layers": [1]}),
    "qwen2_moe": ("Qwen2MoeConfig", COMMON | FEW_EXPERTS | {"num_experts": 3, "moe_intermediate_size": 20,
                                                            "shared_expert_intermediate_size": 24})}
EXPERTS = ("mixtral", "gpt_oss", "qwen3_moe", "qwen2_moe")
TIED = ("qwen3", "gemma3", "gpt2")


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The model, in evaluation mode, with random weights of a size that shows differences."""
    import transformers

    config_class, settings = MODELS[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**settings), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def peft_model(model: nn.Module, config: Any) -> Any:
    """With peft's warnings turned off: what they are about is what is tested."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


def peft_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in peft_tensors(model).items()}


def peft_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What peft's save_pretrained writes, but copies of the base."""
    import peft

    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens()).logits


def trained(targets: Any, seed: int = 3) -> dict[str, torch.Tensor]:
    """Tensors for a file as training could leave them, without those of tied layers; lengths stay
    positive."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for part in (*targets.layers, *targets.full) if part.tied_to is None for name, shape in part.file_shapes.items()}
    return {name: torch.rand(shape, generator=generator) + 0.5 if "magnitude" in name else torch.randn(shape, generator=generator) * 0.15
            for name, shape in shapes.items()}


def load_in_peft(model: nn.Module, directory: Any) -> Any:
    """Strictly: no tensor is missing or left over. Raises AssertionError."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model, str(directory), adapter_name="given").eval()
        found = adapted.load_adapter(str(directory), adapter_name="given")  # says what `from_pretrained` keeps to itself
    assert not found.unexpected_keys and not [key for key in found.missing_keys if "given" in key], found
    return adapted
