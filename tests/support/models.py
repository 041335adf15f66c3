"""Tiny models of each family, and a vertical training pass written out by hand. No tests here."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from ratel.models import Parts
from ratel.planner.shape import UnitSpec

CPU = torch.device("cpu")
VOCAB = 97

LLAMA = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)


def configs() -> dict[str, Callable[[], Any]]:
    import transformers as t

    return {
        "llama": lambda: t.LlamaConfig(**LLAMA),
        "llama-tied-bias": lambda: t.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        "qwen3": lambda: t.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True),
        "gpt2": lambda: t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64,
                                     resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=1, eos_token_id=2),
        "gemma2": lambda: t.Gemma2Config(**LLAMA, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
        "gemma3": lambda: t.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=4, query_pre_attn_scalar=8,
                                             layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        "mixtral": lambda: t.MixtralConfig(**LLAMA, num_local_experts=4),
        "qwen3-moe": lambda: t.Qwen3MoeConfig(**LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2,
                                              moe_intermediate_size=24),
        "opt": lambda: t.OPTConfig(vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
                                   num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64),
        "mamba": lambda: t.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, state_size=4),
        "bloom": lambda: t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4),
    }


FAMILIES = ["llama", "llama-tied-bias", "qwen3", "gpt2", "gemma2", "gemma3", "mixtral", "qwen3-moe"]


def make_model(family: str, seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configs()[family]())
    with torch.no_grad():
        for param in model.parameters():
            # Norms start at exactly one (or zero) and biases at zero: give every weight a value of
            # its own.
            param.add_(torch.randn_like(param) * 0.02)
    return model


def make_batch(rows: int = 2, length: int = 8, documents: int = 1, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    positions = torch.arange(length) % (length // documents)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions.expand(rows, length)}


def attach_all(parts: Parts) -> tuple[list[Tensor], list[Tensor]]:
    """Read every unit and attach it, with gradients. Returns the flat weights and gradients."""
    weights, grads = [], []
    for unit in parts.spec.units:
        flat = torch.empty(unit.num_elements)
        parts.stored.read_unit(unit.index, flat)
        weights.append(flat.to(parts.dtype))
        grads.append(torch.zeros(unit.num_trainable, dtype=parts.dtype))
        parts.parameters.attach(unit.index, weights[-1])
        attach_grad(parts, unit, grads[-1])
    return weights, grads


def attach_grad(parts: Parts, unit: UnitSpec, flat: Tensor) -> None:
    """Let autograd accumulate into ``flat``, in the unit's layout."""
    by_name = dict(parts.module.named_parameters())
    for p in unit.params:
        if p.trainable:
            by_name[p.name].grad = flat[p.offset:p.end].view(p.shape)


def named(parts: Parts, flats: list[Tensor], trained_only: bool = False) -> dict[str, Tensor]:
    """The parameters inside flat planes, by name."""
    return {p.name: flat[p.offset:p.end].view(p.shape) for unit, flat in zip(parts.spec.units, flats)
            for p in unit.params if p.trainable or not trained_only}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def vertical_pass(parts: Parts, batch: Any) -> Tensor:
    """Forward without graphs, then backward block by block with recomputation. Gradients land in
    ``.grad``."""
    rng: list[Tensor] = []

    def keep(run: Callable[[], Any]) -> Any:
        rng.append(torch.get_rng_state())
        return run()

    with torch.no_grad():
        hidden, inputs = keep(lambda: parts.head(batch))
        checkpoints = []
        for i in range(parts.num_blocks):
            checkpoints.append(hidden)
            hidden = keep(lambda: parts.block(i, hidden, inputs))
    leaf = hidden.detach().requires_grad_()
    if parts.is_causal_lm:
        loss = next_token_loss(parts.tail_logits(leaf), batch["labels"])
    else:
        loss = parts.tail_loss(leaf, batch)
    loss.backward()
    after, grad = torch.get_rng_state(), leaf.grad
    inputs = inputs.with_leaves()
    for i in reversed(range(parts.num_blocks)):
        torch.set_rng_state(rng[i + 1])
        leaf = checkpoints[i].detach().requires_grad_()
        parts.block(i, leaf, inputs).backward(grad)
        grad = leaf.grad
    torch.set_rng_state(rng[0])
    outputs = parts.pre(batch)
    pairs = [(o, g) for o, g in zip(outputs, [grad, *(t.grad for t in inputs.differentiable)]) if o.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs))
    torch.set_rng_state(after)
    return loss.detach()


def plain_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The ordinary model in that dtype, floating buffers untouched, as Hugging Face loads it."""
    model = copy.deepcopy(model).train()
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model
