"""The two tables of README.md: what fits, from `ratel plan` lines, and how fast it is, from
benchmarks/results.

    python -m benchmarks.tables writes them between their marks, and the rest of the page as it is.
"""

import contextlib
import io
import json
import shlex
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.report import RESULTS, ROOT
from benchmarks.tables.compare_table import floor_s
from benchmarks.tables.evaluation import read
from ratel.units import GIB

TARGET = ROOT / "README.md"
BEGIN, END = "<!-- begin {}: python -m benchmarks.tables -->", "<!-- end {} -->"

PLANS = (
    "--model llama-3b --hardware 4090 --dram 32GiB --ssds 0 --batch-size 8",
    "--model llama-8b --hardware 4090 --dram 64GiB --ssds 2 --batch-size 16",
    "--model qwen3-14b --hardware 3090 --dram 64GiB --ssds 2 --batch-size 16",
    "--model qwen3-32b --hardware 5090 --dram 128GiB --ssds 2 --batch-size 32",
    "--model llama-70b --hardware 4090 --dram 128GiB --ssds 4 --batch-size 32",
)
"""Machines that are described in ratel/planner/machines: a plan for one of them needs no GPU and
comes out the same everywhere."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A row of the headline table: runs of one file of the comparison."""

    name: str
    file: str
    ratel: str
    peer: str
    batch: int
    clip: float = 1e9


WORKS = (
    Work(name="batch 8", file="h200_compare", ratel="Ratel, states in DRAM", peer="ZeRO-Offload", batch=8),
    Work(name="batch 32", file="h200_compare", ratel="Ratel, states in DRAM", peer="ZeRO-Offload", batch=32),
    Work(name="batch 8, gradients clipped in every step", file="h200_compare", ratel="Ratel, states in DRAM", peer="", batch=8, clip=0.01),
    Work(name="batch 8, 47 GiB of DRAM and an SSD", file="h200_compare_ssd", ratel="Ratel, 47GiB of DRAM and the SSD",
         peer="ZeRO-Infinity", batch=8),
)


def document() -> str:
    """The page with its tables made anew."""
    text = TARGET.read_text(encoding="utf-8")
    for name, lines in (("what fits", fits_lines()), ("how fast", speed_lines())):
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"README.md: no place between {begin} and {end}")
        text = "\n".join([before + begin, *lines, end]) + after
    return text


# --- what fits ------------------------------------------------------------------------------------------------------


def fits_lines() -> list[str]:
    rows = [_fits_row(arguments, plan(arguments)) for arguments in PLANS]
    return ["| model | GPU | batch x sequence | DRAM used | disk used | step |", "|---|---|---|---|---|---|", *rows, "",
            "```console", *(f"$ .venv/bin/ratel plan {arguments}" for arguments in PLANS), "```"]


def plan(arguments: str) -> dict[str, Any]:
    """What `ratel plan ARGUMENTS --json` prints."""
    from ratel import cli

    args = cli.build_parser().parse_all(["plan", *shlex.split(arguments), "--no-advice", "--json"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        args.run(args)
    return json.loads(printed.getvalue())


def _fits_row(arguments: str, found: dict[str, Any]) -> str:
    words = shlex.split(arguments)
    given = dict(zip(words[::2], words[1::2]))
    gpu = f"{found['hardware']['name'].partition(',')[0]}, {found['hardware']['gpu_bytes'] / GIB:.0f} GiB"
    used = {tier: found["memory"][tier]["used"] / GIB for tier in ("DRAM", "SSD")}
    disk = f"{used['SSD']:.0f} GiB" if used["SSD"] else "none"
    cells = [given["--model"], gpu, f"{given['--batch-size']} x 1024", f"{used['DRAM']:.0f} GiB", disk,
             f"{found['step_s']:.1f} s, {found['tokens_per_s']:,.0f} tokens/s"]
    return f"| {' | '.join(cells)} |"


# --- how fast -------------------------------------------------------------------------------------------------------


def speed_lines() -> list[str]:
    contents = {work.file: read(RESULTS / f"{work.file}.json") for work in WORKS}
    lines = ["| work | Ratel | peer | floor | of bound |", "|---|---|---|---|---|"]
    return lines + [_speed_row(work, contents[work.file]["points"]) for work in WORKS]


def _speed_row(work: Work, points: list[dict[str, Any]]) -> str:
    ratel, peer = _runs(work, work.ratel, points), _runs(work, work.peer, points)
    floor = floor_s(points, work.batch)
    fraction = statistics.median(run["fraction_of_bound"] for run in ratel)
    against = f"{_step_s(peer):.2f} s ({work.peer})" if peer else "not measured"
    cells = [work.name, f"**{_step_s(ratel):.2f} s**", against, f"{floor:.2f} s", f"{fraction:.0%} ({ratel[0]['bound_by']})"]
    return f"| {' | '.join(cells)} |"


def _runs(work: Work, name: str, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [p for p in points if "step_s" in p and (p["name"], p["batch_size"], p["clip"]) == (name, work.batch, work.clip)]


def _step_s(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["step_s"] for run in runs)
