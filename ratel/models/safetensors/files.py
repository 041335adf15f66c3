"""Safetensors files that belong together: what is in them, checked from their headers, and one
tensor at a time."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.models.safetensors.header import REMEDY, read_header
from ratel.reading import descriptor_of, read_json
from ratel.schema import check, mapping, record, text

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored dtypes a weight can be read from."""

OTHER_DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
"""What a buffer may be beside those."""

PIECE_ELEMENTS = 1 << 22
"""How many elements are read at once."""

_PATH = text(r"(?!/)(?!(.*/)?\.\.(/|$))[^\x00]+", "the name of a file in the directory")
INDEX = record({"weight_map": mapping(text(), _PATH)}, is_open=True)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    file: Path
    shape: tuple[int, ...]
    dtype_name: str
    offset: int
    """Where its first byte lies in the file."""

    @property
    def dtype(self) -> torch.dtype:
        if self.dtype_name not in DTYPES:
            raise RatelError(f"weights stored as {self.dtype_name}, not in floating point", field="model",
                             value=self.file, remedy="Use an unquantized checkpoint")
        return DTYPES[self.dtype_name]


class TensorFiles:
    """Raises RatelError, under the name of the option ``field``, if a header is not what the format
    says."""

    def __init__(self, paths: Iterable[Path], field: str = "model") -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._field = field
        for path in paths:
            self._add(path)

    def _add(self, path: Path) -> None:
        for name, entry in read_header(path, self._field).tensors.items():
            if name in self.tensors:
                raise RatelError(f"{name} is in {self.tensors[name].file.name}, too", field=self._field, value=path,
                                 remedy="Remove one of the files, or save them again")
            self.tensors[name] = StoredTensor(file=path, shape=entry.shape, dtype_name=entry.dtype_name, offset=entry.begin)

    def read(self, name: str) -> Tensor:
        """One tensor. Not mapped: a file that becomes shorter would end the process."""
        stored = self.tensors[name]
        values = torch.empty(stored.shape, dtype=OTHER_DTYPES.get(stored.dtype_name) or stored.dtype)
        read_full(stored.file, stored.offset, memoryview(values.view(-1).view(torch.uint8).numpy()), self._field)
        return values

    def read_into(self, name: str, out: Tensor) -> None:
        """All elements of one tensor into ``out`` (fp32, CPU, 1-D), a piece at a time, and nothing
        of the file is mapped: its pages would count as this process's."""
        stored = self.tensors[name]
        item = stored.dtype.itemsize
        for begin in range(0, out.numel(), PIECE_ELEMENTS):
            part = out[begin : begin + PIECE_ELEMENTS]
            piece = part if stored.dtype is torch.float32 else torch.empty(part.numel(), dtype=stored.dtype)
            read_full(stored.file, stored.offset + begin * item, memoryview(piece.view(torch.uint8).numpy()), self._field)
            if piece is not part:
                part.copy_(piece)

    def are_equal(self, one: str, other: str, dtype: torch.dtype) -> bool:
        """Whether two stored tensors are the same in ``dtype``. Read a piece at a time."""
        first, second = self.tensors[one], self.tensors[other]
        if first.shape != second.shape:
            return False
        return all(torch.equal(*(self._piece(stored, begin).to(dtype) for stored in (first, second)))
                   for begin in range(0, prod(first.shape), PIECE_ELEMENTS))

    def _piece(self, stored: StoredTensor, begin: int) -> Tensor:
        piece = torch.empty(min(PIECE_ELEMENTS, prod(stored.shape) - begin), dtype=stored.dtype)
        read_full(stored.file, stored.offset + begin * piece.element_size(), memoryview(piece.view(torch.uint8).numpy()),
                  self._field)
        return piece


def read_full(path: Path, offset: int, target: memoryview, field: str = "model") -> None:
    """Fill ``target`` from byte ``offset`` on. Raises OSError with the file's name, RatelError for
    one that is shorter."""
    descriptor = descriptor_of(path)
    try:
        while len(target):
            count = os.preadv(descriptor, [target], offset)
            if count == 0:
                raise RatelError(f"the file ends at byte {offset:,}, in the middle of a tensor", field=field, value=path,
                                 remedy=REMEDY)
            target, offset = target[count:], offset + count
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def files_of(directory: Path, stem: str, field: str) -> list[Path]:
    """``stem.safetensors``, or the files that the index ``stem.safetensors.index.json`` names; none
    without both. Of a directory that has both, transformers, too, reads the first."""
    single, index = directory / (stem + SUFFIX), directory / (stem + INDEX_SUFFIX)
    if single.is_file():
        return [single]
    return indexed_files(index, field) if index.is_file() else []


def indexed_files(index: Path, field: str) -> list[Path]:
    try:
        names = sorted(set(check(read_json(index), INDEX)["weight_map"].values()))
    except (ValueError, OSError) as error:
        raise RatelError(f"not an index of safetensors files: {getattr(error, 'strerror', None) or error}", field=field,
                         value=index, remedy=REMEDY) from error
    for name in names:
        if not (index.parent / name).is_file():
            raise RatelError("a file that the index names is missing", field=field, value=index.parent / name,
                             remedy=REMEDY)
    return [index.parent / name for name in names]
