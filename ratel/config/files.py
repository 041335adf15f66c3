"""Options from TOML files and keyword arguments, by their names."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ratel.config.table import TrainConfig, option_of, options_of
from ratel.errors import RatelError
from ratel.other_names import meant_by
from ratel.reading import read_text


def resolve(values: Mapping[str, Any], file: str | os.PathLike[str] | None = None) -> TrainConfig:
    """Defaults, overridden by the TOML ``file``, overridden by ``values`` (flags or keyword
    arguments)."""
    merged = read_file(Path(file)) if file is not None else {}
    for name, value in values.items():
        merged[_known(name, "")] = value
    return TrainConfig(**merged)


def read_file(path: Path) -> dict[str, Any]:
    """The options in a TOML file; keys are spelled as the flags, with ``-`` or ``_``."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise RatelError(f"cannot be read: {error.strerror}", field="--config", value=path,
                         remedy="Check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RatelError(f"is not TOML: {reason}", field="--config", value=path,
                         remedy="Write one `option = value` on a line, with texts in quotes") from error
    options: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and key.replace("-", "_") not in _tables():
            raise RatelError(f"is a table in {path}", field=f"[{key}]", remedy="Write options without a table above them")
        name = _known(key, f" in {path}")
        if name in options:
            raise RatelError(f"stands twice in {path}, with - and with _", field=key, remedy="Leave one of them")
        options[name] = value
    return options


def _tables() -> set[str]:
    return {spec.name for spec in options_of(TrainConfig) if option_of(spec).is_table}


def _known(key: str, where: str) -> str:
    names = [spec.name for spec in fields(TrainConfig)]
    name = key.replace("-", "_")
    if name in names:
        return name
    meant = meant_by(name)
    close = [meant] if meant else difflib.get_close_matches(name, names, n=1)
    remedy = f"Did you mean {close[0]}?" if close else "See `ratel train --help` for the options"
    raise RatelError(f"is not an option{where}", field=key, remedy=remedy)
