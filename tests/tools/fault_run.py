"""Runs with one fault of the I/O engine each, and what becomes of them. A process of its own, as
kill_run.py.

    python -m tests.tools.fault_run DIRECTORY SEED NUM_FAULTS [--json FILE]

A fault may be harmless: the run ends, with the right result. Or the run ends with an error that
says what failed where; then it is resumed without the fault, from the newest state, or, where that
is what was damaged, as the message says. In the end the result is that of a run without faults, to
the last bit. Anything else ends this program with status 1.
"""

import json
import os
import random
import re
import shutil
import sys
import threading
from collections import Counter
from dataclasses import dataclass, replace
from errno import EIO, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any

from tests.tools.forks import PLACES, Ended, Setting, Site, Tell, check_clean, check_same, in_fork, newest_step
from tests.support.patience import patience
from tests.tools.kill_run import expect

FAULTS_OF_A_RUN = 3
MOST_STARTS = 12
"""The most starts of one run, in which a fault is passed and a state is taken up again: far more
than it takes."""
FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "read fails": ("read", dict(fail_op="read", errno=EIO), "Input/output error"),
    "write fails": ("write", dict(fail_op="write", errno=EIO), "Input/output error"),
    "disk is full": ("write", dict(fail_op="write", errno=ENOSPC), "No space left on device"),
    "sync fails": ("sync", dict(fail_op="sync", errno=EIO), "Input/output error"),
    "read has a flipped bit": ("read", dict(flip_op="read", flip_count=1), "checksum"),
    "write has a flipped bit": ("write", dict(flip_op="write", flip_count=1), "checksum"),
    "write is torn": ("write", dict(torn_count=1), "checksum"),
    "transfers are short": ("read", dict(short_transfers=True), ""),
    "answers are late": ("write", dict(max_delay_us=3000), ""),
    "device is silent": ("", dict(stall_op="any"), "the device does not answer"),
}
"""By name: the operation before which it is armed, the arguments of `Engine.inject`, and what its
error must say."""
SILENT_AFTER_S = patience(0.5)
"""Instead of two minutes; a sync on a busy machine does take more than half a second."""
IN_THE_FILE = ("write has a flipped bit", "write is torn")
"""What is found when the bytes are read again, and again."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    name: str
    request: str
    """Which transfers it is aimed at: operation and what is transferred."""
    count: int
    """The first of these that may be hit."""


class Faulting:
    def __init__(self, site: Site, seed: int) -> None:
        self._site, self._draw = site, random.Random(seed)
        self._wholes: dict[str, Path] = {}
        self._requests: dict[tuple[str, str], dict[str, int]] = {}
        self.faults: list[dict[str, str]] = []
        self.runs = 0

    def run(self, num_faults: int) -> None:
        for optimizer in ("eager", "deferred"):
            self._wholes[optimizer] = self._site.path / f"whole-{optimizer}"
            self._count_requests(self._wholes[optimizer], Setting(durable="checkpoint", optimizer=optimizer,
                                                                  checkpoint_tier="ssd"))
        while len(self.faults) < num_faults:
            self._one_run(min(FAULTS_OF_A_RUN, num_faults - len(self.faults)))
            self.runs += 1

    def _one_run(self, num_faults: int) -> None:
        draw, out = self._draw, self._site.path / "out"
        mode = draw.choice(("eager", "deferred", "speculative"))
        setting = Setting(durable=draw.choice(("step", "checkpoint")), optimizer="eager" if mode == "eager" else "deferred",
                          speculates=mode == "speculative", place=draw.choice(list(PLACES)), save_every=draw.choice((1, 3)),
                          checkpoint_tier=draw.choice(("gpu", "ssd")))
        ended, lasting, before = None, 0, len(self.faults)
        for _ in range(MOST_STARTS):
            fault = self._choose(setting) if len(self.faults) - before < num_faults else None
            ended = in_fork(lambda tell: self._train(out, setting, fault, tell))
            expect(not ended.hung, f"hangs: {setting} {fault} {ended}")
            is_armed = any(words[0] == "armed" for words in ended.told)
            if is_armed:
                self._note(setting, fault, ended)
            if ended.status == 0:
                break
            told = max(ended.last("lasts") or 0, lasting)
            lasting = self._look_at_error(out, setting, fault if is_armed else None, ended, told)
        expect(ended.status == 0, f"does not get on: {setting} {ended}")
        self._compare(out, setting)
        self._site.remove(out)

    def _look_at_error(self, out: Path, setting: Setting, fault: Fault | None, ended: Ended, told: int) -> int:
        """Returns the step after which the run goes on."""
        message = ended.errors.strip().splitlines()[-1]
        expect(re.match(r"(ratel|nvme_ds)\.[\w.]*(Worker|Ratel|Io|Stall|Damaged)Error: ", message) is not None,
               f"not an error that says what happened: {setting} {fault} {ended.errors}")
        was_in_file = any(entry["fault"] in IN_THE_FILE for entry in self.faults[-FAULTS_OF_A_RUN:])
        wanted = FAULTS[fault.name][2] if fault is not None else "checksum"
        expect(wanted != "" and (wanted in message or (was_in_file and "checksum" in message)),
               f"does not say what failed: {setting} {fault} {ended.errors}")
        expect("/" in message, f"does not say where: {message}")
        if fault is None:
            expect(was_in_file, f"damage from nowhere: {setting} {ended.errors}")
            return self._go_back(out, message)
        left = newest_step(out)
        expect(left >= told, f"step {told} was durable, {left} is left: {setting} {fault} {ended}")
        return left

    def _go_back(self, out: Path, message: str) -> int:
        """Where bytes on the drive are wrong, the message says what to do."""
        self.faults[-1]["outcome"] = "damage on the drive found; went back as the message says"
        remove = re.search(r"Remove (\S+) to resume from (\S+?),? ", message)
        if remove:
            expect(Path(remove[2]).is_dir(), message)
            shutil.rmtree(remove[1])
        else:
            expect("start anew with --overwrite" in message, message)
            shutil.rmtree(out / "state")
        return newest_step(out)

    def _compare(self, out: Path, setting: Setting) -> None:
        compared = in_fork(lambda tell: (check_same(out, self._wholes[setting.optimizer]),
                                         check_clean(self._site, out, setting)))
        if compared.status == 0:
            return
        damaged = "DamagedStateError: " in compared.errors and "checksum" in compared.errors
        in_file = [entry for entry in self.faults[-FAULTS_OF_A_RUN:] if entry["fault"] in IN_THE_FILE]
        expect(damaged and bool(in_file), f"{setting}: {compared.errors}")
        in_file[-1]["outcome"] = "damage on the drive found when the last state was read"

    def _choose(self, setting: Setting) -> Fault:
        key = setting.durable, setting.place
        if key not in self._requests:
            other = self._site.path / "counted"
            self._count_requests(other, replace(setting, save_every=1, checkpoint_tier="ssd"))
            self._site.remove(other)
        counts = self._requests[key]
        idle = {"gpu": "activations"}.get(setting.checkpoint_tier), {"eager": "gradients"}.get(setting.optimizer)
        requests = sorted(request for request in counts if request.split()[1] not in idle)
        turn = len(self.faults) % len(FAULTS)  # each kind in its turn, but for what this run does not do
        for name in [*FAULTS][turn:] + [*FAULTS][:turn]:
            fitting = [request for request in requests if request.startswith(FAULTS[name][0])]
            if fitting:
                break
        request = self._draw.choice(fitting)
        saves_less = setting.save_every if request.split()[1] in ("commit", "copy") or name == "sync fails" else 1
        return Fault(name=name, request=request, count=self._draw.randint(1, max(1, counts[request] // saves_less)))

    def _count_requests(self, out: Path, setting: Setting) -> None:
        counts: Counter[str] = Counter()

        def train(tell: Tell) -> None:
            at_requests(lambda engine, request, count: counts.__setitem__(request, count))
            self._site.train(out, setting, lambda *unused: None)
            tell("requests", json.dumps(counts, separators=(",", ":")).replace(" ", "_"))

        ended = in_fork(train)
        expect(ended.status == 0, f"{setting}: {ended.errors}")
        found = json.loads(next(words[1] for words in ended.told if words[0] == "requests"))
        requests = {request.replace("_", " "): count for request, count in found.items()}
        self._requests[setting.durable, setting.place] = requests

    def _train(self, out: Path, setting: Setting, fault: Fault | None, tell: Tell) -> None:
        import nvme_ds

        lock, is_armed = threading.Lock(), []

        def arm(engine: Any, request: str, count: int) -> None:
            with lock:
                if request == fault.request and count >= fault.count and not is_armed:
                    is_armed.append(True)
                    engine.inject(seed=count, **FAULTS[fault.name][1])
                    tell("armed", count)

        if fault is not None:
            at_requests(arm)
            nvme_ds.Engine = partial(nvme_ds.Engine, stall_timeout_s=SILENT_AFTER_S)
        self._site.train(out, setting, tell)

    def _note(self, setting: Setting, fault: Fault, ended: Ended) -> None:
        outcome = "harmless" if ended.status == 0 else "the run ended with an error that says where; it was resumed"
        self.faults.append({"fault": fault.name, "request": fault.request, "durable": setting.durable,
                            "optimizer": "speculative" if setting.speculates else setting.optimizer, "place": setting.place, "outcome": outcome})
        print(json.dumps({**self.faults[-1], "error": ended.errors.strip().splitlines()[-1] if ended.status else None}),
              flush=True)

    def summary(self) -> dict[str, Any]:
        def count(*keys: str) -> dict[str, int]:
            return dict(sorted(Counter(", ".join(entry[key] for key in keys) for entry in self.faults).items()))

        return {"faults": len(self.faults), "runs": self.runs, "silent": 0, "hanging": 0, "durable_steps_lost": 0,
                "by_mode": count("durable", "optimizer"), "by_fault": count("fault"), "by_request": count("request"),
                "by_place": count("place"), "by_fault_and_outcome": count("fault", "outcome")}


def at_requests(act: Any) -> None:
    """In a child: call ``act(engine, request, count)`` before every transfer and sync; ``count`` is
    of that request."""
    import nvme_ds

    lock, counts = threading.Lock(), Counter()

    def noted(engine: Any, operation: str, volume: Any, priority: int) -> None:
        what = next(name for part, name in _VOLUMES.items() if part in os.path.basename(volume.paths[0]))
        if what == "states" and priority == nvme_ds.BACKGROUND and operation == "write":
            what = "commit"
        with lock:
            counts[f"{operation} {what}"] += 1
            count = counts[f"{operation} {what}"]
        act(engine, f"{operation} {what}", count)

    def transfer(name: str) -> None:
        original = getattr(nvme_ds.Engine, f"submit_{name}")

        def submit(engine: Any, volume: Any, offset: int, address: int, num_bytes: int, priority: int) -> int:
            noted(engine, name, volume, priority)
            return original(engine, volume, offset, address, num_bytes, priority)

        setattr(nvme_ds.Engine, f"submit_{name}", submit)

    transfer("read")
    transfer("write")
    original_sync = nvme_ds.Volume.sync

    def sync(volume: Any) -> None:
        noted(volume._engine, "sync", volume, nvme_ds.BACKGROUND)
        original_sync(volume)

    nvme_ds.Volume.sync = sync


_VOLUMES = {"ratel-gradients": "gradients", "ratel-activations": "activations", "partial.planes": "copy",
            "ratel-": "states"}
"""What is transferred, by a part of the file's name."""


def main(directory: Path, seed: int, num_faults: int, summary: Path | None) -> None:
    from tests.tools.results import write_results

    site = Site(directory)
    site.prepare()
    faulting = Faulting(site, seed)
    faulting.run(num_faults)
    if summary is not None:
        write_results(summary, "faults", {"seeds": [seed]}, faulting.summary())


if __name__ == "__main__":
    to_json = Path(sys.argv[5]) if sys.argv[4:5] == ["--json"] else None
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), to_json)
