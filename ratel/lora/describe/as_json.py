"""A description of an adapter in files of Ratel's own: configurations of runs, and states."""

from dataclasses import fields
from typing import Any

from ratel.lora.describe.config import LoraConfig
from ratel.schema import anything, boolean, check, listing, mapping, number, record, text, whole

_SCHEMA = record({}, {"rank": whole(1), "alpha": number(0, above=True), "dropout": number(0, 1), "targets": anything, "exclude": anything,
                      "parameters": listing(text()), "init": text(), "rslora": boolean, "dora": boolean,
                      "rank_pattern": mapping(text(), whole(1)), "alpha_pattern": mapping(text(), number(0, above=True)),
                      "full": listing(text()), "layers": anything, "layers_pattern": listing(text()), "tied": boolean})


def to_json(config: LoraConfig) -> dict[str, Any]:
    """All that was chosen; `of_json` gives an equal description back."""
    return {spec.name: _plain(getattr(config, spec.name)) for spec in fields(config) if spec.compare}


def of_json(values: Any) -> LoraConfig:
    """Raises SchemaError for what `to_json` has not written, and RatelError for values that cannot
    be."""
    return LoraConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in check(values, _SCHEMA).items()})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else dict(value)
