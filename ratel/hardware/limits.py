"""Limits that the kernel sets on this process's control group: what a container or a scheduler
leaves of a machine."""

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60  # version 1 writes a huge number where version 2 writes `max`


def memory_limit(root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The tightest limit of the group and those above it, in bytes; None without one."""
    return min((limit for limit, _ in _memory(root, membership)), default=None)


def memory_headroom(root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that can still be taken under these limits; None without one."""
    return min((max(0, limit - used) for limit, used in _memory(root, membership)), default=None)


def cpu_quota(root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of processor time that the group may use; None without a limit."""
    quotas = []
    for group in _groups(root, membership, "cpu"):
        quota, _, period = read_text(group / "cpu.max").partition(" ")
        quota = quota or read_text(group / "cpu.cfs_quota_us").strip()
        period = period or read_text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.strip().isdigit():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory(root: Path, membership: Path) -> list[tuple[int, int]]:
    """(limit, used) of each limiting group, without the page cache, which is given back when memory
    is asked for."""
    pairs = []
    for group in _groups(root, membership, "memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        if limit is not None and limit < _UNLIMITED_BYTES:
            pairs.append((limit, used - _file_cache(group)))
    return pairs


def _file_cache(group: Path) -> int:
    stat = dict(line.split(" ", 1) for line in read_text(group / "memory.stat").splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _groups(root: Path, membership: Path, controller: str) -> list[Path]:
    """Directories of this process's group and those above it, in version 2 and version 1
    hierarchies."""
    found: list[Path] = []
    for line in read_text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        own = base / path.lstrip("/")
        # Inside a container the path can be the host's, which is not mounted there: the mount
        # itself is the group.
        found.extend([own, *(p for p in own.parents if p.is_relative_to(base))] if own.is_dir() else [base])
    return found


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def read_text(path: Path) -> str:
    """The file's text, or nothing where the kernel does not offer it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
