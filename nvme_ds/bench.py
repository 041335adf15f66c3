"""Measures the engine against the plain reference on the same files, past every cache.

The engine runs as training does: tickets of tens of MiB through registered memory, reads as
optimizer traffic, writes as write-back. Engine and reference take turns, so that a device that
changes its mind does so to both; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import nvme_ds
from nvme_ds import native
from nvme_ds.reference import METHODS, WRITES_PER_16, reference_io

PATTERNS = tuple(WRITES_PER_16)
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class IoBenchSpec:
    """num_bytes: transferred per pattern, repeat and directory; larger than a disk's own cache for
    a sustained rate. file_bytes: what each directory must hold; transfers wrap around in it."""

    directories: tuple[str, ...]
    num_bytes: int = 1024 * MIB
    file_bytes: int = 1024 * MIB
    request_bytes: int = 1 * MIB
    queue_depth: int = 32
    ticket_bytes: int = 16 * MIB
    num_threads: int = 32
    backend: str = "auto"
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.file_bytes % (2 * self.ticket_bytes) or self.ticket_bytes % self.request_bytes:
            raise ValueError("file_bytes must be a multiple of twice ticket_bytes, which must be one of request_bytes "
                             f"(given: {self.file_bytes}, {self.ticket_bytes}, {self.request_bytes})")
        if self.num_bytes < self.ticket_bytes or self.repeats < 1:
            raise ValueError(f"num_bytes must be at least {self.ticket_bytes} (given: {self.num_bytes}) and repeats at "
                             f"least 1 (given: {self.repeats})")

    @property
    def window(self) -> int:
        """Tickets under way: four times the queue depth of every directory, so that a late wake-up
        of this thread, or reads that overtake the writes submitted before them, leave no gap."""
        depth_bytes = 4 * self.queue_depth * self.request_bytes * len(self.directories)
        return max(4, -(-depth_bytes // self.ticket_bytes))


class EngineRunner:
    """The engine on a volume of the directories; ``run`` gives seconds for one pattern."""

    def __init__(self, spec: IoBenchSpec, engine: nvme_ds.Engine, name: str) -> None:
        self.spec, self.engine = spec, engine
        self.volume = engine.create_volume(spec.directories, name, spec.file_bytes * len(spec.directories),
                                           spec.request_bytes, direct="on")
        self.memory = nvme_ds.AlignedBuffer(spec.window * spec.ticket_bytes)
        block = os.urandom(MIB)  # not zeros: a device or hypervisor may special-case them
        for begin in range(0, self.memory.num_bytes, MIB):
            self.memory.view[begin:begin + MIB] = block[: self.memory.num_bytes - begin]
        engine.register_buffer(self.memory.address, self.memory.num_bytes)

    def run(self, pattern: str, num_bytes: int | None = None) -> float:
        total = (num_bytes or self.spec.num_bytes) * len(self.spec.directories)
        begin_s, under_way = perf_counter(), deque()
        for index in range(total // self.spec.ticket_bytes):
            if len(under_way) == self.spec.window:
                self.engine.wait(under_way.popleft())
            under_way.append(self._submit(pattern, index))
        self.engine.wait_all(under_way)
        return perf_counter() - begin_s

    def _submit(self, pattern: str, index: int) -> int:
        size, address = self.spec.ticket_bytes, self.memory.address + index % self.spec.window * self.spec.ticket_bytes
        writes = pattern == "write" or (pattern == "mixed" and index % 2 == 1)
        if pattern == "mixed":
            half = self.volume.num_bytes // 2
            offset = index // 2 * size % half + (half if writes else 0)
        else:
            offset = index * size % self.volume.num_bytes
        if writes:
            return self.engine.submit_write(self.volume, offset, address, size, nvme_ds.WRITEBACK)
        return self.engine.submit_read(self.volume, offset, address, size, nvme_ds.OPTIMIZER)

    def reference(self, pattern: str, method: str) -> float:
        spec = self.spec
        return reference_io(self.volume.paths, pattern, num_bytes=spec.num_bytes, region_bytes=spec.file_bytes,
                            request_bytes=spec.request_bytes, depth=spec.queue_depth,
                            memory_bytes=self.memory.num_bytes // len(spec.directories), method=method)


def measure(spec: IoBenchSpec, progress: Callable[[str], None] = lambda line: None) -> dict:
    """Rates in bytes/s of engine and references for each pattern, with ``percent`` of the best
    reference.

    OSError as from the engine: NoSpaceError, or no O_DIRECT."""
    with nvme_ds.Engine(backend=spec.backend, queue_depth=spec.queue_depth, num_threads=spec.num_threads,
                        request_bytes=spec.request_bytes) as engine:
        methods = [method for method in METHODS if method != "io_uring" or _uring_works(spec.queue_depth)]
        runner = EngineRunner(spec, engine, f"nvme-ds-bench-{os.getpid()}")
        progress("writing the files once")
        runner.run("write", spec.file_bytes)  # unwritten blocks would be read without touching the device
        results = [_measure_pattern(runner, pattern, methods, progress) for pattern in PATTERNS]
        stats = engine.stats()
    return {"benchmark": "io", "hardware": _hardware(), "spec": asdict(spec), "backend": engine.backend,
            "fixed_buffers": stats["fixed_buffers"], "results": results}


def _measure_pattern(runner: EngineRunner, pattern: str, methods: list[str], progress: Callable[[str], None]) -> dict:
    moved = runner.spec.num_bytes // runner.spec.ticket_bytes * runner.spec.ticket_bytes * len(runner.spec.directories)
    rates: dict[str, list[float]] = {name: [] for name in ("engine", *methods)}
    for repeat in range(runner.spec.repeats):
        progress(f"{pattern}, repeat {repeat + 1} of {runner.spec.repeats}")
        first = repeat % len(rates)  # whoever goes first may find the device rested
        for name in [*rates, *rates][first:first + len(rates)]:
            rates[name].append(moved / (runner.run(pattern) if name == "engine" else runner.reference(pattern, name)))
    middle = {name: median(values) for name, values in rates.items()}
    best = max(methods, key=lambda method: middle[method])
    return {"pattern": pattern, "engine_bps": middle["engine"], "reference_bps": middle[best], "reference": best,
            "percent": 100 * middle["engine"] / middle[best], "all_bps": rates}


def _uring_works(queue_depth: int) -> bool:
    return native.library().uring_probe(queue_depth) == 0


def _hardware() -> dict:
    return {"machine": platform.machine(), "kernel": platform.release(), "cpus": os.cpu_count(),
            "python": platform.python_version()}


def table(result: dict) -> str:
    spec = result["spec"]
    lines = [f"{result['backend']}, {len(spec['directories'])} directories, "
             f"{spec['request_bytes'] >> 10} KiB requests, queue depth {spec['queue_depth']}, "
             f"{spec['num_bytes'] / 1e9:.1f} GB per run and directory, "
             f"median of {spec['repeats']}",
             f"{'pattern':<8}{'engine GB/s':>13}{'reference GB/s':>16}  {'reference':<10}{'percent':>8}"]
    lines += [f"{row['pattern']:<8}{row['engine_bps'] / 1e9:>13.2f}{row['reference_bps'] / 1e9:>16.2f}  "
              f"{row['reference']:<10}{row['percent']:>7.1f}%" for row in result["results"]]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", help="directories on the SSDs to measure")
    parser.add_argument("--mib", type=int, default=1024, help="MiB per pattern, repeat and directory (default 1024)")
    parser.add_argument("--file-mib", type=int, default=1024, help="MiB of disk space per directory (default 1024)")
    parser.add_argument("--request-kib", type=int, default=1024)
    parser.add_argument("--queue-depth", type=int, default=32)
    parser.add_argument("--threads", type=int, default=32, help="per directory, for --backend threads")
    parser.add_argument("--backend", choices=["auto", "io_uring", "threads"], default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the result here too")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_arguments(parser)
    options = parser.parse_args(arguments)
    result = measure(IoBenchSpec(
        directories=tuple(options.directories), num_bytes=options.mib * MIB, file_bytes=options.file_mib * MIB,
        request_bytes=options.request_kib << 10, queue_depth=options.queue_depth, num_threads=options.threads,
        backend=options.backend, repeats=options.repeats), progress=print)
    print(table(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
