"""Changes one place of the source after the other, and asks whether a test fails.

    python -m tests.tools.mutation_run learn FILE [PYTEST ARGUMENTS]
    python -m tests.tools.mutation_run run FILE [--paths ratel/store ...] [--sample N] [--seed N] [--processes N] [--json FILE]

``learn`` runs the tests under coverage (`pip install coverage`) and notes which of them come to
which lines. ``run`` takes a sample of mutants (mutants.py), each in a copy of the tree, and gives
it the tests that come to its line, the quickest first, in a fork of a process that has imported
PyTorch and transformers. A mutant survives if they pass. One whose tests compute for much longer
than without it, or wait and compute nothing at all, is noticed as well. Prints one JSON object per
survivor, and one with the sums.
"""

import argparse
import compileall
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.support.tools import ROOT
from tests.tools.mutants import Mutant, mutants

PATHS = ("ratel/store", "ratel/memory", "ratel/runtime/streams", "ratel/runtime/updates")
ELSEWHERE = ("gpu_adamw.py", "gpu_adamw_kernel.py", "context_ahead.py")
"""What a CPU does not run."""
ENOUGH_S = 15.0
"""Processor time of the tests that a mutant is given: the quickest ones that come to its line."""
SILENT_S, SILENT_SHARE = 40.0, 0.01
"""A hang: for so long, no more than this share of a processor was used."""


# --- which tests come to which lines ----------------------------------------------------------------------------------


class Learning:
    """A plugin of pytest: one context of coverage for each test."""

    def __init__(self) -> None:
        import coverage

        self.coverage = coverage.Coverage(data_file=None, include=[f"{ROOT / path}/*" for path in PATHS], config_file=False)
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        self._begun_s = time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = time.process_time() - self._begun_s

    def lines(self) -> dict[str, dict[int, list[str]]]:
        data, found = self.coverage.get_data(), {}
        for file in data.measured_files():
            contexts = data.contexts_by_lineno(file)
            found[os.path.relpath(file, ROOT)] = {line: [name for name in names if name in self.seconds] for line, names in contexts.items()}
        return found


def learn(file: Path, arguments: list[str]) -> int:
    import pytest

    learning = Learning()
    learning.coverage.start()
    learning.coverage.switch_context("imports")
    status = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[learning])
    learning.coverage.stop()
    file.write_text(json.dumps({"lines": learning.lines(), "seconds": learning.seconds}))
    return int(status)


# --- one mutant -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    file: str
    mutant: Mutant
    tests: int
    outcome: str
    """survived, failed, computes on, hangs, crashed, or: not reached by any test."""

    def to_json(self) -> dict[str, Any]:
        shown = {key: value for key, value in asdict(self.mutant).items() if key not in ("begin", "end")}
        return {"file": self.file, **shown, "tests": self.tests, "outcome": self.outcome}


class Copy:
    """A copy of the tree, and a process that has imported what is large and forks for every list of
    tests."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "tree"
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".pytest_cache"))
        environment = {**os.environ, "PYTHONPATH": str(self.root), "RATEL_TEST_PATIENCE": "2"}
        compileall.compile_dir(self.root / "ratel", quiet=2)
        self._server = subprocess.Popen([sys.executable, "-m", __spec__.name, "serve"], cwd=self.root, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def prepare(self, tests: list[str]) -> None:
        """What pytest makes of the files of these tests is kept for the others."""
        self.outcome(["--collect-only", *tests], 1000, keeps_bytecode=True)

    def outcome(self, tests: list[str], limit_s: float, *, keeps_bytecode: bool = False) -> str:
        self._server.stdin.write(json.dumps({"tests": tests, "limit_s": limit_s, "keeps_bytecode": keeps_bytecode}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def outcome_with(self, file: str, mutant: Mutant, tests: list[str], limit_s: float) -> str:
        path = self.root / file
        source, times = path.read_bytes(), path.stat()
        path.write_bytes(mutant.applied(source))
        try:
            return self.outcome(tests, limit_s)
        finally:
            path.write_bytes(source)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # of what was compiled

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


def serve() -> int:
    import numpy, pytest, torch, transformers  # noqa: E401, F401
    from transformers import LlamaForCausalLM, MixtralForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    answers, sys.stdout = os.dup(1), sys.stderr
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.dont_write_bytecode = not request["keeps_bytecode"]
            _be_tested(request["tests"], request["limit_s"])
        os.write(answers, (json.dumps(_watched(child)) + "\n").encode())
    return 0


def _be_tested(tests: list[str], limit_s: float) -> None:
    import resource

    import pytest

    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 5))
    status = 1
    try:
        status = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    finally:
        os._exit(status)


def _watched(child: int) -> str:
    """Until it has ended, or computes nothing; whatever it has started ends with it."""
    seen_s, since_s = 0.0, time.monotonic()
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.05)
        used_s = _processor_seconds(child)
        if used_s - seen_s > SILENT_SHARE * (time.monotonic() - since_s):
            if time.monotonic() - since_s > 1:
                seen_s, since_s = used_s, time.monotonic()
        elif time.monotonic() - since_s > SILENT_S:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs"
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return _meaning(os.waitstatus_to_exitcode(ended[1]))


def _processor_seconds(leader: int) -> float:
    """Seconds of processor time of all processes of its session."""
    ticks = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += sum(map(int, fields[11:15])) if int(fields[3]) == leader else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def _meaning(status: int) -> str:
    """pytest: 0 all passed, 1 some failed, 2 could not be imported, 4 and 5 no such test."""
    named = {0: "survived", 1: "failed", 2: "failed", -signal.SIGXCPU: "computes on", -signal.SIGKILL: "computes on"}
    return named.get(status, "no such tests" if status in (4, 5) else "crashed")


# --- all of them ------------------------------------------------------------------------------------------------------


class Run:
    def __init__(self, learned: dict[str, Any], args: argparse.Namespace) -> None:
        self._lines, self._seconds, self._args = learned["lines"], learned["seconds"], args
        self._passes: dict[str, bool] = {}

    def sample(self) -> list[tuple[str, Mutant]]:
        """The same share of each file's, in an order of which any beginning is a sample."""
        files = sorted(file for path in self._args.paths for file in (ROOT / path).rglob("*.py") if file.name not in ELSEWHERE)
        found = [(os.path.relpath(file, ROOT), mutant) for file in files for mutant in mutants(file.read_bytes())]
        random.Random(self._args.seed).shuffle(found)
        return found[:self._args.sample]

    def tests_of(self, file: str, mutant: Mutant) -> list[str]:
        """The quickest that come to the line, as many as there is time for, but at least three."""
        reach = self._lines.get(file, {}).get(str(mutant.line), [])
        chosen, spent_s = [], 0.0
        for name in sorted(reach, key=self._seconds.__getitem__):
            spent_s += self._seconds[name]
            if spent_s > ENOUGH_S and len(chosen) >= 3:
                break
            chosen.append(name)
        return chosen

    def run(self) -> list[Tried]:
        sample = self.sample()
        with tempfile.TemporaryDirectory(prefix="ratel-mutants-") as place, ThreadPoolExecutor(self._args.processes) as threads:
            copies = [Copy(Path(place) / str(number)) for number in range(self._args.processes)]
            free = copies.copy()
            reached = sorted({name.split("::")[0] for file, mutant in sample for name in self.tests_of(file, mutant)})
            for copy in copies:
                copy.prepare(reached)

            def one(pair: tuple[str, Mutant]) -> Tried:
                copy = free.pop()
                try:
                    return self._try(copy, *pair)
                finally:
                    free.append(copy)

            tried = []
            for done in threads.map(one, sample):
                tried.append(done)
                print(json.dumps(done.to_json()), file=sys.stdout if done.outcome in ("survived", "not reached") else sys.stderr, flush=True)
            for copy in copies:
                copy.close()
        return tried

    def _try(self, copy: Copy, file: str, mutant: Mutant) -> Tried:
        tests = self._that_pass(copy, self.tests_of(file, mutant))
        if not tests:
            return Tried(file, mutant, 0, "not reached")
        limit_s = 60 + 5 * sum(map(self._seconds.__getitem__, tests))
        return Tried(file, mutant, len(tests), copy.outcome_with(file, mutant, tests, limit_s))

    def _that_pass(self, copy: Copy, tests: list[str]) -> list[str]:
        """A test that fails without a mutant as well notices nothing. Asked of all together
        first."""
        unknown = [name for name in tests if name not in self._passes]
        if unknown:
            together = copy.outcome(unknown, 1000) == "survived"
            self._passes |= {name: together or copy.outcome([name], 300) == "survived" for name in unknown}
        return [name for name in tests if self._passes[name]]


def sums(tried: list[Tried]) -> dict[str, Any]:
    by_file: dict[str, Counter] = defaultdict(Counter)
    for one in tried:
        by_file[one.file][one.outcome] += 1
    return {"mutants": len(tried), "outcomes": Counter(one.outcome for one in tried), "by_file": by_file}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["learn", "run", "serve"])
    parser.add_argument("file", type=Path, nargs="?", help="what was learned")
    parser.add_argument("--paths", nargs="+", default=PATHS)
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args, rest = parser.parse_known_args()
    if args.what == "serve":
        return serve()
    if args.what == "learn":
        return learn(args.file, rest)
    tried = Run(json.loads(args.file.read_text()), args).run()
    found = sums(tried)
    if args.json:
        args.json.write_text(json.dumps({**found, "tried": [one.to_json() for one in tried]}, indent=1) + "\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
