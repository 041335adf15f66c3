"""What of Ratel lies in an SSD directory, for who looks after it."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ratel.ownership.stamps import Stamp, belongs_to, is_in_use, is_ssd_file, read_stamp


def files_in(folder: "str | os.PathLike[str]") -> list[dict[str, Any]]:
    """The stamped files: path, bytes, and of what they are: a run that goes on (``in use``), one
    whose commits are there (``kept``), one that was killed (``left over``), one whose commits are
    not where they were (``without commits``)."""
    found = []
    for entry in sorted(os.scandir(os.path.realpath(folder)), key=lambda entry: entry.name):
        stamp = read_stamp(entry.path) if is_ssd_file(entry.name) else None
        if stamp is not None:
            found.append({"path": entry.path, "num_bytes": entry.stat(follow_symlinks=False).st_size,
                          "of": _state_of(entry.path, stamp), "commits": stamp.commits or None})
    return found


def _state_of(path: str, stamp: Stamp) -> str:
    if is_in_use(path):
        return "in use"
    if not stamp.owner:
        return "left over"
    return "kept" if belongs_to(path, Path(stamp.commits)) else "without commits"


def advise_on(files: list[dict[str, Any]]) -> Iterator[str]:
    """How to be rid of what no run needs."""
    for file in files:
        command = f"`rm {shlex.quote(file['path'])}`"
        if file["of"] == "left over":
            yield f"{file['path']} is of a run that was killed: the next one with this directory removes it, as does {command}"
        elif file["of"] == "without commits":
            yield (f"{file['path']} is of commits that are not in {file['commits']} any more: unless that run was moved and is to go "
                   f"on, {command}")
