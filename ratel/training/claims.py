"""Whose the files in OUT are, by what they hold; and what a run reads, held against what it
replaces."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ratel.config import TrainConfig
from ratel.errors import RatelError
from ratel.ownership import exports
from ratel.ownership.apart import contains
from ratel.ownership.regular import begins_with, is_plain, opened
from ratel.runtime.states.export import export_target
from ratel.training.states import StateDirectory

JSON_FILES: dict[str, set[str]] = {
    "documents.json": {"lists"}, "skipped.json": {"skipped", "lines"}, "startup.json": {"phases"}, "plan.json": {"model", "parameters", "units"}, "hardware.json": {"host", "cuda"},
    "config.json": {"model", "data", "steps", "batch_size", "seq_len"}}
"""What is in each JSON file that a run has written, by name; config.json is the last to go: it says
that the others are a run's."""
METRICS = "metrics.jsonl"
REPLACED = ("model", "model.partial", "model.replaced", "adapter", "adapter.partial", "adapter.replaced", "state")
"""Directories in OUT that a run fills, empties or renames."""
EXPORTED = ("model", "adapter")
"""What a run may end with."""

_MARK = "ratel"
_JSON_BYTES = 256 << 20
_ELSEWHERE = "Move it away, or give another directory"


def is_runs(out: Path, name: str) -> bool:
    """Whether the file is one that a run has written."""
    if name == METRICS:
        return begins_with(out / name, b'{"step": ') or is_empty(out / name)
    content = _json_of(out / name)
    return isinstance(content, dict) and (content.get(_MARK) == name or JSON_FILES[name] <= content.keys())


def marked(name: str, content: dict[str, Any]) -> dict[str, Any]:
    """So that it is known to be a run's. Options are known by themselves, and read as such."""
    return content if name == "config.json" else {_MARK: name, **content}


def is_empty(path: Path) -> bool:
    found = _status(path)
    return found is not None and is_plain(found) and found.st_size == 0


def results(out: Path, states: StateDirectory) -> list[str]:
    """What of an earlier run is there."""
    found = [METRICS] if is_runs(out, METRICS) else []
    found += [name for name in EXPORTED if exports.own_files(out / name)]
    found += ["state"] if states.held() else []
    return [*(name for name in JSON_FILES if is_runs(out, name)), *found]


def check_out(out: Path, states: StateDirectory, *, ends_with: str | None, saves: bool, resumes: bool) -> None:
    """Refuse a directory in which the run would have to write over or remove what is somebody
    else's. ``ends_with``: a model or an adapter, by the name of its directory."""
    for name in (*JSON_FILES, METRICS):
        found = _status(out / name)
        continues = resumes and name == METRICS  # a power failure may have cut it short anywhere, which resuming repairs
        if found is not None and not (is_plain(found) if continues else is_runs(out, name)):
            raise _not_ours(out, name, found)
    for name in (*EXPORTED, "state"):
        if os.path.lexists(out / name) and not (out / name).is_dir():
            raise RatelError(f"holds {name}, which is not a directory", field="--out", value=out, remedy=_ELSEWHERE)
    if ends_with is not None:
        export_target(out / ends_with, "--out")
    wrong = states.in_the_way() if saves or resumes else None
    if wrong is not None:
        raise RatelError(f"holds state/{wrong}, which is not of a training state", field="--out", value=out, remedy=_ELSEWHERE)


def _not_ours(out: Path, name: str, found: os.stat_result) -> RatelError:
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        return RatelError(f"holds {name} as a hard link: what the run writes would be in its other name, too", field="--out", value=out,
                          remedy="Make a copy of the directory (cp -r), or give another one")
    what = "as a link" if stat.S_ISLNK(found.st_mode) else "which no run has written"
    return RatelError(f"holds {name}, {what}", field="--out", value=out, remedy=_ELSEWHERE)


def check_inputs(out: Path, config: TrainConfig) -> None:
    """Refuse what is read or worked on in a place that the run replaces, and results among what is
    read."""
    for flag, path in inputs_of(config):
        check_input(out, flag, path)
    for flag, path in inputs_of(config):
        if flag in ("--data", "--eval-data") and contains(path, out):
            raise RatelError(f"lies in {path}, of which every file is read for {flag}", field="--out", value=out,
                             remedy="Give a directory outside it")
    if config.trace is not None:
        check_input(out, "--trace", Path(config.trace))
        _check_trace(Path(config.trace), config)


def inputs_of(config: TrainConfig) -> Iterator[tuple[str, Path]]:
    named = [("--model", config.model), ("--tokenizer", config.tokenizer), ("--hardware", config.hardware),
             ("--lora", config.lora if isinstance(config.lora, str) else None),
             ("--optimizer-state", None if config.resume else config.optimizer_state)]
    named += [(flag, part) for flag, text in (("--data", config.data), ("--eval-data", config.eval_data))
              for part in ([] if text is None else {text, *text.split(",")})]
    yield from ((flag, Path(name)) for flag, name in named if name and os.path.exists(name))
    yield from (("--ssd", Path(name)) for name in config.ssd)


def check_input(out: Path, flag: str, path: Path) -> None:
    for name in REPLACED:
        if contains(out / name, path):
            raise RatelError(f"lies in {out / name}, which the run replaces", field=flag, value=path,
                             remedy="Give another --out, or move it out of there")
    for name in (*JSON_FILES, METRICS):
        if _is_same(path, out / name):
            raise RatelError(f"is {out / name}, which the run replaces", field=flag, value=path, remedy="Give another --out")


def _is_same(one: Path, other: Path) -> bool:
    """Neither need be there yet."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _check_trace(trace: Path, config: TrainConfig) -> None:
    found = _status(trace)
    if found is None:
        return
    for flag, path in inputs_of(config):
        if os.path.exists(path) and os.path.samefile(trace, path):
            raise RatelError(f"is what {flag} names", field="--trace", value=trace, remedy="Give a new file")
    if not (is_plain(found) and (found.st_size == 0 or begins_with(trace, b'{"displayTimeUnit"'))):
        raise RatelError("is a file that is not a trace", field="--trace", value=trace, remedy="Give a new file")


def _json_of(path: Path) -> Any:
    try:
        with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            return json.loads(file.read(_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None
