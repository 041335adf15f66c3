"""The thread that brings optimizer states from SSD ahead of their update, a chunk at a time."""

import torch

from ratel import native
from ratel.memory import jitter
from ratel.memory.arena import Arena
from ratel.memory.exchange import Mailbox, Worker
from ratel.planner.plan import Plan
from ratel.planner.shape import UnitSpec
from ratel.planner.slot_layout import PAGE_BYTES
from ratel.runtime.updates.jobs import Chunk, Job
from ratel.runtime.updates.ledger import Ledger
from ratel.store.host_cache import HostCache
from ratel.store.plane_io import PlaneIO
from ratel.store.planes import Store
from ratel.units import align_up


class Loader:
    """Takes updates from ``jobs``, cuts them into chunks, reserves a ring slot for each and starts
    its reads."""

    def __init__(self, plan: Plan, store: Store, cache: HostCache, arena: Arena, io: PlaneIO, ledger: Ledger, jobs: Mailbox,
                 chunks: Mailbox) -> None:
        self._plan, self._store, self._cache, self._io, self._ledger = plan, store, cache, io, ledger
        self._jobs, self._chunks = jobs, chunks
        self._ring = [arena.take(plan.ring_slot_bytes) for _ in range(plan.buffers.ring_slots)
                      ] if plan.ring_slot_bytes else []
        self.worker = Worker("loader", ledger.exchange, self._load)

    def free(self, ring_slot: torch.Tensor) -> None:
        """Give a ring slot back."""
        with self._ledger.exchange.lock:
            self._ring.append(ring_slot)
            self._ledger.notify()

    def _load(self) -> None:
        while True:
            job: Job = self._jobs.take()
            # The last write-back of the unit must be on SSD before its planes are read again.
            self._ledger.wait_persisted(job.unit.index, job.number - 1)
            if job.after is not None:
                self._ledger.wait(lambda: job.after.written, "early update", job.unit.index)
            size = self._plan.chunk_of(job.unit)
            bounds = [(a, min(a + size, job.unit.num_trainable)) for a in range(0, job.unit.num_trainable, size)]
            job.chunks_left = len(bounds)
            for begin, end in bounds:
                chunk = self._start_chunk(job, begin, end)
                if begin == 0 and job.keep and self._plan.weights_from_ssd(job.unit):
                    job.weights = self._cache.acquire_ahead(job.unit.index)
                self._chunks.put(chunk)

    def _start_chunk(self, job: Job, begin: int, end: int) -> Chunk:
        planes = self._plan.ring_planes(job.unit)
        if not planes:
            return Chunk(job, begin, end, None, None, [])
        jitter.pause()
        if "g" in planes:
            self._ledger.wait_arrival(job.unit.index)
        ring_slot = self._reserve(job.unit.index)
        views = self._ring_views(job.unit, planes, ring_slot, end - begin)
        reads = [self._io.read(job.unit.index, name, begin, view, native.nvme_ds.OPTIMIZER)
                 for name, view in views.items()]
        return Chunk(job, begin, end, views, ring_slot, reads)

    def _reserve(self, unit: int) -> torch.Tensor:
        with self._ledger.exchange.lock:
            self._ledger.wait(lambda: bool(self._ring), "ring slot", unit)
            return self._ring.pop(0)

    def _ring_views(self, unit: UnitSpec, planes: tuple[str, ...], ring_slot: torch.Tensor,
                    count: int) -> dict[str, torch.Tensor]:
        views, cursor = {}, 0
        for name in planes:
            plane = self._store.plane(unit.index, name)
            views[name] = ring_slot[cursor : cursor + plane.encoding.num_bytes(count)].view(plane.dtype)
            cursor += align_up(plane.encoding.num_bytes(self._plan.chunk_of(unit)), PAGE_BYTES)
        return views
