"""The check of every class that the installed transformers knows for text, each in a process of its
own."""

import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ratel.verify.findings import BROKE, Finding, Verdict, one_line
from ratel.verify.quiet import quiet

REGISTRIES = {"next-token": "CAUSAL_LM", "classify": "SEQUENCE_CLASSIFICATION", "tokens": "TOKEN_CLASSIFICATION",
              "masked-lm": "MASKED_LM"}
LIMIT_S = 180.0
"""Seconds that one class may take. It takes two to ten."""

DEFAULTS: dict[str, dict[str, Any]] = {
    # What a configuration class has no default for, or none that its own model can be built with.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8, "clip_qkv": 8.0}, "n_heads": 16},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "ministral": {"head_dim": 128, "layer_types": ["sliding_attention", "full_attention"] * 16},
}

CHANGES: dict[str, dict[str, Any]] = {
    # What sizes that were made small each on its own must be for the others' sake.
    "blt": {"global_config": {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32}},
    "dots3_note_text": {"head_dim": 24, "rope_parameters": {kind: {"partial_rotary_factor": 1 / 3}
                                                            for kind in ("indexed_attention", "sliding_attention")}},
    "canine": {"num_hash_buckets": 64},
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 24}},
    "perceiver": {"num_self_attends_per_block": 2, "num_latents": 16},
    "markuplm": {"max_depth": 3, "xpath_unit_hidden_size": 8},
    "phi4_multimodal": {"vision_config": {"num_hidden_layers": 2}, "audio_config": {"num_blocks": 1}},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lilt": {"hidden_size": 96},
}

SMALL: dict[str, dict[str, Any]] = {
    # Configurations that cannot be made small from what they write, because they write something
    # else than they read.
    "dory": dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, n_input_layers=1, n_recurrent_layers=2,
                 n_output_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=16, sliding_window=8,
                 max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "mobilebert": dict(vocab_size=128, hidden_size=64, embedding_size=16, intra_bottleneck_size=16, intermediate_size=64,
                       num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0),
}

FAULTS: dict[str, str] = {
    # What differs for a reason that lies in the model, and is found by the check at the start of a
    # run.
    "RwkvForCausalLM": "in evaluation its forward divides its own weights in place, which are with the session",
    "YoutuForCausalLM": "transformers clears the row of the padding token after it has loaded it (in _init_weights, past its own marks "
                        "of what is loaded); Ratel keeps what is stored",
}


@dataclass(frozen=True, kw_only=True, order=True)
class Entry:
    """A class in a registry, which is the task it is for."""

    name: str
    task: str


def entries() -> list[Entry]:
    """The classes of the installed transformers; a class that two registries have is in both."""
    from transformers.models.auto import modeling_auto

    found = set()
    for task, registry in REGISTRIES.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{registry}_MAPPING_NAMES").values():
            found.update(Entry(name=name, task=task) for name in ((names,) if isinstance(names, str) else names))
    return sorted(found)


def check_entry(entry: Entry) -> Verdict:
    """Check a class in this process. What cannot even be built is refused with transformers'
    reason."""
    import transformers

    from ratel.verify.family import check_class

    model_class = getattr(transformers, entry.name)
    try:
        with quiet():
            config = small_config(model_class, entry.task)
    except Exception as error:
        return Verdict(name=entry.name, task=entry.task, refused=f"no small configuration: {_reason(error)}")
    verdict = check_class(model_class, config, entry.task)
    if verdict.failed and entry.name in FAULTS:
        return replace(verdict, refused=f"{FAULTS[entry.name]} ({verdict.failed[0].detail})")
    return verdict


def small_config(model_class: Any, task: str) -> Any:
    """A small configuration, made of the class's defaults. A class that can be both is the decoder
    where it is to learn the next token."""
    from ratel.models.checks.shrink import shrunken

    config_class = model_class.config_class
    kind = config_class.model_type
    config = (config_class(**SMALL[kind]) if kind in SMALL else
              shrunken(config_class(**DEFAULTS.get(kind, {})), CHANGES.get(kind)))
    if task == "next-token" and getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    return config


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 160)}"


def check_entries(chosen: Iterable[Entry], *, processes: int, limit_s: float = LIMIT_S) -> Iterator[Verdict]:
    """The verdicts as they are done. A class that crashes or takes too long ends its own process
    only."""
    import torch
    import transformers.modeling_utils  # noqa: F401 - once, for all the processes that are forked from here

    context = multiprocessing.get_context("fork")
    waiting, running = list(chosen), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                entry = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                child = context.Process(target=_child, args=(entry, theirs), daemon=True)
                child.start()
                theirs.close()
                running[ours] = (entry, child, time.monotonic() + limit_s)
            yield from _collect(running)
    finally:
        torch.set_num_threads(threads)
        for _, child, _ in running.values():
            child.kill()


def _child(entry: Entry, pipe: Any) -> None:
    try:
        verdict: Any = check_entry(entry).to_json()
    except BaseException as error:
        verdict = f"{type(error).__name__}: {one_line(error)}"
    pipe.send(verdict)


def _collect(running: dict[Any, tuple[Entry, Any, float]]) -> Iterator[Verdict]:
    now = time.monotonic()
    first = min(deadline for _, _, deadline in running.values())
    ready = multiprocessing.connection.wait(list(running), timeout=max(0.0, first - now))
    late = [pipe for pipe, (_, _, deadline) in running.items() if time.monotonic() >= deadline and pipe not in ready]
    for pipe in [*ready, *late]:
        entry, child, _ = running.pop(pipe)
        if pipe in late:
            child.kill()
            yield _broken(entry, "took too long")
        else:
            yield _received(entry, pipe, child)
        child.join()
        pipe.close()


def _received(entry: Entry, pipe: Any, child: Any) -> Verdict:
    try:
        content = pipe.recv()
    except EOFError:
        child.join()
        return _broken(entry, f"the process ended with {child.exitcode}")
    return Verdict.from_json(content) if isinstance(content, dict) else _broken(entry, content)


def _broken(entry: Entry, what: str) -> Verdict:
    return Verdict(name=entry.name, task=entry.task, findings=(Finding(about="gradients", outcome=BROKE, detail=what),))
