"""The options of a run; those of the run that it continues come from there."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ratel.config import TrainConfig, flag_of, read_file, resolve
from ratel.errors import RatelError
from ratel.reading import read_json
from ratel.schema import anything, check, mapping, text

_OF_ONE_START = ("resume", "overwrite", "trace")
"""What is asked for once: it is not an option of the run that is continued."""
_UNREMARKABLE = (*_OF_ONE_START, "out", "quiet", "log_every", "optimizer_state")


def complete(given: Mapping[str, Any], file: str | os.PathLike[str] | None) -> TrainConfig:
    """The same as `ratel.config.resolve`; with ``resume``, what is not given is what it was in the
    run to be continued."""
    in_file = read_file(Path(file)) if file is not None else {}
    named = {**in_file, **given}
    if named.get("resume") is not True or named.get("out") is None:
        return resolve(given, file)
    earlier = read_earlier(Path(named["out"]))
    options = {**_without(earlier, _OF_ONE_START), **_without(in_file, ("overwrite",)), **given, "resume": True}
    return resolve(options)


def read_earlier(out: Path) -> dict[str, Any]:
    """The options in OUT/config.json. Raises RatelError naming what is missing."""
    path = out / "config.json"
    try:
        options = check(read_json(path), mapping(text(), anything))
        resolve(options)
        return options
    except FileNotFoundError as error:
        missing = f"there is no {path}" if out.is_dir() else f"{out} is not a directory"
        raise RatelError(missing, field="--resume", remedy="Give --out the directory of a run that was started with "
                                                           "--save-every N") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RatelError(f"what the run was started with cannot be read: {reason}", field="--resume", value=path,
                         remedy="Put the file right, or remove it and start anew with --overwrite") from error


def read_run(out: Path) -> dict[str, Any]:
    """The options of the run in ``out``; none where there is no run."""
    return read_earlier(out) if (out / "config.json").is_file() else {}


def changes(config: TrainConfig, earlier: Mapping[str, Any]) -> Iterator[str]:
    """One line for each option that is not what it was."""
    for name, now in config.to_json().items():
        if name not in _UNREMARKABLE and earlier.get(name, now) != now:
            yield f"{flag_of(name)}: was {_shown(earlier[name])}, is {_shown(now)}"


def _shown(value: Any) -> str:
    return "not given" if value in (None, []) else ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _without(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}
