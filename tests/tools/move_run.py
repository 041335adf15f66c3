"""As kill_run.py, and between the starts of a run its directories are renamed, copied and moved to
another file system's place.

    python -m tests.tools.move_run DIRECTORY SEED NUM_KILLS [--json FILE]

What is tested besides: a moved run goes on where it stood, in its own SSD files; a copy goes on in
files of its own, to the same bits, and what it was made of is whole and goes on as if there had
been no copy; removing the copy removes nothing else.
"""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.tools.forks import STEPS, Ended, Setting, Site, check_clean, check_same, in_fork, newest_step
from tests.tools.kill_run import Killing, expect, started

DISPLACEMENTS = ("none", "rename", "rename the drives", "rename all", "copy", "go on in a copy", "a stale copy")


class Moving(Killing):
    def __init__(self, site: Site, seed: int) -> None:
        super().__init__(site, seed)
        self._moves, self._number = random.Random(f"moves {seed}"), 0
        self.displacements: dict[str, int] = {}
        self._stale: Path | None = None
        self._nobodys: set[str] = set()
        """SSD files of an original that is gone: its copy reads them, and they stay."""

    def _one_run(self, num_kills: int) -> None:
        super()._one_run(num_kills)
        for path in (*self._site.path.glob("out-*"), *self._site.path.glob("copy-*")):
            shutil.rmtree(path)

    def _displaced(self, out: Path, setting: Setting, lasting: int) -> tuple[Path, Setting]:
        if self._stale is not None:
            self._try_stale(self._stale, out, setting)
            self._stale = None
        if lasting:
            setting = self._found_by(out, setting)
        kind = self._moves.choice(DISPLACEMENTS) if lasting else "none"
        self.displacements[kind] = self.displacements.get(kind, 0) + 1
        if kind in ("rename the drives", "rename all"):
            setting = replace(setting, folders=self._renamed_drives(out, setting))
        if kind in ("rename", "rename all"):
            out = out.rename(self._new("out"))
        if kind == "copy":
            self._try_copy(out, setting, lasting)
        if kind == "go on in a copy":
            out = self._gone_on_in_a_copy(out, lasting)
        if kind == "a stale copy":
            self._stale = self._copied(out)
        return out, setting

    def _found_by(self, out: Path, setting: Setting) -> Setting:
        """A start that finds the SSD files: after drives were renamed it has to be given them."""
        if all(path.exists() for path in files_in_place(out, [])):
            return setting
        return replace(setting, folders=tuple(path.parent.name for path in files_in_place(out, self._folders())))

    def _check_end(self, out: Path, setting: Setting) -> None:
        check_same(out, self._wholes[setting.optimizer], self._folders())
        check_clean(self._site, out, setting, but=self._nobodys, folders=self._folders())

    def _new(self, name: str) -> Path:
        self._number += 1
        return self._site.path / f"{name}-{self._number}"

    def _copied(self, out: Path) -> Path:
        copy = self._new("copy")
        if self._moves.random() < 0.5:
            shutil.copytree(out, copy, symlinks=True)
        else:  # with the times of the files and of the directories
            expect(os.spawnlp(os.P_WAIT, "cp", "cp", "-a", os.fspath(out), os.fspath(copy)) == 0, "cp")
        return copy

    def _renamed_drives(self, out: Path, setting: Setting) -> tuple[str, ...]:
        """Rename some of the directories in which the state is; where it is on none, of those that
        the next start is given."""
        used = [path.parent.name for path in files_in_place(out, self._folders())] or [n for n in setting.folders if self._site.folder(n).is_dir()]
        renamed = []
        for name in used:
            self._number += 1
            renamed.append(f"{name.partition('-')[0]}-{self._number}")
            self._site.folder(name).rename(self._site.folder(renamed[-1]))
        return tuple(renamed) or setting.folders

    def _try_copy(self, out: Path, setting: Setting, lasting: int) -> None:
        """To its end, beside the original; then it is removed as `--overwrite` removes a run."""
        copy = self._copied(out)
        ended = self._train(copy, setting)
        expect(ended.status == 0 and (ended.last("resumed") == lasting or lasting == STEPS), f"the copy: {setting} {ended}")
        self._check(lambda: (check_same(copy, self._wholes[setting.optimizer], self._folders()), self._check_whole(copy), self._check_whole(out)))
        expect(newest_step(out) == lasting, "the original is at another step than before its copy")
        self._check(lambda: (drop(copy, self._folders()), self._check_whole(out)))
        shutil.rmtree(copy)

    def _gone_on_in_a_copy(self, out: Path, lasting: int) -> Path:
        """As a move to another file system, which copies and removes: the SSD files are read, and
        nobody's from now on."""
        copy = self._copied(out)
        if self._moves.random() < 0.5 and not files_in_place(out, []):
            self._check(lambda: drop(out, self._folders()))
        self._nobodys |= {path.name for path in files_in_place(copy, self._folders())}
        shutil.rmtree(out)
        expect(newest_step(copy) == lasting, "the copy is at another step")
        return copy

    def _try_stale(self, copy: Path, out: Path, setting: Setting) -> None:
        """The original has gone on and may have written over what the copy speaks of: then that is
        noticed, and nothing else."""
        step = newest_step(copy)
        ended = self._train(copy, setting)
        if ended.status == 0:
            self._check(lambda: check_same(copy, self._wholes[setting.optimizer], self._folders()))
        else:
            expect("is damaged" in ended.errors or "is not there" in ended.errors, f"a stale copy of step {step}: {ended}")
        if out.is_dir() and newest_step(out):
            self._check(lambda: (self._check_whole(out), drop(copy, self._folders()), self._check_whole(out)))
        else:
            self._check(lambda: drop(copy, self._folders()))
        shutil.rmtree(copy)

    def _train(self, out: Path, setting: Setting) -> Ended:
        return in_fork(lambda tell: self._site.train(out, setting, tell))

    def _check(self, act: Any) -> None:
        ended = in_fork(lambda tell: act())
        expect(ended.status == 0, ended.errors)

    def _check_whole(self, out: Path) -> None:
        from ratel.runtime.states.saved_state import SavedState
        from ratel.training.states import StateDirectory

        assert SavedState(StateDirectory(out / "state").newest(), self._folders()).verify() > 0

    def _folders(self) -> list[Path]:
        return sorted((self._site.path / "ssd").iterdir())

    def summary(self) -> dict[str, Any]:
        return {**super().summary(), "by_displacement": dict(sorted(self.displacements.items()))}


def files_in_place(out: Path, folders: list[Path]) -> list[Path]:
    from ratel.runtime.states.saved_state import SavedState
    from ratel.training.states import StateDirectory

    saved = SavedState(StateDirectory(out / "state").newest(), folders)
    return saved.files if saved.is_in_place else []


def drop(out: Path, folders: list[Path]) -> None:
    from ratel.training.states import StateDirectory

    StateDirectory(out / "state", folders).drop_all()


if __name__ == "__main__":
    started(Moving)
