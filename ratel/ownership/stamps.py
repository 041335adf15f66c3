"""The stamp at the end of every file on an SSD: which volume it is of, and whose commits speak of
it.

A copy of a run's directory holds the same records, so records alone do not say whose the SSD files
are. The stamp names the directory of commits that they belong to by what no copy shares with it:
its number in the file system and the time of its birth. Both stay when it is renamed or moved
within its file system. Where neither is certain, a file counts as somebody else's, which is read
and never written to or removed.
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ratel.ownership.regular import opened

STAMP_BYTES = 4096
WORKING = ("ratel-states", "ratel-frozen", "ratel-gradients", "ratel-activations")
"""Volumes that no commit speaks of."""

_COMMITTED = re.compile(r"(ratel-[0-9a-f]{16})\.(\d{1,4})")
_FILE = re.compile(rf"({'|'.join(WORKING)}|ratel-[0-9a-f]{{16}})\.(\d{{1,4}})")
_MAGIC = "ratel-ssd"
_DIRECTORY, _AT_CWD, _BIRTH_TIME = "directory", -100, 0x800


@dataclass(frozen=True, kw_only=True)
class Stamp:
    volume: str
    index: int
    commits: str = ""
    """Where the directory of commits was when it was written; for messages, and to see whether
    there are two."""
    owner: str = ""
    """`mark_of` that directory; empty as long as no commit speaks of the file."""

    def pack(self) -> bytes:
        content = {"format": _MAGIC, "volume": self.volume, "index": self.index, "commits": self.commits, "owner": self.owner}
        text = json.dumps(content)
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        if len(line) > STAMP_BYTES:  # a path of that length: what it is for is a message
            return replace(self, commits="").pack()
        return line.ljust(STAMP_BYTES, b"\0")


def new_volume_name() -> str:
    """A name for files that commits are going to speak of, and the name of no other file."""
    return f"ratel-{secrets.token_hex(8)}"


def volume_of(name: str) -> tuple[str, int] | None:
    """Volume and index of a file that commits may speak of, by its name."""
    match = _COMMITTED.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def is_ssd_file(name: str) -> bool:
    """Whether it is a name that a file of a volume has."""
    return _FILE.fullmatch(name) is not None


def read_stamp(path: "str | os.PathLike[str]") -> Stamp | None:
    """None for whatever is not a regular file with one name and a whole stamp that is of this
    name."""
    try:
        with opened(path) as descriptor:
            stamp = stamp_in(descriptor)
    except OSError:
        return None
    is_of_it = stamp is not None and os.path.basename(path) == f"{stamp.volume}.{stamp.index}"
    return stamp if is_of_it else None


def stamp_in(descriptor: int) -> Stamp | None:
    size = os.fstat(descriptor).st_size
    if size < STAMP_BYTES:
        return None
    try:
        seal, _, text = os.pread(descriptor, STAMP_BYTES, size - STAMP_BYTES).rstrip(b"\0").rstrip(b"\n").partition(b" ")
        if zlib.crc32(text) != int(seal, 16):
            return None
        return _stamp_of(json.loads(text))
    except (OSError, ValueError, RecursionError):
        return None


def _stamp_of(content: Any) -> Stamp | None:
    if not isinstance(content, dict) or content.pop("format", None) != _MAGIC:
        return None
    kinds = {"volume": str, "index": int, "commits": str, "owner": str}
    return Stamp(**content) if {name: type(value) for name, value in content.items()} == kinds else None


def write_stamp(path: "str | os.PathLike[str]", stamp: Stamp) -> None:
    """Write a stamp in the place of the one that the file has; on disk when this returns."""
    with opened(path, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, stamp.pack(), os.fstat(descriptor).st_size - STAMP_BYTES)
        os.fsync(descriptor)


def is_superseded(descriptor: int) -> bool:
    """Whether a file that nobody has locked went out of use with its process, since no commit
    speaks of it."""
    stamp = stamp_in(descriptor)
    return stamp is not None and not stamp.owner


def belongs_to(path: "str | os.PathLike[str]", commits: Path) -> bool:
    """Whether the SSD file is of this directory of commits, and of no other that looks the same."""
    stamp = read_stamp(path)
    return stamp is not None and stamp.owner != "" and stamp.owner == mark_of(commits) and not _has_twin(stamp, commits)


def _has_twin(stamp: Stamp, commits: Path) -> bool:
    """A snapshot of a file system has directories with the numbers and times of the original's. As
    long as one is where the stamp says, that one is the owner."""
    try:
        there, here = os.stat(stamp.commits), os.stat(commits)
    except (OSError, ValueError):
        return False
    return not os.path.samestat(there, here) and mark_of(Path(stamp.commits)) == stamp.owner


def mark_of(directory: Path) -> str | None:
    """What tells a directory from its copies; the same after a rename, and as a rule after a
    restart of the machine."""
    try:
        found = os.stat(directory)
    except OSError:
        return None
    return f"{_DIRECTORY} {found.st_ino} {_birth_of(directory) or f'on {found.st_dev}'}"


def _birth_of(path: Path) -> str | None:
    """Seconds and nanoseconds; None where the system, the C library or the file system does not say
    it."""
    buffer = ctypes.create_string_buffer(256)
    try:
        status = ctypes.CDLL(None).statx(_AT_CWD, os.fsencode(path), 0, _BIRTH_TIME, buffer)
    except (AttributeError, OSError):
        return None
    if status != 0 or not int.from_bytes(buffer.raw[0:4], "little") & _BIRTH_TIME:
        return None
    return f"{int.from_bytes(buffer.raw[80:88], 'little', signed=True)}.{int.from_bytes(buffer.raw[88:92], 'little'):09d}"


def remove_if_free(path: "str | os.PathLike[str]") -> bool:
    """Unlink it unless a process works on it. Whether it is gone."""
    with suppress(FileNotFoundError):
        try:
            with opened(path) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
        except BlockingIOError:
            return False
    return True


def is_empty(path: "str | os.PathLike[str]") -> bool:
    """Whether it holds no data at all: it was made by a process that ended, with the machine
    perhaps, before it was stamped."""
    try:
        with opened(path) as descriptor:
            os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO
    return False


def is_in_use(path: "str | os.PathLike[str]") -> bool:
    try:
        with opened(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
