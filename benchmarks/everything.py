"""Everything that evaluation_data.md has of a machine with a GPU, in one command, what matters most
first.

    python -m benchmarks.everything --machine h200 --ssd /mnt/a --ram-disk /dev/shm/a
    python -m benchmarks.everything --machine h200 --ssd /mnt/a --budget-s 580 --only reality pays

Each measurement is a command of its own, which is printed before it runs and has a time limit. What
is not likely to end within the budget is not begun. The tables are made anew at the end.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.harness.report import RESULTS, ROOT, Clock, commit
from benchmarks.harness.watched import stop_group

DONE = "done"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    kind: str
    """The KIND in the name of the results: MACHINE_KIND.json."""
    arguments: tuple[str, ...]
    """What Python runs, but for where the results go."""
    about_s: float
    """What it took on an H200 with a disk of 2 GB/s; it is ended after half as much again."""
    prints_json: bool = False
    """Whether the command prints its results instead of writing the file itself."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, metavar="NAME", help="how the machine's results are called")
    parser.add_argument("--ssd", required=True, metavar="DIR", help="a directory on the SSD; 60 GB of it are used")
    parser.add_argument("--ram-disk", metavar="DIR", help="a directory on a RAM disk, which stands for faster drives")
    parser.add_argument("--results", default=str(RESULTS), metavar="DIR")
    parser.add_argument("--budget-s", type=float, default=3600)
    parser.add_argument("--only", nargs="+", metavar="KIND")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(arguments)
    known = [m.kind for m in measurements(args)]
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(known)}")
    return args


def measurements(args: argparse.Namespace) -> Iterator[Measurement]:
    ssd = ("--ssd", args.ssd)
    sizes = ("--gpu-memory", "24GiB", "--seq-len", "1024", "--steps", "1", "--json")

    def script(name: str, *more: str) -> tuple[str, ...]:
        return ("-m", f"benchmarks.{name}", *more)

    yield Measurement(kind="reality", about_s=310, arguments=script("prediction.reality", "--set", "gpu", *ssd, "--steps", "2"))
    yield Measurement(kind="pays", about_s=230, arguments=script("prediction.pays", "--set", "gpu", *ssd))
    yield Measurement(kind="compare", about_s=500, arguments=script("speed.compare_deepspeed", "--states", "dram", "--rounds", "1",
                                                                    "--budget-s", "600", *ssd))
    yield Measurement(kind="compare_ssd", about_s=350, arguments=script("speed.compare_deepspeed", "--states", "ssd", "--rounds", "1",
                                                                        "--budget-s", "480", *ssd))
    ram_disk = ("--ram-disk", args.ram_disk) if args.ram_disk else ()
    for kind, about_s, more in (("ssd", 260, (*ssd, *ram_disk, "--steps", "2")), ("shapes", 300, (*ssd, "--only", "0", "1", "2")),
                                ("curve", 110, ()), ("sustained", 150, ())):
        yield Measurement(kind=kind, about_s=about_s, arguments=script("speed.targets", kind, *more, "--budget-s", str(1.4 * about_s)))
    yield Measurement(kind="startup", about_s=100, arguments=script("speed.startup", *ssd, "--budget-s", "140"))
    yield Measurement(kind="max_model", about_s=120, prints_json=True, arguments=(
        "-m", "ratel", "bench", "max-model", "--model", "llama-8b", "--dram", "16GiB,32GiB,64GiB", "--batch-size", "8", *sizes))
    yield Measurement(kind="max_batch", about_s=120, prints_json=True, arguments=(
        "-m", "ratel", "bench", "max-batch", "--model", "llama-3b", "--dram", "40GiB,60GiB", *sizes))
    yield Measurement(kind="durable_dram", about_s=100, arguments=script(
        "speed.durable", "--tier", "dram", "--dram", "60GiB", "--layers", "8", "--steps", "5", "--copy-every", "6", "--rounds", "1", *ssd,
        "--out", f"{args.ssd}/durable-out"))
    yield Measurement(kind="largest_sequence", about_s=180, arguments=script("size.largest", "sequence", "--steps", "2", "--dram", "80GiB", *ssd))
    yield Measurement(kind="runlora", about_s=250, arguments=script("speed.lora_models", "--budget-s", "300"))
    yield Measurement(kind="largest_model", about_s=300, arguments=script("size.largest", "model", "--dram", "110GiB", *ssd))


def run(measurement: Measurement, results: Path, machine: str) -> str:
    """How it ended, in a word or two. What was measured before stays where a command ends without a
    result."""
    target = results / f"{machine}_{measurement.kind}.json"
    command, limit_s = [sys.executable, *measurement.arguments], 1.5 * measurement.about_s
    if not measurement.prints_json:
        return _run([*command, "--json", str(target)], limit_s)
    printed = target.with_name(f"{target.name}.part")
    with printed.open("w", encoding="utf-8") as output:
        ended = _run(command, limit_s, stdout=output)
    if ended == DONE:
        points = [{**point, "commit": commit()} for point in json.loads(printed.read_text(encoding="utf-8"))]
        target.write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    printed.unlink()
    return ended


def _run(command: list[str], limit_s: float, stdout: TextIO | None = None) -> str:
    # Where packages came without bytecode and none is written, each of a hundred processes would
    # spend 15 s on compiling it.
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "ratel-bytecode")}
    child = subprocess.Popen(command, stdout=stdout, cwd=ROOT, start_new_session=True, env={**os.environ, **bytecode})
    try:
        status = child.wait(limit_s)
        return DONE if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        return f"ended after {limit_s:.0f} s"
    finally:
        stop_group(child)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    clock, results = Clock(args.budget_s), Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    for measurement in measurements(args):
        if args.only and measurement.kind not in args.only:
            continue
        said = f"{measurement.kind}: {shlex.join(('python', *measurement.arguments))}"
        if args.list:
            print(said)
        elif clock.left_s < measurement.about_s:
            print(f"{said}: not begun, {clock.left_s:.0f} s are left and it takes about {measurement.about_s:.0f}", flush=True)
        else:
            print(said, flush=True)
            print(f"{measurement.kind}: {run(measurement, results, args.machine)}, {clock.left_s:.0f} s left", flush=True)
    if not args.list and results == RESULTS:
        subprocess.run([sys.executable, "-m", "benchmarks.tables"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
