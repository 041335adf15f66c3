"""Measures the optimizer against the memory it streams through, and against torch's fused AdamW if
the caller has one.

This package knows no torch: a caller that wants the comparison passes the module in.
"""

import ctypes
import mmap
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from op_ds.library import ABI_VERSION
from op_ds.pool import MOMENT_BLOCK, Pool
from op_ds.rounding import Rounding, rounding_key

ADAM = dict(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8)
DEFAULT_NUM_PARAMS = 1 << 25
"""872 MB of planes: several times the last-level cache of any current processor."""

# Bytes of DRAM traffic per element. The update reads hi 2, lo 2, m 4, v 4 and the gradient, and
# writes all but that; with bf16 moments m 2 and v 2, with 8-bit ones 1 and a thirty-second each.
BYTES = {"op_ds bf16 grad": 26, "bf16 moments": 18, "8-bit moments": 14.125, "to other planes": 26,
         "op_ds fp32 grad": 28, "torch fused fp32": 28, "sum_squares bf16": 2,
         "crc32": 4, "triad (streaming)": 12, "rescale": 8}
CRC_PIECE_BYTES = 1 << 20
BANDWIDTH_TESTS = ("triad (streaming)", "rescale")

Action = Callable[[int], object]


class Buffer:
    """Fresh anonymous memory of ``num_bytes``, touched by the pool that will use it."""

    def __init__(self, pool: Pool, num_bytes: int, byte: int = 0, *, huge_pages: bool = False) -> None:
        self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        pool.fill(self.address, num_bytes, byte)


def measure(*, num_params: int = DEFAULT_NUM_PARAMS, num_threads: int | None = None, repeats: int = 7,
            isa: str = "auto", huge_pages: bool = False, only: Collection[str] = (),
            torch: ModuleType | None = None) -> dict[str, Any]:
    """Alternates all contestants ``repeats`` times in one run, so that a noisy neighbour meets each
    of them alike; or those that ``only`` names, beside "rescale", which tells the bandwidth.

    Needs about 48 bytes of memory per parameter, 64 with ``torch`` (the module, for its fused AdamW
    on fp32). Returns a dict that ``json`` can write: ``settings``, ``machine``, ``results`` by
    contestant and ``best_bandwidth_bps``.
    """
    num_threads = num_threads or len(os.sched_getaffinity(0))
    num_params = num_params // MOMENT_BLOCK * MOMENT_BLOCK
    with Pool(num_threads, isa=isa) as pool, _torch_threads(torch, num_threads):
        actions = _native_actions(pool, num_params, huge_pages)
        if torch is not None:
            actions["torch fused fp32"] = _torch_action(torch, num_params)
        if only:
            actions = {name: action for name, action in actions.items() if name in (*only, "rescale")}
        seconds = _alternate(actions, repeats)
        used_isa = pool.isa
    results = {name: _result(name, times, num_params) for name, times in seconds.items()}
    bandwidth = max(results[name]["bandwidth_bps"] for name in BANDWIDTH_TESTS if name in results)
    for result in results.values():
        result["percent_of_bandwidth"] = 100 * result["bandwidth_bps"] / bandwidth
    settings = {"num_params": num_params, "num_threads": num_threads, "repeats": repeats, "isa": used_isa,
                "huge_pages": huge_pages}
    return {"benchmark": "adam", "settings": settings, "machine": _machine(torch), "commit": _commit(),
            "best_bandwidth_bps": bandwidth, "results": results}


def describe(report: dict[str, Any]) -> str:
    """The report as a table. Rates are medians, the best repeat behind them."""
    settings, machine = report["settings"], report["machine"]
    lines = [f"{machine['cpu']}, {settings['num_threads']} threads, {settings['isa']}, "
             f"{settings['num_params'] / 1e6:.1f} M parameters, "
             f"{'huge' if settings['huge_pages'] else 'plain'} pages, median (best) of {settings['repeats']}",
             f"{'':18s} {'G element/s':>15s} {'GB/s':>15s}   % of bandwidth"]
    for name, r in report["results"].items():
        rate, best = r["elements_per_s"] / 1e9, r["best_elements_per_s"] / 1e9
        lines.append(f"{name:18s} {rate:7.2f} ({best:5.2f}) {rate * BYTES[name]:7.1f} ({best * BYTES[name]:5.1f})"
                     f"   {r['percent_of_bandwidth']:5.1f}")
    tests = " and ".join(BANDWIDTH_TESTS)
    lines.append(f"bandwidth: {report['best_bandwidth_bps'] / 1e9:.1f} GB/s, the better of {tests}")
    return "\n".join(lines)


def _native_actions(pool: Pool, n: int, huge_pages: bool) -> dict[str, Action]:
    def buffer(size: int, byte: int = 0) -> Buffer:
        return Buffer(pool, size * n, byte, huge_pages=huge_pages)

    # 0x3c3c is 0.0115 as bf16 and 0x3c3c3c3c as fp32: ordinary numbers, no denormals to slow
    # anything down.
    hi, lo, grad = buffer(2, 0x3c), buffer(2), buffer(4, 0x3c)
    m, v, spare = buffer(4), buffer(4), buffer(4)
    planes, others, short = [hi, lo, m, v], [buffer(size) for size in (2, 2, 4, 4)], [hi, lo, buffer(2), buffer(2)]
    narrow = [hi, lo, buffer(2), buffer(2)]
    ranges = [(n // 2 // MOMENT_BLOCK * MOMENT_BLOCK, 0.1), (n, 0.0)]

    def update(grad_dtype: str, source: list[Buffer], target: list[Buffer], moments: str = "fp32") -> Action:
        rounding = None if moments == "fp32" else Rounding(key=rounding_key(1))
        return lambda step: pool.adamw(*(plane.address for plane in source), grad.address, n,
                                       to=tuple(plane.address for plane in target), grad_dtype=grad_dtype,
                                       step=step, grad_scale=0.5, ranges=ranges, moments=moments, rounding=rounding, **ADAM)

    return {
        "op_ds bf16 grad": update("bf16", planes, planes),
        "bf16 moments": update("bf16", short, short, "bf16"),
        "8-bit moments": update("bf16", narrow, narrow, "8bit"),
        "to other planes": update("bf16", planes, others),
        "op_ds fp32 grad": update("fp32", planes, planes),
        "sum_squares bf16": lambda step: pool.sum_squares(grad.address, n, "bf16"),
        "crc32": lambda step: pool.crc32(grad.address, 4 * n, CRC_PIECE_BYTES),
        "triad (streaming)": lambda step: pool.triad(spare.address, grad.address, v.address, 0.5, n),
        "rescale": lambda step: pool.rescale(spare.address, 0.999, n),
    }


@contextmanager
def _torch_threads(torch: ModuleType | None, count: int) -> Iterator[None]:
    """What runs in this process afterwards has the threads that it had: more than cores, and
    OpenMP's waiting by spinning made small tensors twelve times slower."""
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _torch_action(torch: ModuleType, n: int) -> Action:
    param = torch.nn.Parameter(torch.full((n,), 0.01))
    param.grad = torch.full((n,), 0.01)
    optimizer = torch.optim.AdamW([param], lr=ADAM["lr"], betas=(ADAM["beta1"], ADAM["beta2"]), eps=ADAM["eps"],
                                  weight_decay=0.1, fused=True)
    return lambda step: optimizer.step()


SETTLE_S = 0.3
"""Before each measurement. OpenMP's threads, torch's among them, go on spinning for 0.2 s after
their work by default; what runs next on as many threads then shares its cores with them and looks
half as fast."""


def _alternate(actions: dict[str, Action], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for step in range(repeats + 1):
        for name, action in actions.items():
            time.sleep(SETTLE_S)
            action(2 * step + 1)  # wakes threads and cores: a sleeping core takes a good part of a short measurement
            begun = time.perf_counter()
            action(2 * step + 2)
            if step > 0:  # the first round maps memory
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _result(name: str, seconds: list[float], n: int) -> dict[str, float]:
    median = n / statistics.median(seconds)
    return {"elements_per_s": median, "best_elements_per_s": n / min(seconds), "bytes_per_element": BYTES[name],
            "bandwidth_bps": median * BYTES[name]}


def _machine(torch: ModuleType | None) -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines()
             if line.startswith("model name")] if cpu_info.exists() else []
    return {"cpu": names[0] if names else platform.machine(), "num_cpus": os.cpu_count(), "system": platform.platform(),
            "python": platform.python_version(), "op_ds_abi": ABI_VERSION,
            "torch": str(torch.__version__) if torch is not None else None}


def _commit() -> str | None:
    """The checkout's commit, or None in an installed package or without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
