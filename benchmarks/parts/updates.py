"""The CPU optimizer in steps, and on its own: where a difference comes from.

    python -m benchmarks.parts.updates --model llama-8b --dram 108GiB --json results.json

G parameters per second *in steps* of a session; *same planes*: of that session, when nothing else
runs, pieces of all units after each other; *one unit*: the same planes again and again; *fresh*: on
7 GB of new memory; *in a cache*: on states of 0.5 GB; *fresh, aligned*: on planes that begin at the
same address modulo 256 MiB; *fresh, much*: on as much memory as the probe takes. Beside it the
processor's time by thread, in steps, and how much of the process's memory is in huge pages.
"""

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.report import Report
from benchmarks.harness.systems import NEVER, model_config, read_model
from ratel.hardware.host import worker_cores
from ratel.hardware.probe import adam_params, room
from ratel.hardware.rates import measure_adamw
from ratel.planner.formats import PLANES
from ratel.planner.placement import DRAM
from ratel.runtime.session.session import Session
from ratel.training.bench.step import random_tokens, use_quick_weights

ADAM = dict(grad_scale=1.0, lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, step=10)
TASKS = Path("/proc/self/task")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3b", help="preset, or a configuration as JSON")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--dram", default="100GiB")
    parser.add_argument("--optimizer", default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json")
    return parser.parse_args()


def thread_seconds() -> Counter[str]:
    """Seconds of processor time so far, by the threads' names."""
    found: Counter[str] = Counter()
    for task in TASKS.iterdir():
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            found[(task / "comm").read_text().strip()] += (int(fields[11]) + int(fields[12])) / 100
        except OSError:
            pass  # it has ended
    return found


def in_steps(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    vocab = session.parts.spec.vocab_size
    for index in range(2):
        session.step({"input_ids": random_tokens(index, args.batch, args.seq_len, vocab)})
    before, results = thread_seconds(), []
    for index in range(args.steps):
        results.append(session.step({"input_ids": random_tokens(2 + index, args.batch, args.seq_len, vocab)}))
    session.flush()
    used = thread_seconds() - before
    count = sum(unit.num_trainable for unit, _ in units_in_dram(session))
    busy_s = statistics.median(result.usage.busy_s["cpu optimizer"] for result in results)
    return {"step_s": statistics.median(result.seconds for result in results), "busy_s": busy_s,
            "params_per_s": count / busy_s, "thread_s": dict(used.most_common(12)), "optimizer": session.plan.optimizer}


def units_in_dram(session: Session) -> list[tuple[Any, list[torch.Tensor]]]:
    """With their planes `hi`, `lo`, `m` and `v`."""
    store, found = session._machinery.store, []
    for unit in session.parts.spec.units:
        planes = [store.plane(unit.index, name) for name in PLANES]
        if unit.num_trainable and all(plane.tier == DRAM for plane in planes):
            found.append((unit, [plane.tensor for plane in planes]))
    return found


def alone(session: Session, repeats: int) -> dict[str, float]:
    """The same planes, without anything beside it. What is in them afterwards is of no use."""
    pool, units = session._machinery.pool, units_in_dram(session)
    grad = torch.full((max(unit.num_trainable for unit, _ in units),), 0.01, dtype=torch.bfloat16)

    def update(unit: Any, planes: list[torch.Tensor]) -> None:
        places = tuple(plane.data_ptr() for plane in planes)
        pool.adamw(*places, grad.data_ptr(), unit.num_trainable, to=places, grad_dtype="bf16",
                   ranges=[(unit.num_trainable, 0.0)], **ADAM)

    def rate(chosen: list[tuple[Any, list[torch.Tensor]]]) -> float:
        begun = time.perf_counter()
        for unit, planes in chosen:
            update(unit, planes)
        return sum(unit.num_trainable for unit, _ in chosen) / (time.perf_counter() - begun)

    rate(units)
    return {"same planes": statistics.median(rate(units) for _ in range(repeats)),
            "one unit": statistics.median(rate(units[:1] * len(units)) for _ in range(repeats))}


def fresh() -> dict[str, float]:
    threads = worker_cores()
    return {name: measure_adamw(threads, num_params=count, limit_s=0.5)["params_per_s"]
            for name, count in (("in a cache", 33_000_000), ("fresh", 500_000_000), ("fresh, aligned", 1 << 28),
                               ("fresh, much", adam_params(threads, room(None))))}


def huge_page_share() -> float:
    sums = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]}
    return sums["AnonHugePages"] / max(sums["Anonymous"], 1)


def main() -> None:
    args = parse()
    cuda = args.device == "cuda"
    report = Report(args.json, gpu=torch.cuda.get_device_name() if cuda else None, torch=torch.__version__)
    point: dict[str, Any] = {"name": args.model, "batch_size": args.batch, "before": fresh()}
    with Session(model_config(read_model(args.model)), device=args.device, dram=args.dram, dtype="bf16", max_grad_norm=NEVER,
                 gpu_memory=args.gpu_memory if cuda else None, optimizer=args.optimizer) as session:
        use_quick_weights(session)
        session.prepare(args.batch, args.seq_len)
        point |= {"in steps": in_steps(session, args), "alone": alone(session, 3), "huge_pages": huge_page_share()}
    point["after"] = fresh()
    report.add(point)
    print(point)


if __name__ == "__main__":
    main()
