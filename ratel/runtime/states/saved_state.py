"""Reads a training state: one that was copied to a directory, or the commits that a run made in
place on its SSDs.

    STATE/manifest.json       where every plane lies in which files, written once
    STATE/commit-0, commit-1  by turns: which slot holds what, the checksum of every grain, the state of the training
    STATE/planes.0            the planes; a run that commits in place has them in its --ssd directories

Tiers, budgets, buffers and devices leave no trace in it.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.memory.jobs import Crew, crew
from ratel.models.checkpoints.other_state import unpack
from ratel.ownership.stamps import belongs_to
from ratel.planner.formats import FP32, Encoding, StateFormats
from ratel.planner.shape import ModelSpec
from ratel.planner.slot_layout import first_grain, num_grains, pieces
from ratel.reading import descriptor_of
from ratel.runtime.states.base import Digests
from ratel.runtime.states.commits import Folders, located
from ratel.runtime.states.durable_files import settled
from ratel.runtime.states.format import DamagedStateError, MissingFileError, describe_model, formats_of, read_commit, read_manifest, read_other_state
from ratel.store.encodings import DTYPES, recode

MOUNT_IT = "Mount its drive again, or, if it is mounted elsewhere now, name that directory with --ssd"
_MISSING = "a file that planes of the state are in is not there"
READERS = 8
PIECE_GRAINS = 8


class SavedState:
    """A state on disk, its manifest and its newest commit checked; planes are verified as they are
    read."""

    def __init__(self, path: Path, folders: Folders = ()) -> None:
        """``folders``: where SSD files may be that are not where they were."""
        self.path = settled(path)
        self.manifest = read_manifest(self.path)
        self.commit = read_commit(self.path)
        self._check_slots()
        self.training: dict[str, Any] = self.commit.training
        self.files = located(self.path, self.manifest, folders)
        self._formats = formats_of(self.manifest)
        self._units = [_Shape(entry) for entry in self.manifest["model"]["units"]]
        self._first_sums = self._index_checksums()

    @property
    def num_bytes(self) -> int:
        return sum(self._num_bytes(unit, name) for unit, name in self.planes())

    @property
    def num_units(self) -> int:
        return len(self._units)

    @property
    def base(self) -> Digests | None:
        """What it says of the frozen parameters, which it does not hold. None: it holds all that
        there is."""
        return self.training.get("base")

    @property
    def num_left_out(self) -> int:
        """Parameters that are the model's own, and not in the state."""
        return 0 if self.base is None else sum(prod(param["shape"]) for param in self._frozen)

    @property
    def frozen_names(self) -> frozenset[str]:
        return frozenset(param["name"] for param in self._frozen)

    @property
    def _frozen(self) -> list[dict[str, Any]]:
        return [param for unit in self.manifest["model"]["units"] for param in unit["params"] if not param.get("trainable", True)]

    @property
    def is_in_place(self) -> bool:
        """The run's own SSD files hold the planes."""
        return self.manifest["num_slots"] > 1

    @property
    def is_foreign(self) -> bool:
        """Its planes are in the SSD files of another directory, of which this one is a copy: they
        are read, and left alone."""
        return self.is_in_place and not all(belongs_to(path, self.path) for path in self.files)

    def check_files(self) -> None:
        """Refuse a state whose planes are not there, before anything is made of it."""
        for path in self.files:
            if not path.is_file() and self.is_in_place:
                raise MissingFileError(_MISSING, value=path, remedy=f"{MOUNT_IT}; else use an older state")
            if not path.is_file():
                raise DamagedStateError(_MISSING, value=path)

    def planes(self) -> Iterator[tuple[int, str]]:
        for unit, entry in enumerate(self.manifest["planes"]):
            for name in entry:
                yield unit, name

    def other_state(self) -> dict[str, Any] | None:
        """Buffers and extra state, by name; None in a state of an older format. Raises RatelError
        if they are damaged."""
        entry = self.training.get("buffers")
        if entry is None:
            return None
        content = read_other_state(self.path, entry)
        try:
            return unpack(content)
        except Exception as error:  # whatever a file that was made by hand makes its many parsers raise
            raise DamagedStateError(f"is damaged: no buffers can be read from it ({type(error).__name__}: {error})",
                                    value=self.path / entry["file"]) from error

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

    def conversion(self, formats: StateFormats) -> str | None:
        """What becomes of its planes in a session that stores them so, and what is lost by it; None
        where they stay as they are."""
        changed = [plane for plane in formats.planes if self._formats.encoding(plane) != formats.encoding(plane)]
        if not changed:
            return None
        before, after = (f"{table.name} ({table.encoding(changed[0]).name})" for table in (self._formats, formats))
        lost = ("they are rounded, and what is rounded off is lost" if formats.encoding(changed[0]) != FP32 else
                "no bit is lost, and what rounding took from them before does not come back")
        return f"the moments in {self.path} go on from {before} as {after}: {lost}; weights stay exact"

    def num_elements(self, unit: int, plane: str) -> int:
        """0 where the unit has no such plane."""
        return self.manifest["planes"][unit].get(plane, {"num_elements": 0})["num_elements"]

    def read(self, unit: int, plane: str, out: Tensor | None = None, encoding: Encoding | None = None) -> Tensor | None:
        """A plane of a unit (CPU), or None where the unit has none. ``encoding``: what it is turned
        into, rounded to nearest, where that is not how it is stored; ``out``: of the dtype of that,
        contiguous, where the plane is put from the first element on. Raises RatelError for a grain
        that is damaged."""
        if plane not in self.manifest["planes"][unit]:
            return None
        count, own = self.num_elements(unit, plane), self._formats.encoding(plane)
        wanted = encoding or own
        values = torch.empty(wanted.place(count), dtype=DTYPES[wanted.name]) if out is None else out[: wanted.place(count)]

        def fill(piece: tuple[int, int]) -> None:
            part = values[wanted.place(piece[0]) : wanted.place(piece[1])]
            stored = part if wanted == own else torch.empty(own.place(piece[1] - piece[0]), dtype=DTYPES[own.name])
            self._read_piece(descriptors, unit, plane, piece, memoryview(stored.view(torch.uint8).numpy()))
            if stored is not part:
                recode(stored, own, wanted, part)

        with self._readers() as (pool, descriptors):
            list(pool.map(fill, self._pieces(unit, plane)))
        return values

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> int:
        """Read everything; returns the bytes read. Raises RatelError at the first damaged grain."""

        def check(work: tuple[int, str, tuple[int, int]]) -> int:
            unit, plane, piece = work
            data = memoryview(bytearray(self._formats.encoding(plane).num_bytes(piece[1] - piece[0])))
            self._read_piece(descriptors, unit, plane, piece, data)
            return len(data)

        total = 0
        with self._readers() as (pool, descriptors):
            for unit, plane in self.planes():
                for num_bytes in pool.map(check, [(unit, plane, piece) for piece in self._pieces(unit, plane)]):
                    total += num_bytes
                    progress(num_bytes)
        if self.training.get("buffers") is not None:
            read_other_state(self.path, self.training["buffers"])
        return total

    def checksums(self, unit: int, plane: str) -> np.ndarray:
        first = self._first_sums[unit, plane]
        return self.commit.checksums[first : first + self._num_grains(unit, plane)]

    def _check_slots(self) -> None:
        slots, units, count = self.commit.slots, len(self.manifest["planes"]), self.manifest["num_slots"]
        if len(slots) != units or any(slot >= count for slot in slots):
            raise DamagedStateError(f"its commit record places {len(slots)} units in slots up to {max(slots, default=0)}; its "
                                    f"manifest has {units} units and {count} slots", value=self.path)

    def _index_checksums(self) -> dict[tuple[int, str], int]:
        index, cursor = {}, 0
        for unit, plane in self.planes():
            index[unit, plane] = cursor
            cursor += self._num_grains(unit, plane)
        if cursor != len(self.commit.checksums):
            raise DamagedStateError(f"its commit record has {len(self.commit.checksums)} checksums, its manifest says "
                                    f"{cursor}", value=self.path)
        return index

    def _read_piece(self, descriptors: list[int], unit: int, plane: str, piece: tuple[int, int], data: memoryview) -> None:
        begin = piece[0]
        at = self._offset(unit, plane) + self._formats.encoding(plane).num_bytes(begin)
        self._read_bytes(descriptors, at, data, plane)
        grain = self.manifest["grain"]
        first = first_grain(self._units[unit], begin, grain)
        expected, step = self.checksums(unit, plane), self._formats.encoding(plane).num_bytes(grain)
        for index, start in enumerate(range(0, len(data), step)):
            found, wanted = zlib.crc32(data[start : start + step]), int(expected[first + index])
            if found != wanted:
                name = self.manifest["model"]["units"][unit]["name"]
                raise DamagedStateError(f"is damaged: unit {name}, plane {plane}, chunk {first + index} has checksum "
                                        f"{found:08x}, {wanted:08x} was written", value=self._file_at(at + start)[0],
                                        remedy="Resume from an older state, and check the drive")

    def _read_bytes(self, descriptors: list[int], at: int, data: memoryview, plane: str) -> None:
        """From the stripes of all files."""
        stripe, cursor = self.manifest["stripe_bytes"], 0
        while cursor < len(data):
            count = min(len(data) - cursor, stripe - (at + cursor) % stripe)
            path, position, index = self._file_at(at + cursor)
            try:
                read = os.preadv(descriptors[index], [data[cursor : cursor + count]], position)
            except OSError as error:
                raise DamagedStateError(f"cannot be read: {error.strerror}", value=path) from error
            if read == 0:
                raise DamagedStateError(f"is cut short: it ends before byte {position + count}, in plane {plane}",
                                        value=path)
            cursor += read

    def _file_at(self, at: int) -> tuple[Path, int, int]:
        """File, position in it and index of the file, of a byte of the volume."""
        stripe, pattern = self.manifest["stripe_bytes"], self.manifest["pattern"]
        number, rest = divmod(at, stripe)
        cycle, place = divmod(number, len(pattern))
        index = pattern[place]
        before = cycle * pattern.count(index) + pattern[:place].count(index)
        return self.files[index], before * stripe + rest, index

    def _readers(self) -> "_Readers":
        return _Readers(self.files)

    def _pieces(self, unit: int, plane: str) -> list[tuple[int, int]]:
        count = self.manifest["planes"][unit][plane]["num_elements"]
        return pieces(self._units[unit], count, PIECE_GRAINS * self.manifest["grain"])

    def _num_grains(self, unit: int, plane: str) -> int:
        return num_grains(self._units[unit], self.manifest["planes"][unit][plane]["num_elements"], self.manifest["grain"])

    def _offset(self, unit: int, plane: str) -> int:
        return self.commit.slots[unit] * self.manifest["slot_bytes"] + self.manifest["planes"][unit][plane]["offset"]

    def _num_bytes(self, unit: int, plane: str) -> int:
        return self._formats.encoding(plane).num_bytes(self.num_elements(unit, plane))


class _Shape:
    """What `ratel.planner.slot_layout` asks of a unit."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.num_trainable: int = entry["num_trainable"]


class _Readers:
    """Threads and open files while planes are read."""

    def __init__(self, files: list[Path]) -> None:
        self._files, self._stack = files, ExitStack()

    def __enter__(self) -> tuple[Crew, list[int]]:
        with ExitStack() as stack:
            descriptors = []
            for path in self._files:
                try:
                    descriptors.append(descriptor_of(path))
                except OSError as error:
                    raise DamagedStateError(f"cannot be read: {error.strerror}", value=path) from error
                stack.callback(os.close, descriptors[-1])
            pool = stack.enter_context(crew(READERS, "ratel-state"))
            self._stack = stack.pop_all()
        return pool, descriptors

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _first_difference(mine: dict[str, Any], other: dict[str, Any]) -> str:
    key = next((k for k in mine if mine[k] != other.get(k)), None)
    if key is None:
        return f"what is said of it: {', '.join(sorted(other.keys() - mine.keys()))} is of another version"
    if key != "params":
        return f"{key}: {mine[key]} here, {other.get(key)} there"
    pairs = zip(mine["params"], other["params"])
    return next((f"parameter {a['name']} {a['shape']} here, {b['name']} {b['shape']} there" for a, b in pairs if a != b),
                f"the number of parameters: {len(mine['params'])} here, {len(other['params'])} there")
