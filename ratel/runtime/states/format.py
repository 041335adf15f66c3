"""What a state's small files hold: the manifest, written once, and the commit records
(docs/state_format.md)."""

import json
import re
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ratel.config import MOST_SEED, TASKS
from ratel.errors import RatelError
from ratel.ownership.regular import begins_with
from ratel.planner.formats import EXACT_NAME, FORMATS, FROZEN, PLANES, StateFormats
from ratel.planner.shape import ModelSpec
from ratel.planner.slot_layout import GRAIN_ELEMENTS, SlotLayout
from ratel.reading import SMALL_FILE_BYTES, parse_json, read_regular
from ratel.schema import SchemaError, anything, check, listing, mapping, one_of, record, shown, text, whole
from ratel.synced import partial_name

FORMAT, VERSION, WITHOUT_FROZEN, IN_OTHER_FORMATS = "ratel-state", 3, 4, 5
READ_VERSIONS = (2, 3, 4, 5)
"""5 is 4 with planes that are not exact, and names their formats. 4 names what is frozen and does not hold it; where all is trained it would be 3. 2 has no
buffers, and is read by who takes them from the model."""
MANIFEST = "manifest.json"
COMMITS = ("commit-0", "commit-1")
OTHER_PREFIX = "buffers-"
_OTHER_FILE = re.compile(rf"{OTHER_PREFIX}[0-9a-f]{{16}}\.safetensors")
PLANES_FILE = "planes.0"
STATE_BEGINNINGS = {MANIFEST: f'{{"format": "{FORMAT}"'.encode(), **dict.fromkeys(COMMITS, b'{"sequence": ')}
"""By which a file of a state is known, even where it is damaged."""

_RECORD_BYTES = 1 << 30
"""The most bytes that a commit record may have: the checksums of 100 TB are less."""
_MOST_UNITS, _MOST_ELEMENTS = 1 << 20, 1 << 48

_NAME = text(r"[^\x00]+", "a name")
_PARAM = record({"name": _NAME, "shape": listing(whole(0, _MOST_ELEMENTS))}, is_open=True)
_UNIT = record({"name": _NAME, "num_trainable": whole(0, _MOST_ELEMENTS), "num_elements": whole(0, _MOST_ELEMENTS),
                "params": listing(_PARAM)}, is_open=True)
_PLANE = record({"offset": whole(), "num_elements": whole(1, _MOST_ELEMENTS)})
_MANIFEST = record({
    "checksum": one_of("crc32"), "grain": whole(1, GRAIN_ELEMENTS), "num_slots": whole(1, 16), "slot_bytes": whole(0, 1 << 56),
    "files": listing(_NAME, least=1, most=4096), "pattern": listing(whole(0, 4095), least=1, most=1 << 16),
    "stripe_bytes": whole(1), "planes": listing(mapping(one_of(*PLANES), _PLANE), most=_MOST_UNITS),
    "model": record({"name": text(), "units": listing(_UNIT, most=_MOST_UNITS)}, is_open=True)},
    {"formats": text()}, is_open=True)
_OTHER = record({"file": text(r"buffers-[0-9a-f]{16}\.safetensors", "the name of a file of buffers"),
                 "sha256": text("[0-9a-f]{64}", "a SHA-256"), "num_bytes": whole(0, 1 << 40)})
_TASK = record({"name": one_of(*TASKS), "labels": listing(text(), most=_MOST_UNITS)}, {"problem": text(), "pad_id": whole()})
_TRAINING = record({"steps": whole(), "updates": whole(), "seed": whole(0, MOST_SEED), "dtype": one_of("bf16", "fp32"),
                    "extra": mapping(text(), anything)},
                   {"micro_batches": record({"rows": whole(1), "rows_of_one": whole(1)}, is_open=True), "task": _TASK,
                    "adapter": mapping(text(), anything), "base": mapping(one_of(*PLANES), mapping(text(), text("[0-9a-f]{64}", "a SHA-256")))}, is_open=True)
_RECORD = record({"sequence": whole(), "slots": listing(whole(0, 15)), "training": _TRAINING, "num_checksums": whole(),
                  "checksums_crc32": whole()}, is_open=True)


class DamagedStateError(RatelError):
    """A state, or a file of it, is not what was written. ``message`` is the error's, without value
    and remedy."""

    def __init__(self, message: str, *, value: Path, remedy: str = "Resume from an older state") -> None:
        self.message = message
        super().__init__(message, field="state", value=value, remedy=remedy)


class MissingFileError(DamagedStateError):
    """A file with planes is not where it was."""


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
    return {"name": spec.name, "units": [json.loads(json.dumps(_without_default(asdict(unit)))) for unit in spec.units]}


def _without_default(unit: dict[str, Any]) -> dict[str, Any]:
    """As before there were units that compute in fp32 among others."""
    return {key: value for key, value in unit.items() if key != "fp32" or value}


def describe_planes(spec: ModelSpec, layout: SlotLayout) -> list[dict[str, Any]]:
    """By unit: each plane's place in a slot."""
    planes: list[dict[str, Any]] = [{} for _ in spec.units]
    for (unit, name), place in layout.places.items():
        planes[unit][name] = {"offset": place.offset, "num_elements": place.num_elements}
    return planes


def make_manifest(spec: ModelSpec, layout: SlotLayout, formats: StateFormats, *, grain: int, num_slots: int, files: list[str],
                  pattern: list[int], stripe_bytes: int) -> bytes:
    """``files``: relative to the state's directory, or absolute; ``pattern``: the file of each
    stripe of one round."""
    content = {"format": FORMAT, "version": _version_of(spec, formats), "checksum": "crc32", "grain": grain, "num_slots": num_slots,
               "slot_bytes": layout.num_bytes, "files": files, "pattern": pattern, "stripe_bytes": stripe_bytes,
               "planes": describe_planes(spec, layout), "model": describe_model(spec),
               **({} if formats.name == EXACT_NAME else {"formats": formats.name})}
    return _sealed(content)


def _version_of(spec: ModelSpec, formats: StateFormats) -> int:
    if formats.name != EXACT_NAME:
        return IN_OTHER_FORMATS
    return WITHOUT_FROZEN if any(unit.num_elements > unit.num_trainable for unit in spec.units) else VERSION


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        text = read_regular(path / MANIFEST)
    except OSError as error:
        if any(begins_with(path / name, STATE_BEGINNINGS[name]) for name in COMMITS):
            raise DamagedStateError(f"its manifest cannot be read: {error.strerror}", value=path) from error
        raise RatelError(f"is not a complete state: {error.strerror} ({MANIFEST})", field="state", value=path,
                         remedy="Give the --out of a run that saved states, or a state in it") from error
    try:
        manifest = parse_json(text)
    except ValueError as error:
        raise DamagedStateError(f"its manifest is damaged: {error}", value=path) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RatelError("is not a state of Ratel", field="state", value=path, remedy="Give the --out of a run")
    if manifest.get("version") not in READ_VERSIONS:
        raise RatelError(f"was written in format {shown(manifest.get('version'))}; this version reads up to {READ_VERSIONS[-1]}",
                         field="state", value=path, remedy="Use the version of Ratel that wrote it")
    if _sealed(_without_seal(manifest)) != text:
        raise DamagedStateError("its manifest is damaged: the seal does not match", value=path)
    try:
        check(manifest, _MANIFEST)
        _check_formats(manifest, path)
        _check_planes(manifest)
    except SchemaError as error:
        raise DamagedStateError(f"its manifest is damaged: {error}", value=path) from error
    return manifest


def _check_planes(manifest: dict[str, Any]) -> None:
    """Every plane that a unit needs is there, as long as the unit, within its slot and in files
    that are named."""
    units, planes = manifest["model"]["units"], manifest["planes"]
    if len(units) != len(planes):
        raise SchemaError(f"planes has {len(planes)} entries for {len(units)} units")
    if max(manifest["pattern"]) >= len(manifest["files"]):
        raise SchemaError(f"pattern names file {max(manifest['pattern'])} of {len(manifest['files'])}")
    for number, (unit, found) in enumerate(zip(units, planes)):
        trained, whole_unit = unit["num_trainable"], unit["num_elements"]
        if trained > whole_unit:
            raise SchemaError(f"model.units[{number}].num_trainable is {trained} of {whole_unit} elements")
        for name in PLANES:
            lengths = _lengths(manifest, name, trained, whole_unit if manifest["version"] < WITHOUT_FROZEN else trained)
            if found.get(name, {"num_elements": 0})["num_elements"] not in lengths:
                raise SchemaError(f"planes[{number}].{name} has {shown(found.get(name, {}).get('num_elements'))} elements, "
                                  f"the unit needs {max(lengths)}")
        for name, place in found.items():
            if place["offset"] + formats_of(manifest).encoding(name).num_bytes(place["num_elements"]) > manifest["slot_bytes"]:
                raise SchemaError(f"planes[{number}].{name} does not end within the slot")


def _check_formats(manifest: dict[str, Any], path: Path) -> None:
    name = manifest.get("formats", EXACT_NAME)
    if name not in FORMATS:
        raise RatelError(f"its planes are in formats that this version does not know: {shown(name)}", field="state", value=path,
                         remedy="Use the version of Ratel that wrote it")


def formats_of(manifest: dict[str, Any]) -> StateFormats:
    """How its planes are stored, which is the same whatever blocks compute in."""
    return FORMATS[manifest.get("formats", EXACT_NAME)]["bf16"]


def _lengths(manifest: dict[str, Any], plane: str, trained: int, whole_unit: int) -> set[int]:
    """What a plane's may be: in fp32 runs more planes have the frozen part."""
    tables = FORMATS[manifest.get("formats", EXACT_NAME)].values()
    return {whole_unit if FROZEN in row.segments else trained for table in tables for row in table.rows if row.plane == plane}


def pack_commit(commit: Commit) -> bytes:
    """One line of JSON, then the checksums as little-endian uint32."""
    sums = commit.checksums.astype("<u4").tobytes()
    head = {"sequence": commit.sequence, "slots": commit.slots, "training": commit.training,
            "num_checksums": len(commit.checksums), "checksums_crc32": zlib.crc32(sums)}
    return _sealed(head) + b"\n" + sums


def read_commit(path: Path) -> Commit:
    """The newest of the state's records that is whole. One that a crash cut short in the writing
    does not count."""
    commits = [commit for commit in (_unpack(path / name) for name in COMMITS) if commit is not None]
    if not commits:
        raise DamagedStateError("neither of its commit records is whole", value=path)
    return max(commits, key=lambda commit: commit.sequence)


def _unpack(path: Path) -> Commit | None:
    """None if it is not whole. Raises DamagedStateError for one that is sealed, and says what no
    run writes."""
    try:
        head, _, rest = read_regular(path, _RECORD_BYTES).partition(b"\n")
        found = parse_json(head, allow_infinity=True)
        if not isinstance(found, dict) or _sealed(_without_seal(found)) != head:
            return None
        check(found, _RECORD)
    except SchemaError as error:
        raise DamagedStateError(f"its record {path.name} is damaged: {error}", value=path.parent) from error
    except (OSError, ValueError):
        return None
    sums = rest[: 4 * found["num_checksums"]]
    if zlib.crc32(sums) != found["checksums_crc32"] or len(sums) != 4 * found["num_checksums"]:
        return None
    return Commit(sequence=found["sequence"], slots=found["slots"], training=found["training"],
                  checksums=np.frombuffer(sums, dtype="<u4"))


@dataclass(frozen=True, kw_only=True)
class OtherState:
    """What a model has besides the planes of its units, packed
    (`ratel.models.checkpoints.other_state`), in a file that is named by its content: one that is
    there need not be written again, and none is ever written over."""

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
    return _OTHER_FILE.fullmatch(name) is not None


def is_state_file(name: str) -> bool:
    """Whether a file in a state's directory is the state's: all else is somebody else's, and
    stays."""
    return name in (MANIFEST, *COMMITS, PLANES_FILE, partial_name(MANIFEST)) or is_other_file(name)


def read_other_state(path: Path, entry: dict[str, Any]) -> bytes:
    """The file that a commit speaks of. Raises DamagedStateError if it is not what was written."""
    file = path / entry["file"]
    try:
        content = read_regular(file, max(entry["num_bytes"], SMALL_FILE_BYTES))
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
