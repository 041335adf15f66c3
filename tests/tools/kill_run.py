"""Kills training runs again and again, and resumes them. A process of its own, which the forks can
start from at once.

    python -m tests.tools.kill_run DIRECTORY SEED NUM_KILLS [--json FILE]

Prints one JSON object per kill; ends with status 1 at the first state that is lost or run that ends
otherwise. Each run is of one optimizer mode; where its states are, how they are made to last and
how often changes between its starts. Half of the kills come from outside at a random time, the
others from inside just before or after a file operation.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.tools.forks import Ended, Setting, Site, Tell, check_clean, check_same, in_fork, newest_step

KILLS_OF_A_RUN = 5
FILE_OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir")
"""What changes which state is there."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """Where a kill is to hit: after seconds, or at the ``count``-th operation of a kind (``files``,
    ``data``)."""

    kind: str
    after_s: float = 0.0
    count: int = 0
    is_after: bool = False


class Killing:
    def __init__(self, site: Site, seed: int) -> None:
        self._site, self._draw = site, random.Random(seed)
        self._wholes: dict[str, Path] = {}
        self._extent: dict[tuple[str, str], dict[str, float]] = {}
        self.kills: list[dict[str, Any]] = []
        self.runs = self.resumed = 0

    def measure(self) -> None:
        """The runs that nobody kills: what the others must equal, and how long they are."""
        for optimizer in ("eager", "deferred"):
            for durable in ("checkpoint", "step"):
                out = self._site.path / f"whole-{optimizer}-{durable}"
                setting = Setting(durable=durable, optimizer=optimizer)
                begun = time.perf_counter()
                ended = in_fork(lambda tell: self._counting(out, setting, tell))
                assert ended.status == 0, ended.errors
                self._site.remove_ssd()
                whole_s = time.perf_counter() - begun
                self._extent[durable, optimizer] = {"whole_s": whole_s, "train_s": float(ended.last("ms")) / 1e3,
                                                    "files": ended.last("files"), "data": ended.last("data")}
            self._wholes[optimizer] = self._site.path / f"whole-{optimizer}-checkpoint"

    def run(self, num_kills: int) -> None:
        while len(self.kills) < num_kills:
            self._one_run(min(KILLS_OF_A_RUN, num_kills - len(self.kills)))
            self.runs += 1

    def _one_run(self, num_kills: int) -> None:
        """Killed at most so often, then let go to its end."""
        out = self._site.path / "out"
        setting = Setting(durable=self._draw.choice(("step", "checkpoint")),
                          optimizer=self._draw.choice(("eager", "deferred")))
        lasting, killed = 0, 0
        while True:
            setting = self._vary(setting)
            out, setting = self._displaced(out, setting, lasting)
            aim = self._aim(setting) if killed < num_kills else Aim(kind="none")
            ended = self._start(out, setting, aim)
            expect(not ended.hung and ended.status in (0, -signal.SIGKILL), f"{setting} {aim}: {ended}")
            may_not_resume = lasting == 0 or ended.status != 0
            expect(ended.last("resumed") == lasting or (ended.last("resumed") is None and may_not_resume),
                   f"resumed at another step than {lasting}: {setting} {ended}")
            self.resumed += ended.last("resumed") is not None
            if ended.status == 0:
                break
            killed += 1
            told = max(ended.last("lasts") or 0, lasting)
            lasting = newest_step(out)
            self._note(setting, aim, ended, told, lasting)
            expect(lasting >= told, f"step {told} was durable, {lasting} is left: {setting} {aim} {ended}")
        compared = in_fork(lambda tell: self._check_end(out, setting))
        expect(compared.status == 0, f"{setting}: {compared.errors}")
        self._site.remove(out)

    def _check_end(self, out: Path, setting: Setting) -> None:
        check_same(out, self._wholes[setting.optimizer])
        check_clean(self._site, out, setting)

    def _displaced(self, out: Path, setting: Setting, lasting: int) -> tuple[Path, Setting]:
        """What becomes of the files between two starts: here nothing (move_run.py)."""
        return out, setting

    def _vary(self, setting: Setting) -> Setting:
        draw = self._draw
        setting = replace(setting, place=draw.choice(("ssd", "ssd", "mixed", "dram", "gpu", "gradients")))
        if setting.optimizer == "deferred":
            setting = replace(setting, speculates=draw.random() < 0.5)
        if draw.random() < 0.25:
            setting = replace(setting, save_every=4 - setting.save_every)
        if draw.random() < 0.2:
            setting = replace(setting, folders=draw.choice((("a",), ("a", "b"), ("c",))))
        if draw.random() < 0.15:
            setting = replace(setting, durable={"step": "checkpoint", "checkpoint": "step"}[setting.durable])
        return setting

    def _aim(self, setting: Setting) -> Aim:
        draw, extent = self._draw, self._extent[setting.durable, setting.optimizer]
        kind = draw.choice(("time", "training time", "files", "data"))
        if kind in ("files", "data"):
            return Aim(kind=kind, count=draw.randint(1, int(extent[kind])), is_after=draw.random() < 0.5)
        return Aim(kind=kind, after_s=draw.uniform(0, extent["whole_s" if kind == "time" else "train_s"]))

    def _start(self, out: Path, setting: Setting, aim: Aim) -> Ended:
        if aim.kind in ("time", "training time"):
            return in_fork(lambda tell: self._site.train(out, setting, tell), kill_after_s=aim.after_s,
                           counted_from="training" if aim.kind == "training time" else None)

        def act(tell: Tell) -> None:
            if aim.kind != "none":
                at_operations(aim.kind, lambda count, name, is_after: die(count, name, is_after, aim, tell))
            self._site.train(out, setting, tell)

        return in_fork(act)

    def _counting(self, out: Path, setting: Setting, tell: Tell) -> None:
        counts = {"files": 0, "data": 0}
        begun: list[float] = []
        for kind in counts:
            at_operations(kind, lambda count, name, is_after, kind=kind: counts.__setitem__(kind, count))

        def listen(subject: str, number: int) -> None:
            if subject == "training":
                begun.append(time.perf_counter())

        self._site.train(out, setting, listen)
        for subject, number in {**counts, "ms": int((time.perf_counter() - begun[0]) * 1e3)}.items():
            tell(subject, number)

    def _note(self, setting: Setting, aim: Aim, ended: Ended, told: int, left: int) -> None:
        asked, lasts = ended.last("saving"), ended.last("lasts")
        stage = ("before training" if not any(words[0] == "training" for words in ended.told) else
                 "while a state was being saved" if asked is not None and asked != lasts else "between saves")
        where = next((" ".join(words[1:]) for words in ended.told if words[0] == "dies"), "a random time")
        self.kills.append({"durable": setting.durable, "optimizer": setting.optimizer, "place": setting.place,
                           "save_every": setting.save_every, "folders": len(setting.folders), "where": where,
                           "stage": stage, "lasting_step": told, "resumes_after_step": left})
        print(json.dumps(self.kills[-1]), flush=True)

    def summary(self) -> dict[str, Any]:
        def count(key: str) -> dict[str, int]:
            return dict(sorted(Counter(str(kill[key]) for kill in self.kills).items()))

        both = Counter(f"{kill['durable']}, {kill['optimizer']}" for kill in self.kills)
        return {"kills": len(self.kills), "runs": self.runs, "resumed_starts": self.resumed,
                "durable_steps_lost": sum(k["resumes_after_step"] < k["lasting_step"] for k in self.kills),
                "runs_that_ended_otherwise": 0, "by_mode": dict(sorted(both.items())),
                **{f"by_{key}": count(key) for key in ("place", "save_every", "folders", "stage", "where")}}


def at_operations(kind: str, act: Callable[[int, str, bool], None]) -> None:
    """Call ``act(count, name, is_after)`` before and after each operation of the kind in this
    process."""
    import nvme_ds
    import ratel.native  # noqa: F401

    places = ([(os, name) for name in FILE_OPERATIONS] + [(nvme_ds.Volume, "sync")] if kind == "files" else
              [(nvme_ds.Engine, "submit_write")])
    lock, counted = threading.Lock(), [0]

    def wrapped(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with lock:
                counted[0] += 1
                count = counted[0]
            act(count, name, False)
            result = original(*args, **options)
            act(count, name, True)
            return result

        return call

    for owner, name in places:
        setattr(owner, name, wrapped(getattr(owner, name), name))


def die(count: int, name: str, is_after: bool, aim: Aim, tell: Tell) -> None:
    if count == aim.count and is_after == aim.is_after:
        tell("dies", "after" if is_after else "before", name)
        os.kill(os.getpid(), signal.SIGKILL)


def expect(holds: bool, message: str) -> None:
    if not holds:
        sys.exit(message)


def main(directory: Path, seed: int, num_kills: int, summary: Path | None, kind: type[Killing] = Killing) -> None:
    from tests.tools.results import write_results

    site = Site(directory)
    site.prepare()
    killing = kind(site, seed)
    killing.measure()
    killing.run(num_kills)
    if summary is not None:
        write_results(summary, "kills", {"seeds": [seed]}, killing.summary())


def started(kind: type[Killing] = Killing) -> None:
    """As this command was called."""
    to_json = Path(sys.argv[5]) if sys.argv[4:5] == ["--json"] else None
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), to_json, kind)


if __name__ == "__main__":
    started()
