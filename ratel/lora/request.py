"""The adapter that the options of a run or a session ask for: a rank, a description, an object of
peft's, or the directory of an adapter to go on with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ratel.config import CommonOptions
from ratel.errors import RatelError
from ratel.lora.compute.choice import check as check_graph
from ratel.lora.describe.as_json import of_json, to_json
from ratel.lora.describe.config import LoraConfig, names_or_pattern
from ratel.lora.describe.peft_config import CONFIG_FILE, is_peft_config, of_directory, of_object
from ratel.schema import SchemaError, shown

OPTIONS: Mapping[str, str] = {
    "rank": "lora", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "lora_targets", "exclude": "lora_exclude",
    "parameters": "lora_parameters", "init": "lora_init", "rslora": "rslora", "dora": "dora", "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern", "full": "lora_full", "layers": "lora_layers", "layers_pattern": "lora_layers_pattern",
    "tied": "lora_tied"}
"""By the field of a description, the option."""


@dataclass(frozen=True, kw_only=True)
class AdapterRequest:
    """``directory``: where the adapter is that training goes on with; None for a new one, which
    `refuse_mistakes` is for. ``graph``: the order of an adapted layer's products."""

    config: LoraConfig
    directory: Path | None = None
    graph: str = "auto"
    is_new: bool = True
    """Whether nothing has been trained with this description yet: what it says by mistake is
    refused then."""
    field: str = field(default="lora", compare=False)
    """What the adapter was given by, for messages."""


def described(given: Any, name: str = "lora") -> Any:
    """The option's value for what Python programs may also give: a description, Ratel's or peft's,
    as JSON has it."""
    if isinstance(given, LoraConfig):
        return to_json(given)
    return to_json(of_object(given, name)) if is_peft_config(given) else given


def adapter_request(options: CommonOptions) -> AdapterRequest | None:
    """None where the model itself is trained. Raises RatelError for what describes no adapter, and
    for options that contradict it or say something of none."""
    words = {name: options.spelled(option) for name, option in OPTIONS.items()}
    chosen = _chosen(options)
    if options.lora is None:
        if chosen or options.lora_graph != "auto":
            name = words[next(iter(chosen))] if chosen else options.spelled("lora_graph")
            raise RatelError("says something of an adapter, and there is none", field=name, value=shown(next(iter(chosen.values()), options.lora_graph)),
                             remedy=f"Give {words['rank']} RANK as well, for example 16")
        return None
    check_graph(options.lora_graph)
    if isinstance(options.lora, int):
        config, directory = LoraConfig(rank=options.lora, words=words, **chosen), None
    else:
        found, directory = _described(options.lora, words)
        config = _agreed(found, chosen, words)
    return AdapterRequest(config=config, directory=directory, graph=options.lora_graph, field=words["rank"])


def _chosen(options: CommonOptions) -> dict[str, Any]:
    """What is said of the adapter beside what it is."""
    values = {name: getattr(options, option) for name, option in OPTIONS.items() if name != "rank"}
    chosen = {name: value for name, value in values.items() if value is not None and value is not False and value not in ((), {})}
    return {name: names_or_pattern(value) if name in ("targets", "exclude") and isinstance(value, str) else value
            for name, value in chosen.items()}


def _described(given: Any, words: Mapping[str, str]) -> tuple[LoraConfig, Path | None]:
    if isinstance(given, dict):
        try:
            return replace(of_json(given), words=words), None
        except SchemaError as error:
            raise RatelError(f"is no description of an adapter: {error}", field=words["rank"], value=shown(given),
                             remedy="Give a rank, a ratel.LoraConfig, a peft.LoraConfig, or the directory of an adapter") from error
    directory = Path(given).expanduser()
    if not directory.is_dir():
        raise RatelError("is neither a rank nor the directory of an adapter", field=words["rank"], value=shown(os.fspath(given)),
                         remedy=f"Give a rank such as 16, or a directory with an {CONFIG_FILE}")
    return of_directory(directory, words["rank"]), directory


def _agreed(config: LoraConfig, chosen: dict[str, Any], words: Mapping[str, str]) -> LoraConfig:
    """Dropout is of the training, and may be another one from here on; all else is what the adapter
    is."""
    for name, value in chosen.items():
        if name != "dropout" and getattr(config, name) != value:
            raise RatelError(f"contradicts {words['rank']}, whose adapter has {shown(getattr(config, name))} there", field=words[name],
                             value=shown(value), remedy="Leave one of them out")
    return replace(config, dropout=chosen["dropout"]) if "dropout" in chosen else config
