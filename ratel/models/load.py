"""The way from what the user calls a model to its parts."""

import copy
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ratel.errors import RatelError
from ratel.models.checkpoints.beside import Origin
from ratel.models.checkpoints.directory import CheckpointSource
from ratel.models.checkpoints.dtypes import kept_in_fp32
from ratel.models.structure import blocks as finder
from ratel.models.structure.additions import Additions
from ratel.models.checkpoints.refusals import (refuse_adapted, refuse_fetched_kernels, refuse_file, refuse_other_heads,
                                               refuse_other_weights)
from ratel.models.calls.running import LossFn
from ratel.models.calls.tasks import Task
from ratel.models.checkpoints.config import causal_class, read_config, refuse_config
from ratel.models.checkpoints.weights import FreshSource, TensorSource, WeightSource, WithFreshHead
from ratel.models.parts import TRIAL_ERRORS, Parts
from ratel.models.presets import preset_config
from ratel.models.structure.skeleton import Originals, build, move_buffers, strip_parameters
from ratel.models.structure.unit_layout import longest_sequence

log = logging.getLogger(__name__)

ATTENTIONS = {"auto": None, "sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}


def load(source: Any, *, dtype: torch.dtype, device: torch.device, seed: int = 0, loss_fn: LossFn | None = None,
         attention: str = "auto", max_seq_len: int | None = None, needs_weights: bool = True, task: Task | None = None,
         frozen: Collection[str] = (), additions: Additions | None = None) -> Parts:
    """Take a model apart. Allocates no parameter and reads no weight. Raises RatelError for what
    cannot be trained.

    ``source``: a Hugging Face directory, a preset's name, a `PretrainedConfig`, a `PreTrainedModel`
    or any `nn.Module`. Whatever is not a causal language model needs ``loss_fn(module, batch) ->
    scalar`` or a ``task``. With a task, a directory may be of another class of the model: what
    follows the blocks is then initialised from the seed. ``dtype``: of the computation, bf16 or
    fp32. ``max_seq_len``: the longest sequence that will come. ``needs_weights`` False: for shapes
    alone; of a directory only config.json is read. ``frozen``: names of parameters of a directory
    or preset that are not trained. ``additions``: what is put into the model and trained beside, or
    instead of, its own parameters.
    """
    assert dtype in (torch.bfloat16, torch.float32)
    if attention not in ATTENTIONS:
        raise RatelError("unknown attention", field="attention", value=attention,
                         remedy=f"Use one of {', '.join(ATTENTIONS)}")
    if attention == "flash" and (dtype is not torch.bfloat16 or device.type != "cuda"):
        raise RatelError("flash attention computes in bf16 on a CUDA device", field="attention", value=attention,
                         remedy="Use --attention sdpa")
    if isinstance(source, nn.Module):
        source = getattr(source, "_orig_mod", source)  # what torch.compile wraps
        return _from_module(source, dtype, device, seed, loss_fn, attention, max_seq_len, task, additions)
    config, directory, name = _resolve(source)
    return _from_config(config, directory if needs_weights else None, name, dtype, device, seed, loss_fn, attention, max_seq_len,
                        task, frozen, additions)


def _resolve(source: Any) -> tuple[Any, Path | None, str]:
    """Configuration, directory with the weights if there is one, and name."""
    from transformers import PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return source, None, source.model_type
    if not isinstance(source, (str, Path)):
        raise RatelError("not a model", field="model", value=repr(source)[:100],
                         remedy="Give a directory, a preset's name, a transformers configuration or a module")
    directory = Path(source).expanduser()
    if directory.is_dir():
        return read_config(directory), directory, directory.resolve().name
    if directory.exists():
        raise refuse_file(directory)
    return preset_config(str(source)), None, str(source)


def _from_config(config: Any, directory: Path | None, name: str, dtype: torch.dtype, device: torch.device, seed: int,
                 loss_fn: LossFn | None, attention: str, max_seq_len: int | None, task: Task | None,
                 frozen: Collection[str], additions: Additions | None) -> Parts:
    given, config, architectures = config, copy.deepcopy(config), config.architectures
    refuse_config(config, name)
    if directory is not None:
        refuse_fetched_kernels(config, name)
    if loss_fn is None and task is None:
        refuse_other_heads(config, name)
    model_class = _class_of(config) if loss_fn is not None else causal_class(config, name) if task is None else None
    if task is not None:
        model_class = task.class_for(config, name)
        task.configure(config)
    origin = _origin_of(config, given, directory)
    try:
        module = build(config, dtype, ATTENTIONS[attention], model_class)
    except (ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, RatelError):
            raise
        raise RatelError(f"transformers cannot build it: {error}", field="model", value=name,
                         remedy="Check config.json, and that --attention suits the model and the machine") from error
    for parameter in map(module.get_parameter, frozen):
        parameter.requires_grad_(False)
    is_other = task is not None and type(module).__name__ not in (architectures or ())
    source = _open_checkpoint(directory, module, dtype, is_whole=not is_other) if directory is not None else None
    if source is not None and is_other:
        source = WithFreshHead(source, FreshSource(module, seed), name)
    try:
        kept = kept_in_fp32(module, dtype)
        buffer_dtypes = dict.fromkeys(kept & dict(module.named_buffers()).keys(), torch.float32)
        return _assemble(module, name, source, kept, buffer_dtypes, dtype, device, seed, loss_fn, max_seq_len, task, origin,
                         additions)
    except torch.OutOfMemoryError:
        raise
    except RatelError:
        raise
    except TRIAL_ERRORS as error:  # from its first run in outline
        raise RatelError(f"the model of this configuration cannot run: {error}", field="model", value=name,
                         remedy="Check the sizes in config.json against each other") from error


def _origin_of(config: Any, given: Any, directory: Path | None) -> Origin:
    """``config`` is what a task has made of the one that was given."""
    if directory is None:
        return Origin(config=copy.deepcopy(config))
    before = given.to_dict()
    return Origin.of_directory(directory, {key: value for key, value in config.to_dict().items() if before.get(key) != value})


def _open_checkpoint(directory: Path, module: nn.Module, dtype: torch.dtype, *, is_whole: bool) -> CheckpointSource:
    """``is_whole``: the model has a place for all that is in it, as far as is known."""
    refuse_other_weights(directory, module.config)
    source = CheckpointSource(directory, module, dtype, tells_of_unused=is_whole)
    source.untie()
    source.load_buffers()
    return source


def _class_of(config: Any) -> type | None:
    import transformers

    names = config.architectures or []
    return getattr(transformers, names[0], None) if names else None


def _from_module(module: nn.Module, dtype: torch.dtype, device: torch.device, seed: int, loss_fn: LossFn | None,
                 attention: str, max_seq_len: int | None, task: Task | None, additions: Additions | None) -> Parts:
    refuse_adapted(module)
    if task is not None:
        task.check_module(module)
        task.configure(module.config)
    origin = Origin.of_module(module)
    if loss_fn is None and task is None and not is_causal_lm(module):
        raise RatelError("it is not a causal language model of Hugging Face, so how to compute its loss is not known",
                         field="loss_fn", value=type(module).__name__,
                         remedy="Give loss_fn(model, batch), which returns the loss of a batch")
    if attention != "auto" and hasattr(module, "set_attn_implementation"):
        try:
            module.set_attn_implementation(ATTENTIONS[attention])
        except (ValueError, ImportError) as error:
            raise RatelError(f"transformers refuses it: {error}", field="attention", value=attention,
                             remedy="Use --attention auto") from error
    for layer in module.modules():
        if getattr(layer, "gradient_checkpointing", False) is True:
            layer.gradient_checkpointing = False  # blocks are recomputed already
    kept, buffer_dtypes = _precision(module, dtype)
    return _assemble(module, type(module).__name__, None, kept, buffer_dtypes, dtype, device, seed, loss_fn, max_seq_len,
                     task, origin, additions)


def _assemble(module: nn.Module, name: str, source: WeightSource | None, kept: set[str], buffer_dtypes: dict[str, torch.dtype],
              dtype: torch.dtype, device: torch.device, seed: int, loss_fn: LossFn | None,
              max_seq_len: int | None, task: Task | None, origin: Origin, additions: Additions | None) -> Parts:
    finder.refuse_unsupported(module)
    _refuse_long(module, max_seq_len)
    blocks = finder.find_blocks(module)  # refuses before the parameters are taken out
    originals = Originals(module)
    if source is None:
        source = TensorSource(originals.tensors) if originals.has_weights else FreshSource(module, seed)
    try:
        strip_parameters(module, dtype, device, kept)
        move_buffers(module, device, buffer_dtypes)
        if additions is not None:
            additions.put_on(module, blocks, device)
        return _take_apart(module, name, dtype, device, source, originals, loss_fn, task, origin, additions)
    except BaseException:
        if additions is not None:
            additions.take_off()
        originals.put_back()
        raise


def _take_apart(module: nn.Module, name: str, dtype: torch.dtype, device: torch.device, source: WeightSource,
                originals: Originals, loss_fn: LossFn | None, task: Task | None, origin: Origin,
                additions: Additions | None) -> Parts:
    parts = Parts(module, name=name, dtype=dtype, device=device, source=source, originals=originals, loss_fn=loss_fn, task=task,
                  origin=origin, additions=additions)
    if isinstance(source, WithFreshHead):
        source.complete([*(u for u in parts.spec.units if u.kind == "post"), *([parts.unused] if parts.unused else [])])
    return parts


def is_causal_lm(module: nn.Module) -> bool:
    """Whether logits for the next token come out of its forward."""
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if not isinstance(module, PreTrainedModel):
        return False
    classes = {name for known in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
               for names in known.values() for name in ((names,) if isinstance(names, str) else names)}
    return type(module).__name__ in classes or type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _precision(module: nn.Module, dtype: torch.dtype) -> tuple[set[str], dict[str, torch.dtype]]:
    """Which parameters compute in fp32 in any case, and what the floating buffers become. A plain
    module's follow ``module.to(dtype)``; a Hugging Face model's are what they would be had it been
    loaded in that dtype, which keeps rotary frequencies and routers of experts in fp32."""
    floating = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    if not hasattr(module, "_init_weights"):
        return set(), dict.fromkeys(floating, dtype)
    twin = build(copy.deepcopy(module.config), dtype, None, type(module))
    kept = kept_in_fp32(twin, dtype)
    return kept, {name: torch.float32 if name in kept else buffer.dtype for name, buffer in twin.named_buffers() if name in floating}


def _refuse_long(module: nn.Module, max_seq_len: int | None) -> None:
    limit = longest_sequence(module)
    if max_seq_len is not None and limit is not None and max_seq_len > limit:
        raise RatelError(f"the model handles sequences of at most {limit} tokens", field="--seq-len",
                         value=max_seq_len, remedy=f"Use --seq-len {limit} or less")
