"""Whether the same work gives the same bits: single operations, a block, and steps of a session,
each many times.

    python -m benchmarks.exactness.reproducible --json reproducible.json
    python -m benchmarks.exactness.reproducible --only attention "session: states in DRAM" --repeats 50

Each case does one piece of work again and again on the same inputs, and compares all results with
those of the first time, bit for bit. Where plain PyTorch on its own differs, the kernels do; where
a block differs only beside copies or in a session, or a hand-over does, something is read before it
is there or written before it has been read.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.exactness.bitwise import Repetitions
from ratel.hardware.determinism import WORKSPACE, same_bits
from ratel.hardware.device import require_device
from ratel.training.bench.step import random_tokens
from benchmarks.harness.report import Report, script_command, script_path
from benchmarks.exactness.reproducible_parts import Pieces, Work, busy_machine
from benchmarks.exactness.reproducible_session import (DETERMINISTIC, HANDED_OVER, PLANS, check_hand_overs, give_memory_back, prepared,
                                  repeat_steps)
from benchmarks.harness.systems import model_config, read_model

Point = dict[str, Any]

PIECES = ("attention", "products", "norms", "embedding and loss", "block", "block beside copies")
CASES = (*PIECES, *(f"session: {name}" for name in PLANS), "session, deterministic",
         *(f"hand-overs: {name}" for name in HANDED_OVER))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default='{"name": "llama-3b", "num_blocks": 8}',
                        help="a preset, or a configuration as JSON")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20, help="of a step; of a single piece as many as "
                        "there are blocks in so many steps")
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"cases that begin so: {', '.join(CASES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gpu-memory", help="of a session")
    parser.add_argument("--dram", help="of a session")
    parser.add_argument("--json")
    args = parser.parse_args(arguments)
    for begin in args.only or ():
        if not any(case.startswith(begin) for case in CASES):
            parser.error(f"--only: no case begins with {begin!r}; there are {', '.join(CASES)}")
    return args


def wanted(case: str, args: argparse.Namespace) -> bool:
    return args.only is None or case.startswith(tuple(args.only))


# --- without a session ----------------------------------------------------------------------------------------------


def piece_points(args: argparse.Namespace) -> Iterator[Point]:
    config, device = model_config(read_model(args.model)), require_device(args.device)
    pieces = Pieces(config, random_tokens(0, args.batch, args.seq_len, config.vocab_size), device)
    times = args.repeats * pieces.num_blocks
    call = pieces.attention_call() if wanted("attention", args) else None
    for name, work in call.works() if call is not None else ():
        yield {**repeat(name, work, times), **({"chosen": call.chosen} if name == "attention" else {})}
    makers: dict[str, Callable[[], Work]] = {
        "products": pieces.products, "norms": pieces.norms, "embedding and loss": lambda: pieces.embedding_and_loss,
        "block": lambda: pieces.block, "block beside copies": lambda: pieces.block}
    for name, make in makers.items():
        if wanted(name, args):
            with busy_machine(device) if name == "block beside copies" else nullcontext():
                yield repeat(name, make(), times)
    pieces.close()


def repeat(name: str, work: Work, repeats: int) -> Point:
    found, begun = Repetitions(), time.perf_counter()
    try:
        for _ in range(repeats + 1):
            found.add(work())
    except RuntimeError as error:  # a backend that cannot do this work on this machine
        return {"name": name, "error": str(error).partition("\n")[0]}
    return {"name": name, **found.point, "seconds": time.perf_counter() - begun}


# --- with one -------------------------------------------------------------------------------------------------------


def session_points(args: argparse.Namespace) -> Iterator[Point]:
    for name, options in PLANS.items():
        if wanted(f"session: {name}", args):
            yield session_point(f"session: {name}", options, args)


def session_point(name: str, options: dict[str, Any], args: argparse.Namespace) -> Point:
    config = model_config(read_model(args.model))
    with prepared(config, args.batch, args.seq_len, {**of_session(args), **options}) as session:
        batch = {"input_ids": random_tokens(0, args.batch, args.seq_len, config.vocab_size)}
        return {"name": name, **repeat_steps(session, batch, args.repeats)}


def hand_over_points(args: argparse.Namespace) -> Iterator[Point]:
    config = model_config(read_model(args.model))
    batches = [{"input_ids": random_tokens(index, args.batch, args.seq_len, config.vocab_size)}
               for index in range(args.repeats)]
    for name, options in HANDED_OVER.items():
        if wanted(f"hand-overs: {name}", args):
            with prepared(config, args.batch, args.seq_len, {**of_session(args), **options, "lr": 1e-4}) as session:
                yield {"name": f"hand-overs: {name}", **check_hand_overs(session, batches)}


def of_session(args: argparse.Namespace) -> dict[str, Any]:
    return {"device": args.device, "gpu_memory": args.gpu_memory, "dram": args.dram}


def deterministic_points(args: argparse.Namespace) -> Iterator[Point]:
    """The points of a process of its own, which is told by its environment: cuBLAS in this one has
    read it already."""
    name = "session, deterministic"
    if not wanted(name, args):
        return
    if WORKSPACE in os.environ:
        with same_bits(True):
            yield session_point(name, PLANS[DETERMINISTIC], args)
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "points.json"
        done = subprocess.run([*script_command("exactness.reproducible"), *as_arguments(args), "--only", name, "--json", str(target)],
                              env={**os.environ, **script_path(), WORKSPACE: ":4096:8"}, capture_output=True, text=True)
        yield from json.loads(target.read_text(encoding="utf-8"))["points"] if done.returncode == 0 else [
            {"name": name, "error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}]


def as_arguments(args: argparse.Namespace) -> list[str]:
    """All but the cases and the file."""
    given = {"--model": args.model, "--batch": args.batch, "--seq-len": args.seq_len, "--repeats": args.repeats,
             "--device": args.device, "--gpu-memory": args.gpu_memory, "--dram": args.dram}
    return [str(word) for option, value in given.items() if value is not None for word in (option, value)]


# --- all ------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Report:
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    report = Report(args.json, kind="reproducible", gpu=gpu, torch=torch.__version__, device=args.device)
    makers = [session_points, hand_over_points, deterministic_points]
    if any(wanted(case, args) for case in PIECES):
        makers.insert(0, piece_points)
    for make in makers:
        for point in make(args):
            report.add(point)
            print(said(point), flush=True)
        give_memory_back()
    return report


def said(point: Point) -> str:
    if "error" in point:
        return f"{point['name']}: not possible, {point['error']}"
    chosen = f" ({point['chosen']})" if point.get("chosen") else ""
    text = f"{point['name']}{chosen}: {point['different']} of {point['repetitions']} repetitions differ"
    for name, one in list(point["tensors"].items())[:8]:
        size = "" if one["elements"] is None else \
            f", {one['elements']} of {one['of']} elements by up to {one['largest']:.3g}"
        text += f"\n    {name}: {one['times']} times{size}"
    return text + (f"\n    begins: {point['begins']}" if point.get("begins") else "")


def main() -> None:
    measure(parse())


if __name__ == "__main__":
    main()
