"""What a state's small files hold: the manifest, written once, and the commit records (docs/state_format.md)."""

import json
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ratel.errors import RatelError
from ratel.plan.layout import SlotLayout
from ratel.plan.shape import ModelSpec

FORMAT, VERSION = "ratel-state", 3
READ_VERSIONS = (2, 3)
"""2 has no buffers, and is read by who takes them from the model."""
MANIFEST = "manifest.json"
COMMITS = ("commit-0", "commit-1")
OTHER_PREFIX = "buffers-"


class DamagedStateError(RatelError):
    """A state, or a file of it, is not what was written. ``message`` is the error's, without value and remedy."""

    def __init__(self, message: str, *, value: Path, remedy: str = "Resume from an older state") -> None:
        self.message = message
        super().__init__(message, field="state", value=value, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One version of everything: which slot holds each unit, and what every grain adds up to."""

    sequence: int
    slots: list[int]
    training: dict[str, Any]
    checksums: np.ndarray
    """uint32: units in order, planes in the order of the manifest, grains in order."""


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """The part of a model's shape that a state depends on."""
    return {"name": spec.name, "units": [json.loads(json.dumps(asdict(unit))) for unit in spec.units]}


def describe_planes(spec: ModelSpec, layout: SlotLayout) -> list[dict[str, Any]]:
    """By unit: each plane's place in a slot."""
    planes: list[dict[str, Any]] = [{} for _ in spec.units]
    for (unit, name), span in layout.spans.items():
        planes[unit][name] = {"offset": span.offset, "num_elements": span.num_elements}
    return planes


def make_manifest(spec: ModelSpec, layout: SlotLayout, *, grain: int, num_slots: int, files: list[str],
                  pattern: list[int], stripe_bytes: int) -> bytes:
    """``files``: relative to the state's directory, or absolute; ``pattern``: the file of each stripe of one round."""
    content = {"format": FORMAT, "version": VERSION, "checksum": "crc32", "grain": grain, "num_slots": num_slots,
               "slot_bytes": layout.num_bytes, "files": files, "pattern": pattern, "stripe_bytes": stripe_bytes,
               "planes": describe_planes(spec, layout), "model": describe_model(spec)}
    return _sealed(content)


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise RatelError(f"is not a complete state: {error.strerror}", field="state", value=path) from error
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise DamagedStateError(f"its manifest is damaged: {error}", value=path) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RatelError("is not a state of Ratel", field="state", value=path)
    if manifest["version"] not in READ_VERSIONS:
        raise RatelError(f"was written in format {manifest['version']}; this version reads {VERSION}", field="state",
                         value=path, remedy="Use the version of Ratel that wrote it")
    if _sealed(_without_seal(manifest)) != text:
        raise DamagedStateError("its manifest is damaged: the seal does not match", value=path)
    return manifest


def pack_commit(commit: Commit) -> bytes:
    """One line of JSON, then the checksums as little-endian uint32."""
    sums = commit.checksums.astype("<u4").tobytes()
    head = {"sequence": commit.sequence, "slots": commit.slots, "training": commit.training,
            "num_checksums": len(commit.checksums), "checksums_crc32": zlib.crc32(sums)}
    return _sealed(head) + b"\n" + sums


def read_commit(path: Path) -> Commit:
    """The newest of the state's records that is whole. One that a crash cut short in the writing does not count."""
    commits = [commit for commit in (_unpack(path / name) for name in COMMITS) if commit is not None]
    if not commits:
        raise DamagedStateError("neither of its commit records is whole", value=path)
    return max(commits, key=lambda commit: commit.sequence)


def _unpack(path: Path) -> Commit | None:
    try:
        head, _, rest = path.read_bytes().partition(b"\n")
        found = json.loads(head)
        if _sealed(_without_seal(found)) != head:
            return None
    except (OSError, ValueError, AttributeError):
        return None
    sums = rest[: 4 * found["num_checksums"]]
    if zlib.crc32(sums) != found["checksums_crc32"]:
        return None
    return Commit(sequence=found["sequence"], slots=found["slots"], training=found["training"],
                  checksums=np.frombuffer(sums, dtype="<u4"))


@dataclass(frozen=True, kw_only=True)
class OtherState:
    """What a model has besides the planes of its units, packed (`ratel.models.checkpoints.other_state`), in a file that is
    named by its content: one that is there need not be written again, and none is ever written over."""

    content: bytes

    @cached_property
    def digest(self) -> str:
        return sha256(self.content).hexdigest()

    @property
    def file(self) -> str:
        return f"{OTHER_PREFIX}{self.digest[:16]}.safetensors"

    def describe(self) -> dict[str, Any]:
        return {"file": self.file, "sha256": self.digest, "num_bytes": len(self.content)}


def is_other_file(name: str) -> bool:
    return name.startswith(OTHER_PREFIX)


def read_other_state(path: Path, entry: dict[str, Any]) -> bytes:
    """The file that a commit speaks of. Raises DamagedStateError if it is not what was written."""
    file = path / Path(entry["file"]).name
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedStateError(f"cannot be read: {error.strerror}", value=file) from error
    if len(content) != entry["num_bytes"] or sha256(content).hexdigest() != entry["sha256"]:
        raise DamagedStateError("is damaged: buffers have another SHA-256 than was written", value=file,
                                remedy="Resume from an older state, and check the drive")
    return content


def _sealed(content: dict[str, Any]) -> bytes:
    """As JSON text, with the checksum of the text without it."""
    return json.dumps({**content, "seal": zlib.crc32(json.dumps(content).encode())}).encode()


def _without_seal(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "seal"}
