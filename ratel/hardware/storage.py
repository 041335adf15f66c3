"""What a directory for SSD files offers, without measuring: space, file system, O_DIRECT."""

import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.ownership.found import files_in

_BLOCK_BYTES = 4096


def describe_directory(path: str) -> dict[str, Any]:
    """Facts about ``path``, which is created if it is missing and left empty if it was."""
    directory = require_directory(path)
    device, file_system = _mount_of(directory)
    usage = shutil.disk_usage(directory)
    return {
        "path": str(directory),
        "device": device,
        "file_system": file_system,
        "total_bytes": usage.total,
        "free_bytes": usage.free,
        "direct": supports_direct(directory),
        "files": files_in(directory),
    }


def require_directory(path: str) -> Path:
    """``path`` as a directory that can be written to."""
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise RatelError(f"cannot be written to: {error.strerror}", field="--ssd", value=path,
                         remedy="Give a directory you may write to") from error
    return directory


def supports_direct(directory: Path) -> bool:
    """Whether the file system takes O_DIRECT writes: some accept the flag at open and refuse the
    transfer."""
    descriptor, name = tempfile.mkstemp(dir=directory)
    os.close(descriptor)
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, _BLOCK_BYTES) as page:
                return os.pwrite(descriptor, page, 0) == _BLOCK_BYTES
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        os.unlink(name)


def _mount_of(directory: Path) -> tuple[str, str]:
    """Device and file system type of the longest mount point above ``directory``."""
    import psutil

    real = os.path.realpath(directory)
    mounts = [m for m in psutil.disk_partitions(all=True) if os.path.commonpath([real, m.mountpoint]) == m.mountpoint]
    best = max(mounts, key=lambda m: len(m.mountpoint), default=None)
    return (best.device, best.fstype) if best else ("unknown", "unknown")
