"""bf16 weights as they lie in their files, read straight into the place where they will stay.

The upper half of a split master that was imported from bf16 is the stored number itself, and the
lower half is zero. So there is nothing to convert, and no copy to make but the kernel's own, out of
the page cache.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ratel.models.safetensors.files import read_full

ITEM = torch.bfloat16.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive elements of a unit that are consecutive in a file."""

    file: Path
    offset: int
    """Where the run begins in the file, in bytes."""
    begin: int
    end: int
    """Where the run ends in the unit, in elements."""


class StoredBits:
    """The bits of one unit as they are stored. ``runs`` are in the order of the unit; elements
    between them are padding, and zeros."""

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs

    def place(self, begin: int, end: int) -> tuple[str, int]:
        """Where in which file elements ``[begin, end)`` begin: who reads in this order reads files
        from end to end."""
        first = next((run for run in self._runs if run.end > begin and run.begin < end), None)
        return ("", 0) if first is None else (str(first.file), first.offset + ITEM * max(begin - first.begin, 0))

    def read(self, begin: int, out: Tensor) -> None:
        """Fill ``out`` (bf16, CPU, 1-D) with the elements from ``begin`` on. From any thread.
        Raises OSError with the file's name, RatelError for one that has become shorter."""
        assert out.dtype is torch.bfloat16 and out.is_contiguous()
        target = memoryview(out.view(torch.uint8).numpy())
        cursor, end = begin, begin + out.numel()
        for run in self._runs:
            first, last = max(run.begin, begin), min(run.end, end)
            if first < last:
                out[cursor - begin : first - begin] = 0
                read_full(run.file, run.offset + ITEM * (first - run.begin), target[ITEM * (first - begin) : ITEM * (last - begin)])
                cursor = last
        out[cursor - begin :] = 0
