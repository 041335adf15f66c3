"""What was found out about this machine, kept in the user's cache directory: one file for each
thing that it depends on."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ratel.reading import read_json
from ratel.schema import SchemaError, anything, check, mapping, record, text

Key = dict[str, Any]
"""Everything a result depends on, as JSON has it."""

T = TypeVar("T")
_FILE = record({"key": mapping(text(), anything), "digest": text(), "result": mapping(text(), anything)})
log = logging.getLogger(__name__)


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ratel" / "hardware"


def cache_file(key: Key) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_directory() / f"{digest[:24]}.json"


def load(key: Key, read: Callable[[dict[str, Any]], T]) -> T | None:
    """What was stored under this key, as ``read`` makes it of JSON; None if there is nothing, or
    nothing that can be used."""
    try:
        content = check(read_json(cache_file(key)), _FILE)
        if content["key"] != json.loads(json.dumps(key)):
            return None
        if content["digest"] != _digest(content["result"]):
            raise SchemaError("it was damaged or changed")
        return read(content["result"])
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is in it: it is made again, and nothing else
        log.warning("%s cannot be used (%s) and is made again", cache_file(key), error)
        return None


def store(key: Key, result: dict[str, Any]) -> None:
    """Replaces the file at once: a reader never sees half of it. A cache that cannot be written is
    only said."""
    path = cache_file(key)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"key": key, "digest": _digest(result), "result": result}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        log.warning("what was found out cannot be kept for the next run: %s", error)


def _digest(result: Any) -> str:
    """The digest of a result as JSON has it: tuples are lists in it."""
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()[:16]
