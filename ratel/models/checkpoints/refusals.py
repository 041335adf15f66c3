"""Directories and models that cannot be trained on the next token, told apart by what lies in them:
one line, with the remedy."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from ratel.errors import RatelError
from ratel.reading import read_json

CONVERT = "Convert it with transformers: AutoModelForCausalLM.from_pretrained(...), then save_pretrained"
_TASKS = {"ForSequenceClassification": "classify", "ForTokenClassification": "tokens", "ForMaskedLM": "masked-lm"}
_OTHER_HEADS = ("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction", "ForImageClassification",
                "ForSpeechSeq2Seq", "ForCTC", "ForAudioClassification", "ForObjectDetection", "ForPreTraining")


def refuse_directory(directory: Path) -> None:
    """What a directory without a model of transformers holds instead, and an adapter that
    `from_pretrained` would put on one."""
    adapter = directory / "adapter_config.json"
    if adapter.exists():
        raise RatelError(f"holds an adapter (PEFT){_base_of(adapter)}, not a model alone", field="model", value=directory,
                         remedy="Give its base, and this as --lora to go on with it; or merge it (ratel export --adapter DIR --model BASE "
                                "--out NEW), or remove adapter_config.json to train the model without it")
    if (directory / "config.json").exists():
        return
    for names, what, remedy in _FOREIGN:
        found = next((path.name for name in names for path in sorted(directory.glob(name))), None)
        if found is not None:
            raise RatelError(f"there is no config.json in the directory: it holds {what} ({found})", field="model",
                             value=directory, remedy=remedy)


_FOREIGN = (
    (("*.gguf",), "GGUF weights, which are quantized for inference", "Give the model's safetensors directory, or convert it with "
     "from_pretrained(DIR, gguf_file=NAME) and save_pretrained"),
    (("consolidated*.safetensors", "consolidated*.pth", "params.json"), "a model in its author's own format (Mistral's or Meta's)",
     "Give the directory in the format of transformers, with config.json and model*.safetensors"),
    (("model_index.json",), "a diffusion pipeline", "Give a language model"),
    (("modules.json",), "a sentence-transformers model", "Give the directory of its transformer, and --task or a loss_fn"),
    (("*.onnx", "onnx/*.onnx"), "ONNX weights, which are for inference", "Give the model's safetensors directory"),
    (("tf_model*.h5", "flax_model*.msgpack"), "weights of TensorFlow or Flax", "Give the model's safetensors directory"),
    (("pytorch_model*.bin",), "pickled weights, which can run code when loaded", CONVERT),
)


def refuse_other_weights(directory: Path, config: Any) -> None:
    """Weights that `from_pretrained` takes in the place of, or beside, those in
    model*.safetensors."""
    named = getattr(config, "transformers_weights", None)
    shard = next((path.name for path in sorted(directory.glob("shard-*-model-*.safetensors"))), None)
    beside = next((name for name in getattr(type(config), "extra_files", None) or () if (directory / name).exists()), None)
    for found, why in ((named, "config.json names another file of weights"), (shard, "holds a distributed checkpoint"),
                       (beside, "holds weights in a file of its own")):
        if found is not None:
            raise RatelError(f"{why} ({found})", field="model", value=directory, remedy=CONVERT)


def no_weights(directory: Path) -> RatelError:
    """The refusal of a directory with a config.json and no weights."""
    for names, what, remedy in (*_FOREIGN, (("*.bin", "*.pt", "*.pth"), "pickled weights, which can run code when loaded", CONVERT)):
        found = next((path.name for name in names for path in sorted(directory.glob(name))), None)
        if found is not None and names[0] not in ("modules.json", "model_index.json"):
            return RatelError(f"there is no model.safetensors in the directory: it holds {what} ({found})", field="model",
                              value=directory, remedy=remedy)
    variant = next((path.name for path in sorted(directory.glob("model.*.safetensors*"))
                    if path.name != "model.safetensors.index.json"), None)
    if variant is not None:
        return RatelError(f"there is no model.safetensors in the directory, only the variant {variant}", field="model",
                          value=directory, remedy="Rename its files to model*.safetensors, and its index accordingly")
    return RatelError("there is no model.safetensors and no model.safetensors.index.json in the directory", field="model",
                      value=directory, remedy="Give a directory with safetensors weights, or a preset to start from scratch")


def refuse_file(path: Path) -> RatelError:
    if path.suffix == ".gguf":
        return RatelError("GGUF weights are quantized for inference and cannot be trained", field="model", value=path,
                          remedy=_FOREIGN[0][2])
    return RatelError("is a file", field="model", value=path, remedy="Give the directory it is in")


def refuse_quantized(config: Any, name: str) -> None:
    """Refuse a quantized model, by its configuration or that of a part of it."""
    for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", None) or ())):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
            method = getattr(method, "value", method)
            raise RatelError(f"quantized weights{f' ({method})' if method else ''} cannot be trained", field="model", value=name,
                             remedy="Use the unquantized checkpoint that they were made from")


def refuse_fetched_kernels(config: Any, name: str) -> None:
    """A config.json must not choose code that is fetched from a hub and run."""
    for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", None) or ())):
        for key in ("_attn_implementation", "_experts_implementation"):
            for chosen in _values(getattr(part, f"{key}_internal", None) or getattr(part, key, None)):
                if "/" in chosen or ":" in chosen:
                    raise RatelError(f"its config.json chooses a kernel ({chosen}) that would be fetched and run", field="model",
                                     value=name, remedy=f"Remove {key.lstrip('_')} from config.json, and use --attention")


def _values(setting: Any) -> list[str]:
    if isinstance(setting, dict):
        return [value for inner in setting.values() for value in _values(inner)]
    return [setting] if isinstance(setting, str) else []


def refuse_other_heads(config: Any, name: str) -> None:
    """Refuse models that were not made to predict the next token, though transformers would build
    one that does from them."""
    for architecture in config.architectures or []:
        for ending, task in _TASKS.items():
            if architecture.endswith(ending):
                what = "a model for masked tokens" if task == "masked-lm" else "a classifier"
                raise RatelError(f"is {what} ({architecture}), which has no logits of the next token", field="model", value=name,
                                 remedy=f"Train it with --task {task}, or as an object with a loss_fn of your own")
        if architecture.endswith(_OTHER_HEADS):
            raise RatelError(f"is no causal language model ({architecture})", field="model", value=name,
                             remedy="Train it with a loss_fn of your own")


def refuse_shared_keys(config: Any, name: str) -> None:
    shared = getattr(config.get_text_config(), "num_kv_shared_layers", None) or 0
    if shared:
        raise RatelError(f"its last {shared} layers use keys and values of earlier layers, which pass between layers beside the "
                         "hidden states, and layers are run one at a time", field="model", value=name,
                         remedy="Use a model whose layers hand on hidden states alone")


def refuse_adapted(module: nn.Module) -> None:
    """A module that PEFT has put adapters into."""
    if any(cls.__name__ == "PeftModel" for cls in type(module).__mro__) or getattr(module, "_hf_peft_config_loaded", False) or any(
            cls.__name__ == "BaseTunerLayer" for layer in module.modules() for cls in type(layer).__mro__):
        raise RatelError("has adapters of PEFT in it, and Ratel puts on its own", field="model",
                         value=type(module).__name__, remedy="Give model.merge_and_unload(), which has them in its weights, or the "
                                                             "model without them, and lora= the directory of the adapter")


def _base_of(adapter: Path) -> str:
    with suppress(OSError, ValueError):
        settings = read_json(adapter)
        if isinstance(settings, dict) and isinstance(settings.get("base_model_name_or_path"), str):
            return f" for {json.dumps(settings['base_model_name_or_path'][:60])}"
    return ""
