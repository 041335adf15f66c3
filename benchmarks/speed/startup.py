"""Seconds from a command to its first step, for a checkpoint that no cache holds, against reading
it at the disk's rate.

    python -m benchmarks.speed.startup --ssd /mnt/a --json benchmarks/results/MACHINE_startup.json

A Hugging Face checkpoint with random weights is written to the disk and dropped from the page cache
before each run. Each run is `ratel train` in a new process, seen from outside: what counts is when
OUT/metrics.jsonl gets its first line. *first run*: nothing is known about the machine and no kernel
compiled; its rates are measured first. *known machine*: as every later run, again on cold files.
*cached*: files in memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nvme_ds.reference import reference_io
from benchmarks.harness.jobs import NOT_BEGUN
from benchmarks.harness.report import Clock, Report
from benchmarks.harness.systems import DTYPES, model_config, read_model
from benchmarks.harness.watched import stop_group
from ratel.training.bench.step import fill_quickly
from ratel.units import GIB, MIB

SHARD_BYTES = 1 * GIB
LOOK_EVERY_S = 0.01
LIMIT_S = 240.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3b", help="preset, or a configuration as JSON")
    parser.add_argument("--ssd", required=True, help="a directory on the SSD, for the checkpoint")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--dram", default="100GiB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=400)
    parser.add_argument("--json")
    return parser.parse_args(arguments)


# --- the checkpoint -------------------------------------------------------------------------------------------------


def write_checkpoint(model: Any, directory: Path) -> list[Path]:
    """bf16, in files of a GiB, as Hugging Face names and indexes them."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = model_config(model)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=DTYPES["bf16"])
    config.architectures, config.dtype = [type(module).__name__], "bfloat16"
    config.save_pretrained(directory)
    shards = _shards({name: param for name, param in module.named_parameters()})
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        tensors = {key: torch.empty(param.shape, dtype=torch.bfloat16) for key, param in shard.items()}
        for tensor in tensors.values():
            fill_quickly(tensor)
        save_file(tensors, directory / name, metadata={"format": "pt"})
    weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
    total = sum(param.numel() * 2 for shard in shards for param in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return [directory / name for name in names]


def _shards(params: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD_BYTES
    for name, param in params.items():
        num_bytes = param.numel() * 2
        if shards[-1] and num_bytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = param
        room -= num_bytes
    return shards


def drop_from_cache(files: list[Path]) -> None:
    """Pages that are not on disk yet cannot be dropped, so they are written first."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_bps(files: list[Path]) -> float:
    """Bytes/s of reading one file after the other with O_DIRECT, whole MiB of each, by the faster
    of two loops: 1 MiB requests, 32 in flight."""
    rates = []
    for method in ("io_uring", "threads"):
        moved, seconds = 0, 0.0
        try:
            for file in files:
                num_bytes = file.stat().st_size // MIB * MIB
                if num_bytes:
                    seconds += reference_io([str(file)], "read", num_bytes=num_bytes, region_bytes=num_bytes,
                                            request_bytes=MIB, depth=32, memory_bytes=64 * MIB, method=method)
                    moved += num_bytes
        except OSError:  # io_uring is often forbidden in containers
            continue
        rates.append(moved / seconds if seconds else 0.0)
    return max(rates, default=0.0)


# --- the runs -------------------------------------------------------------------------------------------------------


def time_run(command: list[str], out: Path, env: dict[str, str], limit_s: float) -> dict[str, Any]:
    """Seconds from before the process exists to the first line of metrics.jsonl; then it is
    ended."""
    metrics, log = out / "metrics.jsonl", tempfile.TemporaryFile()
    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **env},
                             start_new_session=True)
    try:
        while time.perf_counter() - begun < limit_s:
            text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
            ended_s = time.perf_counter() - begun
            if "\n" in text:
                record = json.loads(text.splitlines()[0])
                return {"first_step_end_s": ended_s, "first_step_begin_s": ended_s - record["step_s"],
                        "first_step": record, "phases": _phases(out)}
            if child.poll() is not None:
                break
            time.sleep(LOOK_EVERY_S)
        status = child.poll()
    finally:
        stop_group(child)
    log.seek(0)
    last = "\n".join(log.read().decode(errors="replace").strip().splitlines()[-8:])
    return {"error": f"{'no first step in time' if status is None else f'exit status {status}'}: {last}"}


def _phases(out: Path) -> Any:
    """What the run itself noted about its start, where it does."""
    path = out / "startup.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def measure(args: argparse.Namespace) -> Report:
    clock, root = Clock(args.budget_s), Path(args.ssd) / "ratel-startup"
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    report = Report(args.json, kind="startup", gpu=gpu, torch=torch.__version__)
    shutil.rmtree(root, ignore_errors=True)
    try:
        (root / "model").mkdir(parents=True)
        files = write_checkpoint(read_model(args.model), root / "model")
        drop_from_cache(files)
        num_bytes, rate = sum(file.stat().st_size for file in files), read_bps(files)
        report.write(checkpoint_bytes=num_bytes, read_bps=rate, read_s=num_bytes / rate if rate else None)
        for name, is_cold in (("first run", True), ("known machine", True), ("cached", False)):
            if is_cold:
                drop_from_cache(files)
            report.add({"name": name, **_run(args, root, clock)})
            print(report.points[-1], flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return report


def _run(args: argparse.Namespace, root: Path, clock: Clock) -> dict[str, Any]:
    if clock.left_s < 1:
        return {"error": NOT_BEGUN}
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    budgets = ["--dram", args.dram, *([] if args.device == "cpu" else ["--gpu-memory", args.gpu_memory])]
    command = [sys.executable, "-m", "ratel", "train", "--model", str(root / "model"), "--out", str(out), "--steps", "3",
               "--batch-size", str(args.batch), "--seq-len", str(args.seq_len), "--device", args.device, *budgets,
               "--eval-fraction", "0", "--no-export"]
    # Caches of its own: what earlier commands found out about the machine, or compiled, must not
    # shorten the first run. Python's bytecode is among them, as wherever packages were installed by
    # hand; some containers come without, and write none.
    caches = {"XDG_CACHE_HOME": str(root / "cache"), "TRITON_CACHE_DIR": str(root / "cache" / "triton"),
              "PYTHONPYCACHEPREFIX": str(root / "cache" / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    return time_run(command, out, caches, min(LIMIT_S, clock.left_s))


def main() -> None:
    from benchmarks.tables.target_tables import target_lines

    print("\n".join(target_lines("startup", measure(parse()).content)))


if __name__ == "__main__":
    main()
