"""The long proofs of durability on one commit, in as many processes as there are cores, within a
time.

    python -m tests.tools.proof_run DIRECTORY --json FILE [--seconds S] [--processes N] [--share F] [--only KIND,..] [--done FILE]

Fuzzed files, kills with copies and renames between them, power failures, and in the time that is
left interrupts at all lines. The file has the counts and every failure; DIRECTORY/results has what
each process found, and moments.json the interrupts that were tried: with ``--done`` a second call
goes on with the others. Ends with status 1 if anything failed or did not come to its end.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.tools import ROOT, command, environment

COUNTS = {"fuzz": 5000, "moves": 300, "power": 200}
"""Mutated files, kills, power failures."""
PARTS = {"fuzz": 10, "moves": 12, "power": 8}
"""Processes that share them, each with a seed of its own."""
SEEDS = {"fuzz": 70000, "moves": 1200, "power": 1600}
SCRIPTS = {"fuzz": "fuzz_run", "moves": "move_run", "power": "power_run"}
FORMS = ("command", "library")
STARTUP_S, SHUTDOWN_S = 30.0, 15.0
"""Seconds for the start of a process, and for an interrupt that is being tried when time is up."""
NOT_BEGUN = 75


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process: the words after the interpreter's."""

    kind: str
    index: int
    words: tuple[str, ...]
    seed: int = 0
    is_as_long_as_time: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.index}"


@dataclass(frozen=True, kw_only=True)
class Ran:
    part: Part
    status: int
    found: dict[str, Any]
    output: str


class Proofs:
    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._directory = args, args.directory.resolve()
        self._begun_s = time.monotonic()
        self._results = self._directory / "results"
        self._results.mkdir(parents=True)

    def run(self) -> dict[str, Any]:
        with ThreadPoolExecutor(self._args.processes) as pool:
            ran = list(pool.map(self._run_part, self._parts()))
        tried = sorted(name for one in ran for name in one.found.get("tried", []))
        (self._results / "moments.json").write_text(json.dumps(tried))
        return self._summary(ran)

    def _parts(self) -> Iterator[Part]:
        kinds = self._args.only.split(",")
        yield from (part for kind in SCRIPTS if kind in kinds for part in self._counted(kind))
        for form in FORMS if "interrupts" in kinds else ():
            yield from self._interrupting(form)

    def _counted(self, kind: str) -> Iterator[Part]:
        each = max(1, round(COUNTS[kind] * self._args.share / PARTS[kind]))
        for index in range(PARTS[kind]):
            seed = SEEDS[kind] + index * (each if kind == "fuzz" else 1)
            numbers = ("--seed", str(seed), "--cases", str(each)) if kind == "fuzz" else (str(seed), str(each))
            yield Part(kind=kind, index=index, seed=seed, words=(SCRIPTS[kind], str(self._place(kind, index)), *numbers))

    def _interrupting(self, form: str) -> Iterator[Part]:
        parts = self._args.processes // 2
        every = max(1, round(1 / self._args.share))
        done = ("--done", str(self._args.done)) if self._args.done else ()
        for index in range(parts):
            words = ("interrupt_run", str(self._place(form, index)), form, "--part", f"{index}/{parts}", "--every", str(every), *done)
            yield Part(kind=form, index=index, words=words, is_as_long_as_time=True)

    def _place(self, kind: str, index: int) -> Path:
        return self._directory / f"{kind}-{index}"

    def _run_part(self, part: Part) -> Ran:
        left_s = self._args.seconds - (time.monotonic() - self._begun_s)
        if left_s < STARTUP_S:
            return Ran(part=part, status=NOT_BEGUN, found={}, output="there was no time for it")
        file = self._results / f"{part.name}.json"
        more = ["--seconds", str(max(0.0, left_s - SHUTDOWN_S))] if part.is_as_long_as_time else []
        status, output = self._run_words([*part.words, *more, "--json", str(file)], left_s)
        (self._results / f"{part.name}.log").write_text(output)
        found = json.loads(file.read_text()) if file.exists() else {}
        shutil.rmtree(self._place(part.kind, part.index), ignore_errors=True)
        return Ran(part=part, status=status, found=found, output=output)

    def _run_words(self, words: list[str], left_s: float) -> tuple[int, str]:
        """Ended when its time is up: then its status is that of a kill."""
        Path(words[1]).mkdir(parents=True, exist_ok=True)
        with subprocess.Popen(command(*words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              start_new_session=True, env={**environment(), "OMP_NUM_THREADS": "1"}) as running:
            try:
                output, _ = running.communicate(timeout=None if math.isinf(left_s) else left_s)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)  # a session of its own: its forks go too
                output, _ = running.communicate()
        return running.returncode, output

    def _summary(self, ran: list[Ran]) -> dict[str, Any]:
        ended = {kind: [one for one in ran if one.part.kind == kind] for kind in dict.fromkeys(one.part.kind for one in ran)}
        return {"seconds": round(time.monotonic() - self._begun_s), **{kind: _sums(kind, of_kind) for kind, of_kind in ended.items()},
                "failed": [{"part": one.part.name, "status": one.status, "output": one.output[-3000:]} for one in ran if one.status]}


def _sums(kind: str, ran: list[Ran]) -> dict[str, Any]:
    found = [one.found for one in ran]
    if kind in FORMS:
        return {"moments": sum(one.get("moments", 0) for one in found), "tried": sum(len(one.get("tried", [])) for one in found),
                "came": sum(one.get("came", 0) for one in found), "problems": [problem for one in found for problem in one.get("problems", [])]}
    if kind == "fuzz":
        return {"seeds": [one.part.seed for one in ran], "cases": sum(one.get("done", 0) for one in found), "ends": _added(one.get("ends", {}) for one in found),
                "failures": [failure for one in found for failure in one.get("failures", [])]}
    return {"seeds": [one.part.seed for one in ran], **_added(one.get("results", {}) for one in found)}


def _added(counts: Any) -> dict[str, Any]:
    """Sums, key by key."""
    sums: dict[str, Any] = {}
    for count in counts:
        for key, value in count.items():
            sums[key] = dict(Counter(sums.get(key, {})) + Counter(value)) if isinstance(value, dict) else sums.get(key, 0) + value
    return sums


def _with_machine(results: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    from ratel.hardware.host import describe_host

    host = describe_host()
    command = f"python -m tests.tools.proof_run DIRECTORY --json FILE --seconds {args.seconds:g} --processes {args.processes} --share {args.share:g}"
    return {"benchmark": "proofs", "command": f"{command} --only {args.only}", "commit": args.commit or _commit(),
            "machine": {**{key: host[key] for key in ("os", "cpu", "python")}, "cores": os.cpu_count()}, "results": results}


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a new one; a RAM disk is fastest")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end all processes after so long")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--share", type=float, default=1.0, help="of each count, a part of this size: 0.01 to try it out")
    parser.add_argument("--only", default="fuzz,moves,power,interrupts", help="kinds")
    parser.add_argument("--done", type=Path, help="moments.json of a call before")
    parser.add_argument("--commit", help="of a tree without its history")
    args = parser.parse_args()
    results = Proofs(args).run()
    args.json.write_text(json.dumps(_with_machine(results, args), indent=1) + "\n")
    print(json.dumps(results)[:3000])
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
