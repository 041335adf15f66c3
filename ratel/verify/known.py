"""Families that were checked before, kept in the user's cache directory: by class, small
configuration, versions and Ratel's sources."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ratel import probe_cache
from ratel.config import NEXT_TOKEN
from ratel.errors import RatelError
from ratel.models.calls.tasks import Task
from ratel.models.checkpoints.config import read_config
from ratel.models.checks.shrink import shrunken
from ratel.models.load import load
from ratel.models.presets import preset_config
from ratel.startup import arena_ahead
from ratel.trace import phases
from ratel.verify.family import check_class
from ratel.verify.findings import Verdict, one_line

CHECKED_SOURCES = ("models", "runtime", "verify")
"""Folders of this package on which a verdict depends."""


def check_model(source: str, task: str | None = None) -> Verdict:
    """Everything about a small copy of the model in a directory, or of a preset. Raises RatelError
    for one that is refused.

    Without ``task`` it is what the directory's class is for.
    """
    config = read_config(Path(source)) if Path(source).is_dir() else preset_config(source)
    task = task or _task_of(config)
    parts = load(source, dtype=torch.float32, device=torch.device("cpu"), task=Task.of(task), needs_weights=False)
    model_class = type(parts.module)
    parts.close()
    return check_class(model_class, shrunken(config), task)


def _task_of(config: Any) -> str:
    from ratel.verify.net import entries

    names = set(config.architectures or ())
    tasks = [entry.task for entry in entries() if entry.name in names]
    return NEXT_TOKEN if NEXT_TOKEN in tasks or not tasks else tasks[0]


def quick_verdict(module: nn.Module, task: str, note: Any) -> Verdict | None:
    """What is known of a module's family, or found out now, in seconds, by the most telling checks;
    None if it is no family of the installed transformers. ``note(line)`` is told where it takes
    time."""
    model_class = type(module)
    if not model_class.__module__.startswith("transformers.models."):
        return None
    try:
        config = shrunken(module.config)
    except Exception as error:  # a configuration of any kind: it may not suit the rules of its class when it is small
        return Verdict(name=model_class.__name__, task=task, refused=f"no small configuration: {one_line(error, 160)}")
    key = _key(model_class, config, task)
    verdict = probe_cache.load(key, Verdict.from_json)
    if verdict is None:
        note(f"{model_class.__name__} is new here: a small copy of it is checked once")
        try:
            with phases.as_one("check of the family"), arena_ahead.put_aside():
                verdict = check_class(model_class, config, task, is_quick=True)
        except (OSError, SafetensorError) as error:  # no room among the temporary files: not kept, since there may be some later
            return Verdict(name=model_class.__name__, task=task, refused=f"no small copy was written: {one_line(error, 160)}")
        # What kept it from being checked, as memory that was short just now, may not be there the
        # next time.
        if not verdict.refused:
            probe_cache.store(key, verdict.to_json())
    return verdict


def refuse_wrong(verdict: Verdict) -> None:
    """Raises RatelError if a result was found to be wrong. What the check could not do is no
    reason."""
    if verdict.wrong:
        found = "; ".join(finding.describe() for finding in verdict.wrong)
        raise RatelError(f"a check of this kind of model failed: {found}", field="model", value=verdict.name,
                         remedy="Report it (`ratel check --model` tells more); --unchecked trains it all the same")


def _key(model_class: type, config: Any, task: str) -> dict[str, Any]:
    import transformers

    settings = json.dumps({name: value for name, value in config.to_dict().items() if name != "_name_or_path"}, sort_keys=True,
                          default=str)
    return {"what": "family", "class": model_class.__name__, "task": task, "config": _digest(settings.encode()),
            "transformers": transformers.__version__, "torch": torch.__version__, "sources": _sources()}


def _sources() -> str:
    package = Path(__file__).resolve().parents[1]
    files = [path for folder in CHECKED_SOURCES for path in sorted((package / folder).rglob("*.py"))]
    return _digest(b"".join(path.read_bytes() for path in files))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]
