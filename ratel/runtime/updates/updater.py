"""The thread that updates parameters on the CPU: fused AdamW on the chunks that the loader brings,
and their way back."""

from collections.abc import Callable
from math import isfinite
from time import perf_counter

import torch

from ratel import native
from ratel.errors import NonFiniteError
from ratel.memory import jitter
from ratel.memory.exchange import Mailbox, Worker
from ratel.memory.retire import Retirer
from ratel.planner.plan import Plan
from ratel.runtime.updates.arithmetic import UPDATES
from ratel.runtime.updates.jobs import Chunk, GradientInFlight, Job
from ratel.runtime.updates.ledger import Ledger
from ratel.runtime.updates.loader import Loader
from ratel.runtime.updates.speculation import Speculation
from ratel.store.host_cache import HostCache
from ratel.store.plane_io import PlaneIO
from ratel.store.planes import Store


class Updater:
    """Waits for each chunk's bytes and its unit's gradient, runs AdamW, and starts the
    write-back."""

    def __init__(self, plan: Plan, store: Store, cache: HostCache, pool: "native.op_ds.Pool",
                 engine: "native.nvme_ds.Engine | None", io: PlaneIO, writes: Retirer, ledger: Ledger,
                 speculation: Speculation, loader: Loader, chunks: Mailbox) -> None:
        self._plan, self._store, self._cache, self._pool = plan, store, cache, pool
        self._engine, self._io, self._writes = engine, io, writes
        self._ledger, self._speculation, self._loader, self._chunks = ledger, speculation, loader, chunks
        self._exchange = ledger.exchange
        self._applied = self.skipped = 0
        """Eager mode: the step of the last update made, and of the last one left out. By number,
        and not cleared when a step begins: updates of the step before may still run then."""
        self.may_update: Callable[[int, int], None] = at_once
        self.busy_s = 0.0
        self.worker = Worker("updater", ledger.exchange, self._update)

    def _update(self) -> None:
        while True:
            chunk: Chunk = self._chunks.take()
            gradient = self._ledger.wait_arrival(chunk.job.unit.index)
            if chunk.begin == 0:
                with self._exchange.tracing.waiting("gradient", chunk.job.unit.name):
                    gradient.arrived.synchronize()
                self._ready_weights(chunk.job)
            for read in chunk.reads:
                self._io.wait(read)
            jitter.pause()
            if self._skips(chunk.job, gradient):
                if chunk.ring_slot is not None:
                    self._loader.free(chunk.ring_slot)
            else:
                if chunk.begin == 0:
                    self.may_update(chunk.job.unit.index, chunk.job.number)
                    self._begin(chunk.job)
                self._run_adamw(chunk, gradient)
                self._write_back(chunk)
            chunk.job.chunks_left -= 1
            if chunk.job.chunks_left == 0:
                self._finish(chunk.job, gradient)

    def _ready_weights(self, job: Job) -> None:
        if not job.keep:
            # Taken only now: the gradient cannot have arrived before the gather for backward left
            # the copy.
            job.weights = self._cache.take_left(job.unit.index)
        if job.weights is not None:
            self._cache.ready(job.weights)
            if job.early:
                self._cache.withdraw(job.weights)

    def _begin(self, job: Job) -> None:
        """From now on an early update's scale is what it is."""
        if job.early:
            with self._exchange.lock:
                job.begun = True
                if self._plan.has_states_on_ssd(job.unit):
                    job.ssd_slot = self._store.versions.spare(job.unit.index)

    def _skips(self, job: Job, gradient: GradientInFlight) -> bool:
        """A NaN or infinity in the loss reaches the first gradient to arrive, before anything has
        been updated: the whole step is then left out. One that appears later cannot be undone in
        eager mode.
        """
        if self._plan.deferred:
            return job.is_void
        if self.skipped == job.number or isfinite(float(gradient.norm)):
            return self.skipped == job.number
        if self._applied == job.number:
            raise NonFiniteError(f"the gradient of {job.unit.name} is not finite, but other units of update "
                                 f"{job.hyper.step} are updated already; the deferred optimizer skips such a step")
        self.skipped = job.number
        return True

    def _run_adamw(self, chunk: Chunk, gradient: GradientInFlight) -> None:
        job, planes = chunk.job, self._chunk_planes(chunk, gradient)
        hyper, count = job.hyper, chunk.end - chunk.begin
        targets = {**planes, **self._second_places(chunk)}
        begun = perf_counter()
        formats = self._plan.formats
        with self._exchange.tracing.working("cpu optimizer", job.unit.name, int(count * formats.update_bytes)):
            UPDATES[formats.update].in_memory(
                self._pool, planes, targets, **hyper.of_elements(job.unit, chunk.begin, chunk.end))
        self.busy_s += perf_counter() - begun
        self._applied, job.applied = job.number, True

    def _chunk_planes(self, chunk: Chunk, gradient: GradientInFlight) -> dict[str, torch.Tensor]:
        unit = chunk.job.unit
        planes = {}
        for name in self._plan.formats.planes:
            plane = self._store.plane(unit.index, name)
            if plane.tensor is not None:
                planes[name] = plane.part(chunk.begin, chunk.end)
        if chunk.job.weights is not None:
            for name, view in self._cache.views(chunk.job.weights).items():
                planes[name] = view[chunk.begin : chunk.end]
        if gradient.host is not None:
            planes["g"] = gradient.host[chunk.begin : chunk.end]
        planes.update(chunk.ring or {})
        return planes

    def _second_places(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Where an early update writes what it makes of planes in DRAM, which it leaves as they
        are. What comes from SSD it changes in its buffers."""
        if not chunk.job.early:
            return {}
        unit = chunk.job.unit.index
        seconds = {name: self._store.second(unit, name) for name in self._plan.formats.planes}
        return {name: self._store.plane(unit, name).part(chunk.begin, chunk.end, second)
                for name, second in seconds.items() if second is not None}

    def _write_back(self, chunk: Chunk) -> None:
        job = chunk.job
        if job.weights is not None:
            for name, view in self._cache.views(job.weights).items():
                job.write_tickets.append(self._io.write(job.unit.index, name, chunk.begin, view[chunk.begin : chunk.end],
                                                        native.nvme_ds.WRITEBACK, job.ssd_slot))
        if chunk.ring_slot is None:
            return
        tickets = [self._io.write(job.unit.index, name, chunk.begin, view, native.nvme_ds.WRITEBACK, job.ssd_slot)
                   for name, view in chunk.ring.items() if name != "g"]
        self._writes.when(lambda: self._engine.wait_all(tickets), lambda: self._loader.free(chunk.ring_slot))

    def _finish(self, job: Job, gradient: GradientInFlight) -> None:
        if job.early:
            self._writes.when(lambda: self._wait_written(job), lambda: self._note_written(job))
            return
        gradient.release()
        with self._exchange.lock:
            if job.weights is not None and job.keep:
                self._cache.keep_for_forward(job.weights)
            self._ledger.note_updated(job.unit.index)
        self._writes.when(lambda: self._wait_written(job), lambda: self._persist(job))

    def _wait_written(self, job: Job) -> None:
        # Writes retire in order, so that when this has returned the unit's chunks are on SSD too.
        if job.write_tickets:
            self._engine.wait_all(job.write_tickets)

    def _note_written(self, job: Job) -> None:
        if job.weights is not None:
            self._cache.release(job.weights)
        with self._exchange.lock:
            self._speculation.note_written(job)

    def _persist(self, job: Job) -> None:
        if job.applied:
            self._store.versions.advance(job.unit.index)  # before anyone reads the unit from SSD again
        if job.weights is not None:
            self._cache.release(job.weights)
        with self._exchange.lock:
            self._ledger.note_persisted(job.unit.index)


def at_once(unit: int, number: int) -> None:
    """No update is held back."""
