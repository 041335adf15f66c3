"""What of a directory with a model is an export of Ratel, by content: all else in it is somebody
else's.

Weights say it in the metadata of their files, which also list the small files that were written
with them (config.json, tokenizer, ...) with checksums: one that was changed since is somebody
else's.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

from ratel.ownership.regular import opened

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
UNFINISHED = ".ratel-unfinished"
"""A file of that name is in a directory from its making on until it is complete: it is all of
Ratel's."""
REPLACED = ".ratel-replaced"
"""One of that name is in a directory that a newer one takes the place of: it waits under another
name to be removed."""

_KEY, _MOMENTS = "ratel", ("format", "ratel-adamw")
_PLAIN = {"config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.json", "vocab.json",
          "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt", "tokenizer.model",
          "processor_config.json", "preprocessor_config.json", "adapter_config.json"}
"""Names that a directory with a model has, beside weights."""
_HEADER_BYTES, _SMALL_FILE_BYTES = 100 << 20, 256 << 20


def metadata_for(directory: Path) -> dict[str, str]:
    """What weights that are written into the directory last say of it."""
    small = {name: _checksum(directory / name) for name in sorted(os.listdir(directory))
             if not _is_weights(name) and name not in (UNFINISHED, REPLACED)}
    listed = {name: found for name, found in small.items() if found is not None}
    return {"format": "pt", _KEY: json.dumps({"version": 1, "files": listed})}


def own_files(directory: Path) -> set[str]:
    """The names of what an export has written there, and nobody has changed since."""
    names = os.listdir(directory) if directory.is_dir() else []
    own, small = {REPLACED} & set(names), {}
    for name in names:
        metadata = _metadata(directory / name) if _is_weights(name) and name.endswith(SUFFIX) else None
        if metadata is not None and (_KEY in metadata or metadata.get(_MOMENTS[0]) == _MOMENTS[1]):
            own.add(name)
            small |= _listed(metadata.get(_KEY, ""))
    own |= {name for name in names if name in small and _checksum(directory / name) == small[name]}
    return own | {name for name in names if name.endswith(INDEX_SUFFIX) and _is_own_index(directory / name, own, names)}


def others_in_the_way(directory: Path) -> list[str]:
    """What an export would have to write over, and must not."""
    if not directory.is_dir():
        return []
    listed = {name for file in own_files(directory) if file.endswith(SUFFIX)
              for name in _listed((_metadata(directory / file) or {}).get(_KEY, ""))}
    return sorted(name for name in set(os.listdir(directory)) - own_files(directory)
                  if _is_weights(name) or name in _PLAIN or name in listed)


def holds_moments(path: Path) -> bool:
    """Whether it is a file of moments, or an index of such files only."""
    if path.name.endswith(INDEX_SUFFIX):
        names = os.listdir(path.parent)
        return _is_own_index(path, {name for name in names if name.endswith(SUFFIX) and holds_moments(path.parent / name)}, names)
    return (_metadata(path) or {}).get(_MOMENTS[0]) == _MOMENTS[1]


def begin(directory: Path) -> None:
    (directory / UNFINISHED).touch()


def is_unfinished(directory: Path) -> bool:
    return os.path.lexists(directory / UNFINISHED)


def complete(directory: Path) -> None:
    os.unlink(directory / UNFINISHED)


def give_up(directory: Path) -> None:
    if directory.is_dir():
        (directory / REPLACED).touch()


def settle(path: Path, replaced: Path) -> None:
    """Go on where a kill has ended a replacement: the older directory still waits, or has not got a
    successor yet."""
    if os.path.lexists(replaced / REPLACED) and os.path.lexists(path):
        remove_export(replaced)
    elif os.path.lexists(replaced / REPLACED):
        os.rename(replaced, path)


def remove_unfinished(directory: Path) -> None:
    """One in the making: whole, as long as it says that it is one."""
    if is_unfinished(directory):
        rmtree(directory)
    else:
        remove_export(directory)


def remove_export(directory: Path) -> None:
    """All that is Ratel's in it, and the directory if nothing else is left."""
    for name in own_files(directory):
        path = directory / name
        rmtree(path) if path.is_dir() else os.unlink(path)
    with suppress(OSError):  # something else is in it, or it is a link
        os.rmdir(directory)


def _is_weights(name: str) -> bool:
    """As transformers, peft and `ratel.optimizer_state` look for them: shards or an index that a
    new export does not have would be read with it."""
    return name.startswith(("model", "optimizer", "adapter_model")) and name.endswith((SUFFIX, INDEX_SUFFIX))


def _is_own_index(path: Path, own: set[str], names: list[str]) -> bool:
    """One that speaks of own files only, as far as they are there."""
    try:
        with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            shards = set(json.loads(file.read(_SMALL_FILE_BYTES))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return bool(shards & own) and shards & set(names) <= own


def _metadata(path: Path) -> dict[str, Any] | None:
    try:
        with opened(path) as descriptor:
            (size,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
            header = json.loads(os.pread(descriptor, size, 8)) if size <= _HEADER_BYTES else None
    except (OSError, ValueError, struct.error, RecursionError):
        return None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else None


def _listed(text: Any) -> dict[str, Any]:
    try:
        files = json.loads(text)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def _checksum(path: Path) -> list[int] | None:
    """Size and CRC-32, of a directory over all that is in it; None for what is neither that nor a
    regular file with one name."""
    if path.is_dir() and not path.is_symlink():
        inside = [(name, _checksum(path / name)) for name in sorted(os.listdir(path))]
        return None if any(found is None for _, found in inside) else [len(inside), zlib.crc32(json.dumps(inside).encode())]
    try:
        with opened(path) as descriptor:
            crc, size = 0, 0
            for part in _parts(descriptor):
                crc, size = zlib.crc32(part, crc), size + len(part)
    except OSError:
        return None
    return [size, crc]


def _parts(descriptor: int) -> Iterator[bytes]:
    with open(descriptor, "rb", closefd=False) as file:
        while part := file.read(1 << 20):
            yield part
