"""Power failures without a switch: what a run had not synced is taken off the disk, and what it
said must be there all the same.

    python -m tests.tools.power_run DIRECTORY SEED NUM_FAILURES [--json FILE]

A child trains while a record is kept of what is on the platter: a file's bytes as of its last sync,
a directory's names as of its own. It ends before or after one of its operations on files, at
random, and from the record disks are rebuilt as file systems may leave them. A step that was told
to last, and a model that was told to be exported, are on each of them, to the last bit.
"""

import json
import os
import pickle
import random
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from tests.tools.forks import PLACES, Ended, Setting, Site, Tell, after, before, in_fork, newest_step
from tests.tools.kill_run import expect

PAGE_BYTES = 4096
DIED = 0
"""The status of a child whose power failed: nothing has gone wrong."""
FEW_OPERATIONS = 60
"""As many as any run has. From each one it is learned how many there are in one of its setting."""
Key = tuple[int, int]


@dataclass
class Node:
    """What is known of a file, or of a directory."""

    is_directory: bool
    content: bytes = b""
    names: dict[str, int] = field(default_factory=dict)


class Platter:
    """``numbers`` has a number of its own for every file and directory there ever was, as inodes
    are used again."""

    def __init__(self, root: Path, fails_at: int, tell: Tell) -> None:
        self.root, self._fails_at, self._tell = root, fails_at, tell
        self._numbers: dict[Key, int] = {}
        self._synced: dict[int, Node] = {}
        self.count, self._next, self.last = 0, 0, "the end"
        for folder, _, names in os.walk(root):
            self.sync(Path(folder))
            for name in names:
                self.sync(Path(folder, name))

    def number(self, found: os.stat_result) -> int:
        key = (found.st_dev, found.st_ino)
        if key not in self._numbers:
            self._next += 1
            self._numbers[key] = self._next
        return self._numbers[key]

    def forget(self, found: "os.stat_result | None") -> None:
        if found is not None:
            self._numbers.pop((found.st_dev, found.st_ino), None)

    def sync(self, path: Path) -> None:
        found = os.lstat(path)
        self._synced[self.number(found)] = self._node(path)

    def _node(self, path: Path) -> Node:
        if not path.is_dir():
            return Node(is_directory=False, content=path.read_bytes())
        return Node(is_directory=True, names={entry.name: self.number(entry.stat(follow_symlinks=False)) for entry in os.scandir(path)})

    def operation(self, what: str) -> None:
        self.count += 1
        if self.count == self._fails_at:
            self.last = what
            self.fail()

    def fail(self) -> None:
        self._tell("operations", self.count)  # what other threads tell from here on may be of later than what is seen
        seen: dict[int, Node] = {}
        for folder, _, names in os.walk(self.root):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                seen[self.number(os.lstat(path))] = self._node(path)
        content = (self.number(os.lstat(self.root)), self._synced, seen, self.last)
        (self.root.parent / "platter").write_bytes(pickle.dumps(content))
        os._exit(DIED)

    def watch(self) -> None:
        """From now on, in this process."""
        import nvme_ds

        real_sync, real_volume_sync = os.fsync, nvme_ds.Volume.sync

        def fsync(file: Any) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
            self._around(f"fsync {path.name}", path, lambda: real_sync(file), lambda: self.sync(path))

        def volume_sync(volume: Any) -> None:
            self._around("volume sync", self.root, lambda: real_volume_sync(volume), lambda: [self.sync(Path(p)) for p in volume.paths])

        os.fsync, nvme_ds.Volume.sync = fsync, volume_sync
        for name in ("rename", "replace"):
            setattr(os, name, self._moving(getattr(os, name), name))
        for name in ("unlink", "remove", "rmdir"):
            setattr(os, name, self._removing(getattr(os, name), name))

    def _around(self, what: str, path: Path, act: Callable[[], Any], then: Callable[[], Any]) -> None:
        is_inside = path.is_relative_to(self.root)
        if is_inside:
            self.operation(f"before {what}")
        act()
        if is_inside:
            then()
            self.operation(f"after {what}")

    def _moving(self, real: Callable[..., None], name: str) -> Callable[..., None]:
        def move(source: Any, target: Any, **options: Any) -> None:
            replaced = _status(target)
            self._around(f"{name} {Path(source).name}", Path(os.path.abspath(target)), lambda: real(source, target, **options),
                         lambda: self.forget(replaced))

        return move

    def _removing(self, real: Callable[..., None], name: str) -> Callable[..., None]:
        def remove(path: Any, *, dir_fd: int | None = None) -> None:
            whole = Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else Path(os.path.abspath(path))
            gone = _status(whole)
            self._around(f"{name} {whole.name}", whole, lambda: real(path, dir_fd=dir_fd),
                         lambda: self.forget(gone if gone is not None and (name == "rmdir" or gone.st_nlink == 1) else None))

        return remove


def _status(path: Any) -> "os.stat_result | None":
    try:
        return os.lstat(path)
    except OSError:
        return None


DISKS = {"nothing unsynced": (False, "synced"), "names in order": (True, "synced"), "data before names": (False, "seen"),
         "some pages": (True, "pages")}
"""By name, whether directories are as they were seen last, and what is in files: a journal may keep
the order of names, write data early, or get to some pages of it."""


def rebuild(root: Path, platter: tuple[int, dict[int, Node], dict[int, Node], str], disk: str, draw: random.Random) -> None:
    top, synced, seen, _ = platter
    as_seen, data = DISKS[disk]

    def content(number: int) -> bytes:
        new, old = seen.get(number), synced.get(number)
        if data == "seen" and new is not None:
            return new.content
        kept = old.content if old is not None else bytes(len(new.content) if new is not None else 0)
        return _mixed(kept, new.content, draw) if data == "pages" and new is not None else kept

    def make(number: int, path: Path) -> None:
        path.mkdir(parents=True)
        names = (seen if as_seen else synced).get(number, Node(is_directory=True)).names
        for name, child in names.items():
            node = seen.get(child) or synced.get(child)
            if node is not None and node.is_directory:
                make(child, path / name)
            else:
                (path / name).write_bytes(content(child))

    rmtree(root)
    make(top, root)


def _mixed(old: bytes, new: bytes, draw: random.Random) -> bytes:
    result = bytearray(new)
    for at in range(0, len(new), PAGE_BYTES):
        if draw.random() < 0.5:
            result[at : at + PAGE_BYTES] = old[at : at + PAGE_BYTES].ljust(len(new[at : at + PAGE_BYTES]), b"\0")
    return bytes(result)


def model_in(out: Path) -> int:
    """A checksum over the exported model; 0 where there is none."""
    folder = out / "model"
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    crc = 0
    for path in files:
        crc = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), crc))
    return crc if files else 0


class Failing:
    def __init__(self, site: Site, seed: int) -> None:
        self._site, self._draw = site, random.Random(seed)
        self._root = site.path / "disk"
        self._disk_site = Site(site.path)
        self._disk_site.folder = lambda name: self._root / "ssd" / name
        self._extents: dict[tuple[Setting, bool], int] = {}
        self.disks: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def run(self, num_failures: int) -> None:
        for number in range(num_failures):
            setting = Setting(durable=("step", "checkpoint")[number % 2], optimizer="deferred",
                              place=self._draw.choice(sorted(PLACES.keys() - {"gradients"})), save_every=self._draw.choice((1, 3)))
            self._one(setting, exported_before=number % 3 == 2, at_the_end=number % 5 == 4)

    def _one(self, setting: Setting, *, exported_before: bool, at_the_end: bool) -> None:
        rmtree(self._root, ignore_errors=True)
        self._root.mkdir()
        out, told = self._root / "out", []
        if exported_before:
            told.append(self._train(out, setting, steps=3, fails_at=0))
        key = (setting, exported_before)
        extent = self._extents.get(key, FEW_OPERATIONS)
        fails_at = 0 if at_the_end else self._draw.randint(1, extent)
        told.append(self._train(out, setting, steps=6, fails_at=fails_at))
        self._extents[key] = max(extent, told[-1].last("operations"))
        platter = pickle.loads((self._site.path / "platter").read_bytes())
        self.failures[platter[3].split()[0]] += 1
        for disk in DISKS:
            rebuild(self._root, platter, disk, self._draw)
            self.disks[disk] += 1
            checked = in_fork(lambda tell: self._check(out, told))
            expect(checked.status == 0, f"{disk}, {platter[3]}: {setting} {told}: {checked.errors}")

    def check_itself(self) -> None:
        """Without the syncs of an export, or of a commit's records, losses are found."""
        setting = Setting(durable="step", optimizer="deferred")
        for name in ("export", "save_targets"):
            rmtree(self._root, ignore_errors=True)
            self._root.mkdir()
            told = [self._train(self._root / "out", setting, steps=2, fails_at=0, without=name)]
            platter = pickle.loads((self._site.path / "platter").read_bytes())
            rebuild(self._root, platter, "names in order", self._draw)
            expect(in_fork(lambda tell: self._check(self._root / "out", told)).status != 0, f"{name} needs no sync?")

    def _train(self, out: Path, setting: Setting, *, steps: int, fails_at: int, without: str = "") -> Ended:
        def act(tell: Tell) -> None:
            from ratel.runtime.states import export
            from ratel.runtime.states import targets as save_targets
            from ratel.runtime.session.session import Session

            if without == "export":
                export.sync_tree = lambda path: None
            if without == "save_targets":
                save_targets.write_synced = lambda path, content: path.write_bytes(content)

            platter = Platter(self._root, fails_at, tell)
            before(Session, "export", lambda *unused: tell("exporting", 0))
            after(Session, "export", lambda *unused: tell("exported", model_in(out)))
            platter.watch()
            self._disk_site.train(out, setting, tell, steps=steps)
            platter.fail()

        ended = in_fork(act)
        expect(ended.status == DIED and not ended.hung, f"{setting}: {ended}")
        until = next(index for index, words in enumerate(ended.told) if words[0] == "operations")
        return replace(ended, told=ended.told[: until + 1])

    def _check(self, out: Path, told: list[Ended]) -> None:
        from ratel.runtime.states.saved_state import SavedState
        from ratel.training.states import StateDirectory

        lasting = max([ended.last("lasts") or 0 for ended in told])
        if lasting:
            assert newest_step(out) >= lasting, f"step {lasting} was durable, {newest_step(out)} is left"
            SavedState(StateDirectory(out / "state").newest()).verify()
            json.loads((out / "config.json").read_text())
        exported = [ended.last("exported") for ended in told if ended.last("exported") is not None]
        if exported and told[-1].last("exporting") is not None and told[-1].last("exported") is None:
            waiting = out / "model.replaced"  # between its two names: the next export goes on there
            assert model_in(out) or waiting.is_dir(), "the model of before is gone"
        elif exported:
            assert model_in(out) == exported[-1], f"of {exported}, {model_in(out)} is there"

    def summary(self) -> dict[str, Any]:
        return {"disks": sum(self.disks.values()), "by_disk": dict(self.disks), "by_moment": dict(self.failures), "lost": 0}


def main(directory: Path, seed: int, num_failures: int, summary: Path | None) -> None:
    from tests.tools.results import write_results

    site = Site(directory)
    site.prepare()
    failing = Failing(site, seed)
    failing.check_itself()
    failing.run(num_failures)
    print(json.dumps(failing.summary()))
    if summary is not None:
        write_results(summary, "power failures", {"seeds": [seed]}, failing.summary())


if __name__ == "__main__":
    to_json = Path(sys.argv[5]) if sys.argv[4:5] == ["--json"] else None
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), to_json)
