"""The options of a run; those of the run that it continues come from there."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ratel.config import TrainConfig, flag_of, read_file, resolve
from ratel.errors import RatelError
from ratel.ownership.apart import contains
from ratel.reading import read_json
from ratel.schema import anything, check, mapping, text

_OF_ONE_START = ("resume", "overwrite", "trace")
"""What is asked for once: it is not an option of the run that is continued."""
_UNREMARKABLE = (*_OF_ONE_START, "out", "quiet", "log_every", "optimizer_state")


def complete(given: Mapping[str, Any], file: str | os.PathLike[str] | None) -> TrainConfig:
    """The same as `ratel.config.resolve`; with ``resume``, what is not given is what it was in the
    run to be continued."""
    if file is not None and not isinstance(file, (str, os.PathLike)):
        raise RatelError("is not the path of a TOML file", field="config", value=type(file).__name__,
                         remedy="Give options themselves as keyword arguments: ratel.train(model, data, lr=1e-5, ...)")
    in_file = read_file(Path(file)) if file is not None else {}
    named = {**in_file, **given}
    if file is not None and named.get("out") is not None:
        _check_file(Path(file), Path(named["out"]))
    if named.get("resume") is not True or named.get("out") is None:
        return resolve(given, file)
    earlier = _earlier(Path(named["out"]), named)
    _check_start(named, earlier)
    options = {**_without(earlier, _OF_ONE_START), **_without(in_file, ("overwrite",)), **given, "resume": True}
    return resolve(options)


def _check_file(file: Path, out: Path) -> None:
    """It is read before all else, and would be replaced with what the run replaces."""
    if os.path.isdir(out) and contains(out, file):
        from ratel.training.claims import check_input

        check_input(out, "--config", file)


def _earlier(out: Path, named: Mapping[str, Any]) -> dict[str, Any]:
    """None where config.json is lost, and the model is given again: the states are worth more."""
    if named.get("model") is not None and (out / "state").is_dir() and not os.path.lexists(out / "config.json"):
        return {}
    return read_earlier(out)


def _check_start(named: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """What the run was started with may be elsewhere by now; and what only a start can take."""
    for name in ("model", "data", "eval_data", "tokenizer"):
        path = None if named.get(name) is not None else earlier.get(name)
        if path is None or os.path.exists(path) or all(map(os.path.exists, path.split(","))) or _is_preset(name, path):
            continue
        back = "" if os.path.isabs(path) else ", or resume in the directory that the run was started in"
        if path.isidentifier():
            back += "; what was an object of Python is given again to ratel.train(..., resume=True, out=...)"
        raise RatelError("is what the run was started with, and is not there", field=flag_of(name), value=path,
                         remedy=f"Say where it is now with {flag_of(name)}{back}")
    moments = named.get("optimizer_state")
    if moments is not None and os.fspath(moments) != earlier.get("optimizer_state"):
        raise RatelError("contradicts --resume: the state that is continued has moments of its own", field="--optimizer-state",
                         value=moments, remedy="Leave it out")


def _is_preset(name: str, path: str) -> bool:
    if name != "model":
        return False
    from ratel.models.presets import PRESETS  # and PyTorch with it, which a start comes without so far

    return path in PRESETS


def read_earlier(out: Path) -> dict[str, Any]:
    """The options in OUT/config.json. Raises RatelError naming what is missing."""
    path = out / "config.json"
    try:
        options = check(read_json(path), mapping(text(), anything))
        resolve(options)
        return options
    except FileNotFoundError as error:
        missing = f"there is no {path}" if out.is_dir() else f"{out} is not a directory"
        again = ", or --model and all other options as they were" if out.is_dir() else ""
        raise RatelError(missing, field="--resume", remedy="Give --out the directory of a run that was started with "
                                                           f"--save-every N{again}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RatelError(f"what the run was started with cannot be read: {reason}", field="--resume", value=path,
                         remedy="Put the file right, or remove it and give --model and all other options again with --resume") from error


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
