"""A training state as a directory: every plane of every unit, checksummed, and a manifest that is written last.

    STATE/manifest.json      what is here, with the checksum of every chunk (docs/state_format.md)
    STATE/unit-00007.bin     the planes of unit 7, one after the other, each at a multiple of 4096 bytes

The directory appears under its name only when complete. Tiers, budgets, buffers and devices leave no trace in it.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.plan.shape import ModelSpec, UnitSpec
from ratel.units import MIB, align_up

FORMAT, VERSION = "ratel-state", 1
CHUNK_BYTES = 4 * MIB
ALIGNMENT = 4096
PLANES = {"hi": torch.bfloat16, "lo": torch.int16, "m": torch.float32, "v": torch.float32}


class DamagedStateError(RatelError):
    """A state, or a file of it, is not what was written. ``message`` is the error's, without value and remedy."""

    def __init__(self, message: str, *, value: Path, remedy: str = "Resume from an older state") -> None:
        self.message = message
        super().__init__(message, field="state", value=value, remedy=remedy)


def save_state(path: Path, spec: ModelSpec, read_plane: Callable[[UnitSpec, str], Tensor | None],
               training: dict[str, Any]) -> Path:
    """Write the state; ``read_plane`` gives a plane on the CPU, or None where a unit has none. One unit in memory.

    ``training`` is kept as it is (JSON). An existing directory of that name is replaced once the new one is complete
    and on disk. Raises RatelError naming the path if the disk is full or fails; what was there before stays.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _make_directory(partial)
        with ThreadPoolExecutor(thread_name_prefix="ratel-checksum") as pool:
            units = [_write_unit(partial, unit, read_plane, pool) for unit in spec.units]
        manifest = {"format": FORMAT, "version": VERSION, "chunk_bytes": CHUNK_BYTES, "checksum": "crc32",
                    "model": describe_model(spec), "units": units, "training": training}
        _write_synced(partial / "manifest.json", _sealed(manifest))
        _sync_directory(partial)
        replace_directory(partial, path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RatelError(f"the state could not be written: {error.strerror or error}", field="state", value=path,
                         remedy="Free space or give another directory; an earlier state there is untouched") from error
    return path


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """The part of a model's shape that a state depends on."""
    return {"name": spec.name, "units": [json.loads(json.dumps(asdict(unit))) for unit in spec.units]}


def _write_unit(directory: Path, unit: UnitSpec, read_plane: Callable, pool: ThreadPoolExecutor) -> dict[str, Any]:
    name, planes, cursor = f"unit-{unit.index:05d}.bin", {}, 0
    with open(directory / name, "wb") as file:
        for plane in PLANES:
            values = read_plane(unit, plane)
            if values is None:
                continue
            data = memoryview(values.contiguous().view(torch.uint8).numpy())
            file.seek(cursor)
            file.write(data)
            planes[plane] = {"offset": cursor, "num_bytes": len(data), "crc32": list(pool.map(zlib.crc32, _chunks(data)))}
            cursor = align_up(cursor + len(data), ALIGNMENT)
        file.truncate(cursor)
        file.flush()
        os.fsync(file.fileno())
    return {"file": name, "planes": planes}


def _chunks(data: memoryview) -> list[memoryview]:
    return [data[begin : begin + CHUNK_BYTES] for begin in range(0, len(data), CHUNK_BYTES)]


class SavedState:
    """A state on disk, its manifest checked; planes are read one at a time and verified chunk by chunk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path)
        self.training: dict[str, Any] = self.manifest["training"]

    def check_model(self, spec: ModelSpec) -> None:
        """Refuse a state of another model, naming the first difference."""
        ours, theirs = describe_model(spec)["units"], self.manifest["model"]["units"]
        if len(ours) != len(theirs):
            raise RatelError(f"it has {len(theirs)} units, this model {len(ours)}", field="state", value=self.path,
                             remedy=f"It was saved from {self.manifest['model']['name']}; give that model")
        for mine, other in zip(ours, theirs):
            if mine != other:
                raise RatelError(f"unit {mine['name']} differs from the saved {other['name']} in "
                                 f"{_first_difference(mine, other)}", field="state", value=self.path,
                                 remedy=f"It was saved from {self.manifest['model']['name']}; give that model, with the "
                                        "same parameters frozen")

    def read(self, unit: int, plane: str) -> Tensor | None:
        """A plane of a unit (CPU), or None where the unit has none. Raises RatelError for a chunk that is damaged."""
        entry = self.manifest["units"][unit]
        place = entry["planes"].get(plane)
        if place is None:
            return None
        values = torch.empty(place["num_bytes"], dtype=torch.uint8)
        data = memoryview(values.numpy())
        file_path = self.path / entry["file"]
        try:
            with open(file_path, "rb") as file:
                file.seek(place["offset"])
                count = file.readinto(data)
        except OSError as error:
            raise DamagedStateError(f"cannot be read: {error.strerror}", value=file_path) from error
        if count != len(data):
            raise DamagedStateError(f"is cut short: {count} of {len(data)} bytes of plane {plane}", value=file_path)
        self._verify(data, place["crc32"], file_path, unit, plane)
        return values.view(PLANES[plane])

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> int:
        """Read everything; returns the bytes read. Raises RatelError at the first damaged chunk."""
        total = 0
        for unit, entry in enumerate(self.manifest["units"]):
            for plane, place in entry["planes"].items():
                self.read(unit, plane)
                total += place["num_bytes"]
                progress(place["num_bytes"])
        return total

    def _verify(self, data: memoryview, expected: list[int], file_path: Path, unit: int, plane: str) -> None:
        chunk_bytes = self.manifest["chunk_bytes"]
        parts = [data[begin : begin + chunk_bytes] for begin in range(0, len(data), chunk_bytes)]
        with ThreadPoolExecutor(thread_name_prefix="ratel-checksum") as pool:
            for index, (found, wanted) in enumerate(zip(pool.map(zlib.crc32, parts), expected, strict=True)):
                if found != wanted:
                    name = self.manifest["model"]["units"][unit]["name"]
                    raise DamagedStateError(f"is damaged: unit {name}, plane {plane}, chunk {index} has checksum "
                                            f"{found:08x}, {wanted:08x} was written", value=file_path,
                                            remedy="Resume from an older state, and check the drive")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        text = (path / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
    except OSError as error:
        raise RatelError(f"is not a complete state: {error.strerror}", field="state", value=path) from error
    except ValueError as error:
        raise DamagedStateError(f"its manifest is damaged: {error}", value=path) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RatelError("is not a state of Ratel", field="state", value=path)
    if manifest["version"] > VERSION:
        raise RatelError(f"was written in format {manifest['version']}; this version reads up to {VERSION}",
                         field="state", value=path, remedy="Use the version of Ratel that wrote it, or a newer one")
    if _sealed({k: v for k, v in manifest.items() if k != "seal"}) != text:
        raise DamagedStateError("its manifest is damaged: the seal does not match", value=path)
    return manifest


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest as text, with the checksum of the text without it."""
    return json.dumps({**manifest, "seal": zlib.crc32(json.dumps(manifest).encode())})


def _first_difference(mine: dict[str, Any], other: dict[str, Any]) -> str:
    key = next(k for k in mine if mine[k] != other.get(k))
    if key != "params":
        return f"{key}: {mine[key]} here, {other.get(key)} there"
    pairs = zip(mine["params"], other["params"])
    return next((f"parameter {a['name']} {a['shape']} here, {b['name']} {b['shape']} there" for a, b in pairs if a != b),
                f"the number of parameters: {len(mine['params'])} here, {len(other['params'])} there")


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _make_directory(path: Path) -> None:
    """With its parents; each new name is on disk before anything is put under it."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir()
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(partial: Path, path: Path) -> None:
    """Put a complete directory under its name; an older one is removed only then. Durable."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    _sync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)
