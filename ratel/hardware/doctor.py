"""``ratel doctor``: what this machine has, what is missing, and how fast it is."""

import os
from collections.abc import Iterable
from typing import Any

from ratel.errors import RatelError
from ratel.hardware.host import describe_host, usable_cores
from ratel.hardware.storage import describe_directory
from ratel.ownership.found import advise_on
from ratel.units import MIB, format_bytes

_MIN_MEMLOCK_BYTES = 64 * MIB


def examine(ssd: Iterable[str] = (), *, measure: bool = True) -> dict[str, Any]:
    """Everything as plain data; ``measure`` adds rates, a few seconds per directory."""
    report: dict[str, Any] = {
        "host": describe_host(),
        "cuda": describe_cuda(),
        "native": describe_native(),
        "ssd": [describe_directory(existing(path)) for path in ssd],
    }
    if measure and "error" not in report["native"]:
        _measure(report)
    report["advice"] = list(advise(report))
    return report


def describe_cuda() -> dict[str, Any]:
    import torch

    from ratel.hardware.device import why_no_cuda

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        devices.append({"index": index, "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
                        "total_bytes": total, "free_bytes": free})
    return {"torch_cuda": torch.version.cuda, "devices": devices, "missing": why_no_cuda()}


def describe_native() -> dict[str, Any]:
    """The native libraries and what they chose on this machine."""
    try:
        from ratel import native

        pool = native.op_ds.Pool(1)
    except ImportError as error:
        return {"error": str(error)}
    isa = pool.isa
    pool.close()
    problem = _io_uring_problem()
    return {"adamw_isa": isa, "io_uring": problem is None, "io_uring_problem": problem}


def _io_uring_problem() -> str | None:
    from ratel import native

    try:
        native.nvme_ds.Engine(backend="io_uring").close()
    except (OSError, ValueError, RuntimeError) as error:
        return str(error)
    return None


def _measure(report: dict[str, Any]) -> None:
    from ratel.hardware import rates
    from ratel.hardware.device import require_device

    report["adamw"] = rates.measure_adamw(usable_cores())
    for entry in report["ssd"]:
        entry["rates"] = rates.measure_disk(entry["path"])
    for entry in report["cuda"]["devices"]:
        entry["rates"] = rates.measure_copies(require_device(f"cuda:{entry['index']}"))


def existing(path: str) -> str:
    """Who examines a machine leaves it as it is: a directory that is not there is a mistake, not a
    place to make."""
    if not os.path.isdir(path):
        raise RatelError("is not a directory", field="--ssd", value=path, remedy="Make it, or give the one that you mean")
    return path


def advise(report: dict[str, Any]) -> Iterable[str]:
    """What would make this machine better for training, most important first."""
    native, memory = report["native"], report["host"]["memory"]
    if "error" in native:
        yield f"The native libraries are not built ({native['error']}): install g++ and run `pip install -e .`"
    elif not native["io_uring"]:
        yield f"io_uring is not available ({native['io_uring_problem']}): files go through a thread pool instead"
    if report["cuda"]["missing"]:
        yield f"No CUDA device: {report['cuda']['missing']}. Training runs on the CPU"
    if memory["memlock_bytes"] is not None and memory["memlock_bytes"] < _MIN_MEMLOCK_BYTES:
        locked = format_bytes(memory["memlock_bytes"])
        yield f"The limit of locked memory is {locked}: raise it with `ulimit -l unlimited`"
    for entry in report["ssd"]:
        if not entry["direct"]:
            yield f"{entry['path']} ({entry['file_system']}) has no O_DIRECT: the page cache takes DRAM and time"
        yield from advise_on(entry.get("files", []))


def render(report: dict[str, Any]) -> str:
    """The report as lines of ``label  value``."""
    rows = [*_host_rows(report["host"]), *_native_rows(report), *_cuda_rows(report["cuda"])]
    for entry in report["ssd"]:
        rows.extend(_ssd_rows(entry))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    return "\n".join([*lines, *(f"note: {text}" for text in report["advice"])])


def _host_rows(host: dict[str, Any]) -> Iterable[tuple[str, str]]:
    cpu, memory = host["cpu"], host["memory"]
    yield "machine", f"{host['os']}, Python {host['python']}"
    yield "processor", f"{cpu['model']}, {cpu['cores']} cores, {cpu['numa_nodes']} NUMA node(s), {' '.join(cpu['isa'])}"
    limit = f", limited to {format_bytes(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
    yield "memory", f"{format_bytes(memory['total_bytes'])}, {format_bytes(memory['available_bytes'])} available{limit}"
    locked = memory["memlock_bytes"]
    yield "locked memory", "unlimited" if locked is None else format_bytes(locked)
    yield "huge pages", f"{memory['huge_pages']} reserved, transparent: {memory['transparent_huge_pages'] or 'none'}"
    yield "compilers", "; ".join(host["compilers"].values()) or "none"
    yield "packages", ", ".join(f"{name} {version or '-'}" for name, version in host["packages"].items())


def _native_rows(report: dict[str, Any]) -> Iterable[tuple[str, str]]:
    native = report["native"]
    if "error" in native:
        yield "native code", f"missing: {native['error']}"
        return
    yield "native code", f"AdamW {native['adamw_isa']}, io_uring {'works' if native['io_uring'] else 'not available'}"
    if "adamw" in report:
        adamw = report["adamw"]
        yield "CPU AdamW", f"{adamw['params_per_s'] / 1e9:.2f} G parameters/s with {adamw['threads']} threads"


def _cuda_rows(cuda: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for entry in cuda["devices"]:
        copies = entry.get("rates")
        speed = f", {copies['h2d_bps'] / 1e9:.1f} GB/s in, {copies['d2h_bps'] / 1e9:.1f} GB/s out" if copies else ""
        total = format_bytes(entry["total_bytes"])
        yield f"GPU {entry['index']}", (f"{entry['name']} ({entry['capability']}), {total}, "
                                        f"{format_bytes(entry['free_bytes'])} free{speed}")
    if not cuda["devices"]:
        yield "GPU", f"none: {cuda['missing']}"


def _ssd_rows(entry: dict[str, Any]) -> Iterable[tuple[str, str]]:
    direct = "O_DIRECT works" if entry["direct"] else "no O_DIRECT"
    yield "SSD", (f"{entry['path']} ({entry['device']}, {entry['file_system']}), "
                  f"{format_bytes(entry['free_bytes'])} free, {direct}")
    for file in entry.get("files", []):
        where = f" {file['commits']}" if file["commits"] else ""
        yield "  holds", f"{file['path']} ({format_bytes(file['num_bytes'])}), {file['of']}{where}"
    if "rates" in entry:
        rates = entry["rates"]
        yield "  measured", (f"read {rates['read_bps'] / 1e9:.2f} GB/s, write {rates['write_bps'] / 1e9:.2f} GB/s "
                             f"({rates['backend']})")
