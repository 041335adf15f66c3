"""What a save becomes: a directory with a copy of everything, or a commit of what lies in the run's
own SSD files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ratel import native
from ratel.errors import RatelError
from ratel.ownership.regular import is_plain
from ratel.ownership.stamps import Stamp, mark_of, read_stamp, volume_of, write_stamp
from ratel.planner.placement import SSD
from ratel.planner.plan import Plan
from ratel.planner.shape import UnitSpec
from ratel.planner.slot_layout import first_grain, lay_out_slot, num_grains
from ratel.runtime.states.commits import discard_commits, discard_partial
from ratel.runtime.states.durable_files import (beside, make_directory, move_others, others_in, remove_files, remove_state,
                                                replace_directory)
from ratel.runtime.states.format import (COMMITS, MANIFEST, PLANES_FILE, Commit, OtherState, is_other_file, make_manifest,
                                         pack_commit)
from ratel.store.plane_io import paged_bytes
from ratel.store.planes import Store
from ratel.synced import replace_synced, sync_path, write_synced

STRIPE_BYTES = 1 << 20


class DirectoryTarget:
    """A new directory at ``path``. It has its name only once it is complete; an older one of that
    name goes last, and what else was in it stays."""

    is_in_place = False

    def __init__(self, path: Path, plan: Plan, engine: "native.nvme_ds.Engine", other: OtherState | None = None) -> None:
        self.path, self._plan, self._engine, self._other = path, plan, engine, other
        self._partial = path.with_name(path.name + ".partial")
        self._layout = lay_out_slot(plan.spec, lambda unit: plan.formats.planes, plan.formats)
        self._sums = {key: np.zeros(num_grains(plan.spec.units[key[0]], place.num_elements, plan.grain), dtype=np.uint32)
                      for key, place in self._layout.places.items()}
        self._volume: "native.nvme_ds.Volume | None" = None

    def begin(self) -> None:
        """Allocates the file in full: a full disk is found before anything is copied."""
        remove_state(self._partial)
        make_directory(self._partial)
        # Beside the directory, whose name is another each time: the engine keeps a queue for every
        # folder that it sees.
        self._volume = self._engine.create_volume([self.path.parent], f"{self._partial.name}.planes",
                                                  self._layout.num_bytes)

    def wanted(self, unit: UnitSpec) -> tuple[str, ...]:
        return self._plan.formats.planes

    def write(self, unit: UnitSpec, plane: str, begin: int, values: torch.Tensor, sums: np.ndarray) -> int:
        first = first_grain(unit, begin, self._plan.grain)
        self._sums[unit.index, plane][first : first + len(sums)] = sums
        place = self._layout.places[unit.index, plane]
        return self._engine.submit_write(self._volume, place.at(begin), values.data_ptr(),
                                         paged_bytes(values), native.nvme_ds.BACKGROUND)

    def finish(self, training: dict[str, Any]) -> None:
        self._volume.sync()
        file = self._volume.paths[0]
        self._volume.close(unlink=False)
        os.rename(file, self._partial / PLANES_FILE)
        spec = self._plan.spec
        write_synced(self._partial / MANIFEST, make_manifest(
            spec, self._layout, self._plan.formats, grain=self._plan.grain, num_slots=1, files=[PLANES_FILE], pattern=[0],
            stripe_bytes=STRIPE_BYTES))
        _write_other(self._partial, self._other)
        write_synced(self._partial / COMMITS[0], pack_commit(Commit(
            sequence=0, slots=[0] * len(spec.units), training=training, checksums=_joined(list(self._sums.values())))))
        sync_path(self._partial)
        replace_directory(self._partial, self.path, self._discard)

    def drop(self) -> None:
        if self._volume is not None:
            self._volume.close()
            remove_files(self._volume.paths)  # it may have been closed before, to be moved
        remove_state(self._partial)

    def _discard(self, old: Path) -> None:
        move_others(others_in(old), old, self.path)
        remove_state(old)


class CommitLog:
    """The directory of a run that commits in place: what its SSD files hold, and the records of the
    commits."""

    def __init__(self, path: Path, plan: Plan, store: Store, *, stripe_bytes: int, pattern: list[int],
                 folders: Sequence[str]) -> None:
        """``folders``: where SSD files of an earlier run may be that are not where its records
        say."""
        self.path, self.plan, self.store, self._folders = path, plan, store, folders
        self._manifest = make_manifest(plan.spec, plan.slot_layout, plan.formats, grain=plan.grain, num_slots=plan.num_slots,
                                       files=list(store.volume.paths), pattern=pattern, stripe_bytes=stripe_bytes)
        self._sequence = 0
        self._is_there = False
        self._other_before: str | None = None

    @property
    def manifest(self) -> bytes:
        return self._manifest

    def take_over(self, newest: Commit) -> None:
        """The directory is this run's already, and holds that commit. Its manifest says where the
        files are now."""
        self._sequence, self._is_there = newest.sequence, True
        self._other_before = newest.training.get("buffers", {}).get("file")
        if (self.path / MANIFEST).read_bytes() != self._manifest:  # drives may be mounted elsewhere now
            replace_synced(self.path / MANIFEST, self._manifest)
        stamps = map(read_stamp, self.store.volume.paths)
        if any(stamp is None or stamp.commits != os.path.realpath(self.path) for stamp in stamps):
            self._stamp(self.path)

    def write(self, training: dict[str, Any], other: OtherState | None = None) -> None:
        """Record what is current. When this returns it is what a resumed run will find."""
        store, sequence = self.store, self._sequence + 1
        sums = [store.checksums.trained(store.versions.current[unit], unit, name) for unit, name in
                self.plan.slot_layout.places]
        record = pack_commit(Commit(sequence=sequence, slots=list(store.versions.current), training=training,
                                    checksums=_joined(sums)))
        if self._is_there:
            _write_other(self.path, other)
            self._replace(self.path / COMMITS[sequence % 2], record)
        else:
            self._make(COMMITS[sequence % 2], record, other)
        self._sequence = sequence  # only now: a write that failed must not be followed by one over the other record
        store.versions.commit()
        self._drop_other(other)

    def _drop_other(self, current: OtherState | None) -> None:
        """Remove buffers that neither of the two records speaks of."""
        names = (current.file if current else None, self._other_before)
        self._other_before = names[0]
        if any(names):
            remove_files(str(path) for path in self.path.iterdir() if is_other_file(path.name) and path.name not in names)

    def _replace(self, path: Path, record: bytes) -> None:
        if path.exists() and not is_plain(os.lstat(path)):
            os.unlink(path)  # another name of it may be somebody's copy of the record before
        is_new = not path.exists()
        write_synced(path, record)
        if is_new:
            sync_path(path.parent)

    def _make(self, name: str, record: bytes, other: OtherState | None) -> None:
        """The first commit. It takes the place of an earlier run's, whose files go only now; ours
        stay from now on."""
        for file in self.store.volume.paths:
            sync_path(Path(file).parent)  # to sync a file does not say that its name will be there
        partial = self.path.with_name(self.path.name + ".partial")
        discard_partial(partial, self._folders)
        make_directory(partial)
        write_synced(partial / MANIFEST, self._manifest)
        _write_other(partial, other)
        write_synced(partial / name, record)
        sync_path(partial)
        self._stamp(partial)
        self.store.volume.keep = True
        waiting = beside(self.path) if beside(self.path).exists() else None
        replace_directory(partial, self.path, self._discard)
        if waiting is not None:
            self._discard(waiting)
        self._is_there = True

    def _stamp(self, directory: Path) -> None:
        """From now on the SSD files are this directory's, under whatever name it goes."""
        for index, file in enumerate(self.store.volume.paths):
            volume, _ = volume_of(os.path.basename(file))
            write_stamp(file, Stamp(volume=volume, index=index, commits=os.path.realpath(self.path), owner=mark_of(directory)))

    def _discard(self, old: Path) -> None:
        move_others(others_in(old), old, self.path)
        discard_commits(old, but=self.store.volume.paths, folders=self._folders)


class CommitTarget:
    """One commit. Planes on SSD are where they must be already; the others are copied beside
    them."""

    is_in_place = True

    def __init__(self, log: CommitLog, engine: "native.nvme_ds.Engine", other: OtherState | None = None) -> None:
        self.path, self._log, self._engine, self._other = log.path, log, engine, other

    def begin(self) -> None:
        return None

    def wanted(self, unit: UnitSpec) -> tuple[str, ...]:
        if not self._log.store.versions.include(unit.index):
            return ()
        place = self._log.plan.placement(unit)
        return tuple(plane for plane in self._log.plan.formats.planes if place.tier(plane) != SSD)

    def write(self, unit: UnitSpec, plane: str, begin: int, values: torch.Tensor, sums: np.ndarray) -> int:
        store = self._log.store
        slot = store.versions.current[unit.index]
        first = first_grain(unit, begin, self._log.plan.grain)
        store.checksums.trained(slot, unit.index, plane)[first : first + len(sums)] = sums
        return self._engine.submit_write(store.volume, store.offset(slot, unit.index, plane, begin), values.data_ptr(),
                                         paged_bytes(values), native.nvme_ds.BACKGROUND)

    def finish(self, training: dict[str, Any]) -> None:
        volume = self._log.store.volume
        volume.sync()
        _require(volume)
        self._log.write(training, self._other)

    def drop(self) -> None:
        """Nothing to remove: what was committed before is untouched, and the session ends."""


def _write_other(directory: Path, other: OtherState | None) -> None:
    """Before the record that speaks of it. A file of that name has that content, or was cut short
    by a crash."""
    if other is not None and not _is_whole(directory / other.file, other):
        write_synced(directory / other.file, other.content)
        sync_path(directory)


def _is_whole(path: Path, other: OtherState) -> bool:
    return path.is_file() and path.stat().st_size == len(other.content) and path.read_bytes() == other.content


def _require(volume: "native.nvme_ds.Volume") -> None:
    """A record speaks of files that are there: what was removed meanwhile is written to as if it
    were, and then gone."""
    try:
        volume.check_files()
    except OSError as error:
        raise RatelError(f"{error.strerror}, so that this step cannot be committed", field="ssd", value=error.filename,
                         remedy="Leave the files of a run alone while it goes on; start anew, or resume from a copy") from error


def _joined(sums: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(sums) if sums else np.zeros(0, dtype=np.uint32)
