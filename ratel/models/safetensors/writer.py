"""Writing safetensors, header first: the tensors go to their places as they come, and no more than
one group of them is in memory.

One file below `SHARD_BYTES`, numbered ones and an index above, each tensor in the file that its
place in the order gives it. Within a file wider dtypes come first, so that every tensor begins at a
multiple of its element's size.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ratel.memory.resident import trim
from ratel.models.safetensors.files import INDEX_SUFFIX, SUFFIX

SHARD_BYTES = 5_000_000_000
"""What hubs and servers expect of one file at most."""

HEADER_ALIGN = 8
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
               torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
               torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
               torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64"}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Outline":
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tensors that are made together: ``make`` gives each once, by name, on the CPU, and may keep
    none that it has given."""

    outlines: dict[str, Outline]
    make: Callable[[], Iterable[tuple[str, Tensor]]]

    @property
    def num_bytes(self) -> int:
        return sum(outline.num_bytes for outline in self.outlines.values())


def write_shards(directory: Path, stem: str, pieces: Sequence[Piece], *, metadata: dict[str, str],
                 shard_bytes: int) -> None:
    """Write ``stem.safetensors``, or numbered shards and the index ``stem.safetensors.index.json``,
    all synced.

    A shard has ``shard_bytes`` at most, or one tensor that is larger. Every one carries the
    ``metadata``. Raises OSError with the file's name.
    """
    outlines = {name: outline for piece in pieces for name, outline in piece.outlines.items()}
    groups = list(_grouped(outlines, shard_bytes))
    single = len(groups) == 1
    names = [stem + SUFFIX if single else f"{stem}-{index:05d}-of-{len(groups):05d}{SUFFIX}"
             for index in range(1, len(groups) + 1)]
    with ExitStack() as stack:
        files = [stack.enter_context(_File(directory / name, {key: outlines[key] for key in group}, metadata))
                 for name, group in zip(names, groups)]
        file_of = {key: file for file, group in zip(files, groups) for key in group}
        for piece in pieces:
            for key, tensor in piece.make():
                file_of[key].write(key, tensor)
                del tensor  # or the last one would keep its memory beside what is made next
            trim()
    if not single:
        weight_map = {key: name for name, group in zip(names, groups) for key in group}
        total_bytes = sum(outline.num_bytes for outline in outlines.values())
        _write_index(directory / (stem + INDEX_SUFFIX), {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _write_index(path: Path, index: dict[str, object]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _grouped(outlines: dict[str, Outline], shard_bytes: int) -> Iterator[list[str]]:
    """Names in their order, as many together as a shard may hold."""
    group: list[str] = []
    held = 0
    for name, outline in outlines.items():
        if group and held + outline.num_bytes > shard_bytes:
            yield group
            group, held = [], 0
        group.append(name)
        held += outline.num_bytes
    yield group


class _File:
    """One file: its header at once, its tensors in any order. It is open while one of them is
    missing."""

    def __init__(self, path: Path, outlines: dict[str, Outline], metadata: dict[str, str]) -> None:
        self._path, self._outlines = path, outlines
        header: dict[str, object] = {"__metadata__": metadata}
        self._offsets: dict[str, int] = {}
        cursor = 0
        for name in sorted(outlines, key=lambda name: (-outlines[name].dtype.itemsize, name)):
            outline = outlines[name]
            self._offsets[name] = cursor
            header[name] = {"dtype": DTYPE_NAMES[outline.dtype], "shape": list(outline.shape),
                            "data_offsets": [cursor, cursor + outline.num_bytes]}
            cursor += outline.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_ALIGN)
        self._head = struct.pack("<Q", len(text)) + text
        self._num_bytes = len(self._head) + cursor
        self._missing = set(outlines)
        self._descriptor: int | None = None

    def __enter__(self) -> "_File":
        if not self._missing:
            self._open()
            self._close()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        if kind is None:
            assert not self._missing, f"{self._path}: never written: {sorted(self._missing)[:4]}"

    def write(self, name: str, tensor: Tensor) -> None:
        assert Outline.of(tensor) == self._outlines[name], f"{name}: {Outline.of(tensor)}, {self._outlines[name]}"
        self._missing.remove(name)
        if self._descriptor is None:
            self._open()
        values = tensor.detach().contiguous().view(-1).view(torch.uint8)
        self._put(memoryview(values.numpy()), len(self._head) + self._offsets[name])
        if not self._missing:
            self._close()

    def _open(self) -> None:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._put(memoryview(self._head), 0)

    def _close(self) -> None:
        os.ftruncate(self._descriptor, self._num_bytes)
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None

    def _put(self, data: memoryview, offset: int) -> None:
        try:
            while len(data):
                count = os.pwrite(self._descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
