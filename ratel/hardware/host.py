"""The host as it is, without measuring: processor, memory, limits, tools. Needs neither torch nor
native code."""

import os
import platform
import re
import resource
import shutil
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ratel.hardware.limits import cpu_quota, memory_headroom, memory_limit, read_text

_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
_COMPILERS = ("g++", "clang++", "nvcc")
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PACKAGES = ("torch", "transformers", "safetensors", "flash-attn", "deepspeed")


def describe_host() -> dict[str, Any]:
    return {
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpu": describe_cpu(),
        "memory": describe_memory(),
        "compilers": {name: version for name in _COMPILERS if (version := _compiler_version(name))},
        "packages": {name: _package_version(name) for name in _PACKAGES},
    }


def describe_cpu() -> dict[str, Any]:
    info = _key_values(Path("/proc/cpuinfo"))
    flags = info.get("flags", "").split()
    return {
        "model": info.get("model name") or platform.machine(),
        "cores": usable_cores(),
        "numa_nodes": max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
    }


def usable_cores() -> int:
    """Cores this process may use: the machine's, less what an affinity mask or a container leaves
    out."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def worker_cores() -> int:
    """For threads of native code: one core is left to Python."""
    return max(1, usable_cores() - 1)


def describe_memory() -> dict[str, Any]:
    import psutil

    memory, locked = psutil.virtual_memory(), resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    info = _key_values(Path("/proc/meminfo"))
    return {
        "total_bytes": memory.total,
        "available_bytes": available_memory(),
        "limit_bytes": memory_limit(),
        "swap_bytes": psutil.swap_memory().total,
        "memlock_bytes": None if locked == resource.RLIM_INFINITY else locked,
        "huge_page_bytes": _kib(info.get("Hugepagesize")),
        "huge_pages": int(info.get("HugePages_Total", 0)),
        "transparent_huge_pages": _chosen(read_text(_THP)),
    }


def library_versions() -> dict[str, str]:
    """The versions of those packages that the results of a run depend on."""
    return {name: metadata.version(name) for name in ("torch", "transformers")}


def available_memory() -> int:
    """Bytes of DRAM that can still be taken: what the kernel says, or what the container's limit
    leaves."""
    import psutil

    available, headroom = psutil.virtual_memory().available, memory_headroom()
    return available if headroom is None else min(available, headroom)


def _compiler_version(name: str) -> str | None:
    if shutil.which(name) is None:
        return None
    out = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    return next((line for line in out.splitlines() if re.search(r"\d+\.\d+", line)), name)


def _package_version(name: str) -> str | None:
    # Installed is not yet importable: a package beside a missing dependency of its own is of no
    # use.
    if util.find_spec(name.replace("-", "_")) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown version"


def _key_values(path: Path) -> dict[str, str]:
    """The first value of each ``key: value`` line."""
    pairs: dict[str, str] = {}
    for line in read_text(path).splitlines():
        key, _, value = line.partition(":")
        pairs.setdefault(key.strip(), value.strip())
    return pairs


def _kib(text: str | None) -> int | None:
    return int(text.split()[0]) * 1024 if text else None


def _chosen(text: str) -> str | None:
    """The word in brackets: ``madvise`` of ``always [madvise] never``."""
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else None
