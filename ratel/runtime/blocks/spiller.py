"""What autograd saves in the second run of a block goes to DRAM while it is made, and comes back
while backward asks.

For micro-batches of which one block's backward needs more than GPU memory holds. PyTorch's hooks of
saved tensors do the work: `pack` gets a tensor the moment that autograd saves it, `unpack` must
return it. A storage is moved once, however many of the tensors saved are views of it, and each view
comes back with its own shape, strides and offset: kernels see the same bits at the same alignment.

On the GPU are then only the tensors that the block's own code still holds, and two windows of the
same size: of storages on their way out, and of storages that have come back before they were asked
for.
"""

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from ratel.errors import RatelError
from ratel.memory.lanes import Event, Lanes
from ratel.planner.checkpoints import PART_ALIGN, Spill
from ratel.units import align_up

LABEL = "saved tensors"

WITHOUT_END = 1 << 50
"""Bytes of a region on the meta device, where nothing is stored: what is given to it is counted,
and lost."""


@dataclass(slots=True, eq=False)
class _Spilled:
    """One storage. ``moved``: its last copy; whoever reads what is on the GPU, or lets go of it,
    waits for that."""

    ref: StorageWeakRef
    """Keeps its address from being given to another storage, not its memory."""
    host: Tensor
    original: Tensor | None
    """The tensor of this storage that was saved first, as long as the storage has never left the
    GPU."""
    version: int
    on_gpu: UntypedStorage | None
    moved: Event
    uses: int = 0
    """Saved tensors that backward has not asked for yet."""
    given: list[tuple[Tensor, int]] = field(default_factory=list)
    """What backward was given of the memory on the GPU, and the versions: it is there to be read by
    others, too."""
    is_ahead: bool = False
    """Whether it is on the GPU again, and was not asked for yet."""

    @property
    def num_bytes(self) -> int:
        return self.host.numel()

    def check_unchanged(self) -> None:
        """Raises RatelError if what is on the GPU is not what was saved."""
        if self.original is not None:
            _check_unchanged(self.original, self.version)
        for tensor, version in self.given:
            _check_unchanged(tensor, version)

    def let_go(self) -> None:
        self.original = self.on_gpu = None
        self.given.clear()


@dataclass(frozen=True, slots=True)
class _View:
    """A saved tensor whose storage has left; ``position`` counts them in the order in which they
    were saved."""

    spilled: _Spilled
    position: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class _Stayed:
    tensor: Tensor
    version: int


class Spiller:
    """``region`` (bytes; pinned, for a GPU) takes what one second run saves, and is used again by
    the next one.

    A storage for which it has no room stays on the GPU. Used by one thread at a time: the one that
    runs the block, then the one in which autograd goes backward.
    """

    def __init__(self, lanes: Lanes, region: Tensor, spill: Spill) -> None:
        self._lanes, self._region, self._spill = lanes, region, spill
        self.used_bytes = 0
        self._own: frozenset[int] = frozenset()
        self._by_storage: dict[tuple[int, int], _Spilled] = {}
        self._saved: list[_Spilled] = []
        """What was spilled, by position. Backward asks for them from the last to the first, more or
        less."""
        self._leaving: deque[_Spilled] = deque()
        self._leaving_bytes = self._ahead_bytes = self._cursor = 0
        self._fetched = Event()

    def saving(self, own: Iterable[Tensor]) -> AbstractContextManager:
        """What is saved inside leaves, but for views of ``own`` tensors: weights and arguments,
        which stay where they are."""
        self.finish()
        self._own = frozenset(tensor.untyped_storage()._cdata for tensor in own)
        # A fetch that backward did not use in the end may still be reading what is about to be
        # written over.
        self._lanes.wait("d2h", self._fetched)
        return saved_tensors_hooks(self._pack, self._unpack)

    def finish(self) -> None:
        """Backward is over: nothing that is left will be asked for."""
        for spilled in self._saved:
            if spilled.on_gpu is not None:
                self._lanes.wait("compute", spilled.moved)
                spilled.let_go()
        self._by_storage.clear()
        self._saved.clear()
        self._leaving.clear()
        self.used_bytes = self._leaving_bytes = self._ahead_bytes = self._cursor = 0

    # --- out ----------------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> _View | _Stayed:
        spilled = self._spilled(tensor) if self._may_leave(tensor) else None
        if spilled is None:
            return _Stayed(tensor, tensor._version)
        spilled.uses += 1
        self._saved.append(spilled)
        self._cursor = len(self._saved)
        return _View(spilled, self._cursor - 1, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _may_leave(self, tensor: Tensor) -> bool:
        if tensor.layout is not torch.strided or tensor.device.type == "cpu" and self._lanes.is_cuda:
            return False
        # A view would come back without what is not in its numbers: that they are to be conjugated
        # or negated, its class.
        if tensor.is_conj() or tensor.is_neg() or type(tensor) not in (Tensor, Parameter):
            return False
        storage = tensor.untyped_storage()
        return storage.nbytes() >= self._spill.least_bytes and storage._cdata not in self._own

    def _spilled(self, tensor: Tensor) -> _Spilled | None:
        # The version: what was written to in between is another value, though its storage is the
        # same.
        key = tensor.untyped_storage()._cdata, tensor._version
        if key not in self._by_storage:
            spilled = self._send(tensor)
            if spilled is None:
                return None
            self._by_storage[key] = spilled
        return self._by_storage[key]

    def _send(self, tensor: Tensor) -> _Spilled | None:
        storage = tensor.untyped_storage()
        end = self.used_bytes + storage.nbytes()
        if end > self._region.numel():
            return None
        host = self._region[self.used_bytes : end]
        self.used_bytes = align_up(end, PART_ALIGN)
        self._lanes.wait("d2h", self._lanes.record("compute"))
        with self._lanes.work("d2h", LABEL):
            host.copy_(_bytes_of(storage, tensor.device), non_blocking=True)
        spilled = _Spilled(StorageWeakRef(storage), host, tensor, tensor._version, storage, self._lanes.record("d2h"))
        self._hold(spilled)
        return spilled

    def _hold(self, spilled: _Spilled) -> None:
        """Hold a storage until its copy is complete: its memory must not be reused before. The
        oldest ones make room."""
        self._leaving.append(spilled)
        self._leaving_bytes += spilled.num_bytes
        while self._leaving_bytes > self._spill.window_bytes:
            oldest = self._leaving.popleft()
            self._leaving_bytes -= oldest.num_bytes
            oldest.moved.synchronize()
            oldest.check_unchanged()
            oldest.let_go()

    # --- back ---------------------------------------------------------------------------------------------------

    def _unpack(self, packed: _View | _Stayed) -> Tensor:
        if isinstance(packed, _Stayed):
            _check_unchanged(packed.tensor, packed.version)
            return packed.tensor
        spilled = packed.spilled
        if spilled.on_gpu is None:
            self._fetch(spilled)
        spilled.check_unchanged()
        if spilled.is_ahead:
            spilled.is_ahead = False
            self._ahead_bytes -= spilled.num_bytes
        self._fetch_ahead(packed.position)
        # Also where it never left: once the operation is over its memory is reused, and the copy
        # must have been read.
        self._lanes.wait("compute", spilled.moved)
        tensor = torch.empty(0, dtype=packed.dtype, device=spilled.on_gpu.device)
        tensor.set_(spilled.on_gpu, packed.offset, packed.shape, packed.stride)
        spilled.given.append((tensor, tensor._version))
        spilled.uses -= 1
        if spilled.uses <= 0:  # a function of the user's own may ask again: then it is fetched again
            spilled.let_go()
        return tensor

    def _fetch_ahead(self, position: int) -> None:
        """Start to fetch what was saved before ``position``, the latest first, as far as the window
        goes."""
        self._cursor = min(self._cursor, position)
        while self._cursor > 0:
            spilled = self._saved[self._cursor - 1]
            if spilled.on_gpu is None and spilled.uses > 0:
                if self._ahead_bytes + spilled.num_bytes > self._spill.window_bytes:
                    return
                self._fetch(spilled)
                spilled.is_ahead = True
                self._ahead_bytes += spilled.num_bytes
            self._cursor -= 1

    def _fetch(self, spilled: _Spilled) -> None:
        with self._lanes.on("compute"):
            buffer = torch.empty(spilled.num_bytes, dtype=torch.uint8, device=self._device)
        # The allocator hands out memory that operations launched before may still be using.
        self._lanes.wait("h2d", self._lanes.record("compute"))
        self._lanes.wait("h2d", spilled.moved)
        with self._lanes.work("h2d", LABEL):
            buffer.copy_(spilled.host, non_blocking=True)
        spilled.moved = self._fetched = self._lanes.record("h2d")
        spilled.on_gpu = buffer.untyped_storage()

    @property
    def _device(self) -> torch.device:
        """Without values there is no device either: planning in outline has everything on the meta
        device."""
        return self._lanes.device if self._region.device.type == "cpu" else self._region.device


def _bytes_of(storage: UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _check_unchanged(tensor: Tensor, version: int) -> None:
    """Refuse changes as autograd does for tensors without hooks; the copy on its way out may have
    been torn, too."""
    if tensor._version != version:
        raise RatelError(f"a tensor that backward needs ({tensor.dtype} {tuple(tensor.shape)}) was changed in place after it "
                         "was saved: its gradient would be wrong", field="model",
                         remedy="Leave out the in-place operation in its blocks")
