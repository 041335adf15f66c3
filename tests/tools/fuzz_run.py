"""Gives Ratel mutated files of every kind that it reads, each in a fork of one process that has
imported everything.

    python -m tests.tools.fuzz_run DIRECTORY --seed N --cases N [--only TARGET] [--json FILE]

A case fails if it prints a traceback, is ended by a signal, needs more than ten seconds of
processor time, refuses in other than one line, or changes anything outside of what its command may
write to. Ends with status 1 if one did. Every case is fixed by its number, so a failure is repeated
with ``--seed N --cases 1``.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.patience import patience
from tests.tools import fuzzing as mutations

CPU_S, WALL_S = 10, 90
"""The most seconds of a case. Wall time is for cases that wait; on a busy machine a case that
computes may have to wait its turn."""
MEMORY_BYTES = 6 << 30
Mutate = Callable[[random.Random, bytes], bytes]
FEW = ["--batch-size", "2", "--seq-len", "32", "--device", "cpu", "--dtype", "fp32", "--eval-sequences", "2", "--micro-batch", "2", "--dram", "2GiB",
       "--quiet"]
TRAIN = ["train", "--model", "base", "--data", "d.jsonl", *FEW, "--out", "out", "--steps", "1"]
CHATS = ["train", "--model", "base", "--data", "chat.jsonl", *FEW, "--out", "out", "--steps", "1", "--no-export"]
RESUME = ["train", "--out", "run", "--resume", "--steps", "4"]
COMMIT = ["train", "--out", "runc", "--resume", "--steps", "4"]
CHECKS = {"run": [["check", "run"], RESUME, ["export", "--state", "run", "--out", "out"]],
          "runc": [["check", "runc"], COMMIT, ["export", "--state", "runc", "--out", "out"],
                   ["train", "--model", "base", "--data", "d.jsonl", *FEW, "--out", "runc", "--steps", "1", "--overwrite"]]}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file, how it is mutated, and commands that read it (one of them is taken)."""

    path: str
    mutate: Mutate
    commands: list[list[str]]
    weight: int = 2


def _targets() -> dict[str, Target]:
    m, train = mutations, TRAIN
    sharded = ["train", "--model", "sharded", *train[3:]]
    plan = ["plan", "--model", "base", "--hardware", "hw.json", "--batch-size", "2", "--seq-len", "32", "--device", "cpu"]
    by_hardware = [*train, "--hardware", "hw.json", "--no-export"]
    return {
        "config": Target(path="base/config.json", mutate=m.mutate_json_file, commands=[train], weight=4),
        "generation_config": Target(path="base/generation_config.json", mutate=m.mutate_json_file, commands=[train]),
        "safetensors": Target(path="base/model.safetensors", mutate=m.mutate_safetensors, commands=[[*train, "--no-export"]], weight=5),
        "index": Target(path="sharded/model.safetensors.index.json", mutate=m.mutate_json_file, commands=[[*sharded, "--no-export"]], weight=2),
        "tokenizer": Target(path="base/tokenizer.json", mutate=m.mutate_json_file, commands=[train], weight=3),
        "tokenizer_config": Target(path="base/tokenizer_config.json", mutate=m.mutate_json_file, commands=[train, CHATS], weight=3),
        "template": Target(path="base/chat_template.jinja", mutate=m.mutate_template, commands=[CHATS], weight=4),
        "jsonl": Target(path="d.jsonl", mutate=m.mutate_lines, commands=[[*train, "--no-export"]], weight=4),
        "chat": Target(path="chat.jsonl", mutate=m.mutate_lines, commands=[CHATS], weight=4),
        "txt": Target(path="d.txt", mutate=m.mutate_bytes, commands=[["train", "--model", "base", "--data", "d.txt", *FEW, "--out", "out", "--steps", "1", "--no-export"]]),
        "toml": Target(path="run.toml", mutate=m.mutate_toml, commands=[["train", "--config", "run.toml", *FEW, "--out", "out", "--steps", "1", "--no-export"]], weight=3),
        "toml alone": Target(path="run.toml", mutate=m.mutate_toml, commands=[["train", "--config", "run.toml", "--out", "out", "--steps", "1", "--dram", "2GiB", "--device", "cpu"]]),
        "hardware": Target(path="hw.json", mutate=m.mutate_json_file, commands=[plan, by_hardware], weight=3),
        "plan cache": Target(path="cache/ratel/hardware", mutate=m.mutate_json_file, commands=[by_hardware], weight=2),
        "optimizer": Target(path="moments/optimizer.safetensors", mutate=m.mutate_safetensors,
                            commands=[[*train, "--no-export", "--optimizer-state", "moments"]], weight=3),
        "manifest": Target(path="run/state/*/manifest.json", mutate=m.mutate_sealed, commands=CHECKS["run"], weight=5),
        "record": Target(path="run/state/*/commit-0", mutate=m.mutate_sealed, commands=CHECKS["run"], weight=5),
        "commits' manifest": Target(path="runc/state/commits/manifest.json", mutate=m.mutate_sealed, commands=CHECKS["runc"], weight=5),
        "commits' record": Target(path="runc/state/commits/commit-[01]", mutate=m.mutate_sealed, commands=CHECKS["runc"], weight=4),
        "metrics": Target(path="run/metrics.jsonl", mutate=m.mutate_lines, commands=[RESUME], weight=3),
        "run's config": Target(path="run/config.json", mutate=m.mutate_json_file, commands=[RESUME, ["export", "--state", "run", "--out", "out"]], weight=4),
    }


TARGETS = _targets()
MAY_WRITE = ("out", "run", "runc", "ssd", "cache", "output")
"""Names in the sandbox that commands write to; a link among them must not lead out."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    found = Fuzz(args.directory.resolve(), args.only).run(args.seed, args.cases, args.json)
    print(json.dumps(found, indent=1))
    return 1 if found["failures"] else 0


class Fuzz:
    def __init__(self, directory: Path, only: str | None) -> None:
        self._directory = directory
        self._template, self._root = directory / "template", directory / "root"
        self._sandbox = self._root / "a" / "b" / "sandbox"
        mutations.canary = str(directory / "canary")
        names = [only] if only else [name for name, target in TARGETS.items() for _ in range(target.weight)]
        self._names = names
        directory.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(self._sandbox / "cache")
        if not self._template.exists():
            making = self._directory / "making"
            status = _in_child(lambda: make_template(self._sandbox), making, limited=False)
            if status:
                raise RuntimeError(f"what is to be mutated was not made (status {status}): {making.read_text()[-3000:]}")
            self._sandbox.rename(self._template)
        import_everything()

    def run(self, seed: int, cases: int, log: Path | None) -> dict[str, Any]:
        ends: Counter[str] = Counter()
        failures = []
        begun = time.monotonic()
        for number in range(seed, seed + cases):
            case, problem, end = self.case(number)
            ends[end] += 1
            if problem is not None:
                failures.append({"case": number, "what": case, "problem": problem})
                print(json.dumps(failures[-1]), file=sys.stderr, flush=True)
            if log is not None:
                log.write_text(json.dumps({"done": number - seed + 1, "seconds": time.monotonic() - begun, "ends": ends, "failures": failures}, indent=1))
        return {"cases": cases, "seconds": round(time.monotonic() - begun, 1), "ends": dict(ends), "failures": failures}

    def case(self, number: int) -> tuple[str, str | None, str]:
        """What it is, what was wrong with it, and how it ended."""
        rng = random.Random(number)
        name = self._names[number % len(self._names)]
        target = TARGETS[name]
        self._lay_out()
        path = self._find(rng, target.path)
        what = self._mutate(rng, path, target)
        command = rng.choice(target.commands)
        before = self._snapshot()
        output = self._sandbox / "output"
        status = _in_child(lambda: self._command(command), output)
        said = output.read_text(encoding="utf-8", errors="replace")
        problem = _problem(status, said) or self._changes(before, command)
        last = said.strip().splitlines()[-1][:300] if said.strip() else ""
        return f"{name} ({what}): ratel {' '.join(command)}", problem and f"{problem}; {last}", f"status {status}"

    def _lay_out(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.rmtree(mutations.canary, ignore_errors=True)
        self._root.joinpath("a", "b").mkdir(parents=True)
        os.mkdir(mutations.canary)
        for place in (self._root, self._root / "a" / "b", Path(mutations.canary)):
            (place / "x").write_text("a user's own\n")
        shutil.copytree(self._template, self._sandbox, symlinks=True)

    def _find(self, rng: random.Random, pattern: str) -> Path:
        found = sorted(self._sandbox.glob(pattern))
        path = rng.choice(found)
        return rng.choice(sorted(path.iterdir())) if path.is_dir() else path

    def _mutate(self, rng: random.Random, path: Path, target: Target) -> str:
        if rng.random() < 0.06:
            return f"{path.name} is {mutations.replace_by_other(rng, path)}"
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(target.mutate(rng, content))
        return path.name

    def _command(self, command: list[str]) -> int:
        from ratel.cli import main as ratel

        os.chdir(self._sandbox)
        return ratel(command)

    def _snapshot(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for top in (self._root, Path(mutations.canary)):
            for folder, folders, files in os.walk(top):
                for name in [*folders, *files]:
                    at = os.path.join(folder, name)
                    entry = os.lstat(at)
                    is_folder = name in folders
                    found[at] = (entry.st_mode, entry.st_ino, 0 if is_folder else entry.st_size, 0 if is_folder else entry.st_mtime_ns)
        return found

    def _changes(self, before: dict[str, tuple[int, ...]], command: list[str]) -> str | None:
        after = self._snapshot()
        inside = tuple(f"{self._sandbox}/{name}" for name in MAY_WRITE)
        changed = [at for at in before.keys() | after.keys() if before.get(at) != after.get(at) and not at.startswith(inside)]
        return f"changed {sorted(changed)[:3]}" if changed else None


def _problem(status: int, said: str) -> str | None:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if status in (1, 2) and not (said.strip().splitlines() or [""])[-1].startswith("ratel: "):
        return f"status {status} without a line that says why"
    if status not in (0, 1, 2):
        return f"status {status}"
    return None


def _in_child(work: Callable[[], int | None], output: Path, *, limited: bool = True) -> int:
    """Its status; minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if limited:
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 2))
                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            status = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return _wait(child, WALL_S if limited else 600)


def _wait(child: int, limit_s: float) -> int:
    deadline = time.monotonic() + patience(limit_s)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


def import_everything() -> None:
    import asyncio  # noqa: F401
    import http.client  # noqa: F401

    import aiofiles  # noqa: F401
    import jinja2.sandbox  # noqa: F401
    import transformers.generation.utils  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from safetensors.torch import save_file  # noqa: F401

    import ratel.cli
    import ratel.data.dataset
    import ratel.training.export_state
    import ratel.training.run  # noqa: F401


def make_template(sandbox: Path) -> None:
    """A model, whole and in shards, with a tokenizer; data; runs with copies and with commits;
    moments; remembered plans."""
    import torch
    import transformers

    from ratel.cli import main as ratel
    from ratel.data.tokens.tokenizer import DEFAULT_CHAT_TEMPLATE, byte_level_tokenizer
    from ratel.planner.machine.hardware import load_hardware

    sandbox.mkdir(parents=True)
    os.chdir(sandbox)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
                                      vocab_size=272, max_position_embeddings=128)
    model = transformers.LlamaForCausalLM(config)
    tokenizer = byte_level_tokenizer()
    for name, size in (("base", "1GB"), ("sharded", "40KB")):
        model.save_pretrained(name, max_shard_size=size)
        tokenizer.save_pretrained(name)
    Path("base/chat_template.jinja").write_text(DEFAULT_CHAT_TEMPLATE)
    words = "some words to learn from. "
    Path("d.jsonl").write_text("".join(json.dumps({"text": words * 3 + str(n)}) + "\n" for n in range(20))
                               + "".join(json.dumps({"prompt": "a", "completion": f"b{n}"}) + "\n" for n in range(5)))
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": words},
                                  {"role": "assistant", "content": f"yes {n}"}], "tools": [{"type": "function", "function": {"name": "f"}}]}) + "\n" for n in range(12)))
    Path("d.txt").write_text("\n\n".join(words * 4 + str(n) for n in range(60)))
    Path("run.toml").write_text('model = "base"\ndata = "d.jsonl"\nbatch_size = 2\nseq_len = 32\nlr = 1e-4\nbetas = [0.9, 0.95]\nschedule = "cosine"\n'
                                'warmup-steps = 1\nseed = 3\nmicro_batch = 2\nmax_grad_norm = 1.0\ndram = "2GiB"\neval-fraction = 0.1\nattention = "sdpa"\nsave_every = 1\n'
                                'optimizer = "deferred"\nweight_decay = 0.1\nkeep = 1\n')
    Path("hw.json").write_text(json.dumps(load_hardware("4090").to_json()))
    Path("ssd").mkdir()
    common = ["train", "--model", "base", "--data", "d.jsonl", *FEW, "--save-every", "1"]
    for arguments in ([*common, "--out", "run", "--steps", "3", "--keep", "2"], [*common, "--out", "runc", "--steps", "3", "--ssd", "ssd", "--tier", "ssd", "--durable", "step"],
                      [*TRAIN, "--hardware", "hw.json", "--no-export"], ["export", "--state", "run", "--out", "moments", "--optimizer", "--dtype", "fp32"]):
        assert ratel(arguments) == 0, arguments
    shutil.rmtree("out")


if __name__ == "__main__":
    sys.exit(main())
