"""The CPU optimizer pipeline: state chunks from SSD, fused AdamW, and back, under the GPU's computation.

Two threads, each a plain loop over the same sequence of chunks: the *loader* reserves ring slots and starts reads ahead
of need, the *updater* waits for a chunk's bytes and its unit's gradient, runs AdamW and starts the write-back. One
result whatever the mode: *eager* feeds units as their gradients arrive, *deferred* feeds all of them, in forward order,
once the norm of the step is known.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter

import torch

from ratel import native
from ratel.errors import NonFiniteError
from ratel.memory import jitter
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange, Mailbox, Worker
from ratel.memory.lanes import Event
from ratel.memory.retire import Retirer
from ratel.plan.placement import PLANES
from ratel.plan.plan import PAGE_BYTES, Plan
from ratel.plan.shape import UnitSpec
from ratel.store.host_cache import HostCache, HostSlot
from ratel.store.plane_io import PlaneIO, Read
from ratel.store.planes import Store
from ratel.units import align_up


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """What one update of all parameters uses. ``step`` counts updates from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    grad_scale: float = 1.0


@dataclass(slots=True)
class Arrival:
    """A gradient in DRAM: ``host`` is valid once ``arrived``; ``release`` gives its slot back after the update."""

    host: torch.Tensor | None
    arrived: Event
    norm: torch.Tensor
    """fp32 scalar in DRAM, valid once ``arrived``: the norm of the unit's gradient."""
    release: Callable[[], None] | None


@dataclass(slots=True)
class Job:
    """The update of one unit."""

    unit: UnitSpec
    hyper: Hyper
    number: int
    """Of this unit's updates, from 1."""
    weights: HostSlot | None = None
    chunks_left: int = 0
    keep: bool = False
    applied: bool = False
    """Not so where the step is skipped."""
    write_tickets: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Chunk:
    job: Job
    begin: int
    end: int
    ring: dict[str, torch.Tensor] | None
    """By plane: where the chunk's bytes from SSD go."""
    slot: torch.Tensor | None
    reads: list[Read]


class OptimizerPipeline:
    def __init__(self, plan: Plan, store: Store, cache: HostCache, arena: Arena, exchange: Exchange,
                 pool: "native.op_ds.Pool", engine: "native.nvme_ds.Engine | None", io: PlaneIO, writes: Retirer) -> None:
        self._plan, self._store, self._cache, self._exchange = plan, store, cache, exchange
        self._pool, self._engine, self._io, self._writes = pool, engine, io, writes
        self._changed = exchange.condition()
        count = len(plan.spec.units)
        self._asked, self._updated, self._persisted, self._required = ([0] * count for _ in range(4))
        self._applied = self._skipped = 0
        """Eager mode: the step of the last update made, and of the last one left out. By number, and not cleared when a
        step begins: updates of the step before may still run then."""
        self._arrivals: dict[int, Arrival] = {}
        self._left: dict[int, HostSlot] = {}
        self._kept: dict[int, HostSlot] = {}
        self._flushing = False
        self._may_update: Callable[[int, int], None] = lambda unit, number: None
        self._never_updated = [u.index for u in plan.spec.units if not u.num_trainable and plan.weights_from_ssd(u)]
        self._ring = [arena.take(plan.ring_slot_bytes) for _ in range(plan.buffers.ring_slots)
                      ] if plan.ring_slot_bytes else []
        self._jobs, self._loaded = Mailbox(exchange), Mailbox(exchange)
        self.busy_s = 0.0
        self._workers = [Worker("loader", exchange, self._load), Worker("updater", exchange, self._update)]

    # --- the main thread and the reader -------------------------------------------------------------------------

    def begin_step(self) -> None:
        """What has been asked for so far must be done before this step's forward pass uses it."""
        with self._exchange.lock:
            self._required = list(self._asked)

    def hold_back(self, may_update: Callable[[int, int], None]) -> None:
        """Call this with (unit, number of its update) before each update; it returns once that one may overwrite."""
        self._may_update = may_update

    def asked(self) -> list[int]:
        """By unit, how many updates have been asked for."""
        with self._exchange.lock:
            return list(self._asked)

    def wait_persisted(self, unit: int, number: int) -> None:
        """Block until so many updates of the unit are done and on its tier."""
        with self._exchange.lock:
            self._exchange.wait_for(self._changed, lambda: self._persisted[unit] >= number, "SSD write", self._name(unit))

    def submit(self, unit: UnitSpec, hyper: Hyper) -> None:
        """Ask for the unit's update; it starts when its gradient has arrived."""
        with self._exchange.lock:
            self._flushing = False
            self._cache.expect_reads(self._never_updated)
            self._asked[unit.index] += 1
            self._jobs.put(Job(unit, hyper, number=self._asked[unit.index], keep=self._plan.deferred))

    def arrived(self, unit: UnitSpec, arrival: Arrival) -> None:
        """The unit's gradient is in DRAM or on its way there."""
        with self._exchange.lock:
            self._arrivals[unit.index] = arrival
            self._changed.notify_all()

    def discard(self, unit: UnitSpec) -> None:
        """The step is skipped: forget the unit's gradient, which may still be on its way to SSD."""
        with self._exchange.lock:
            arrival = self._wait_arrival(unit.index)
            del self._arrivals[unit.index]
        if arrival.release is not None:
            arrival.release()

    def wait_updated(self, unit: int) -> None:
        """Block until the unit's updates of earlier steps are done."""
        with self._exchange.lock:
            self._exchange.wait_for(self._changed, lambda: self._updated[unit] >= self._required[unit], "update",
                                    self._name(unit))

    def finish_step(self) -> bool:
        """Eager mode, after backward: wait for this step's updates. False if none was made: all skipped, or none asked."""
        with self._exchange.lock:
            self._exchange.wait_for(self._changed, lambda: self._updated == self._asked, "update")
            return self._skipped != max(self._asked)

    def leave(self, unit: int, slot: HostSlot) -> None:
        """The gather for backward leaves one hold of its DRAM copy to the (eager) update that follows."""
        with self._exchange.lock:
            self._left[unit] = slot

    def took_over(self, unit: int) -> None:
        """The updated copy kept for the next forward pass has another holder now."""
        with self._exchange.lock:
            slot = self._kept.pop(unit, None)
        if slot is not None:
            self._cache.release(slot)

    def flush(self) -> None:
        """Block until every update asked for is done and on its tier."""
        with self._exchange.lock:
            self._flushing = True
            self._cache.expect_reads(())  # nothing is kept for a forward pass that may be far off
            for unit in list(self._kept):
                self.took_over(unit)
            self._exchange.wait_for(self._changed, lambda: self._persisted == self._asked)

    def join(self) -> None:
        for worker in self._workers:
            worker.join()

    # --- the loader ---------------------------------------------------------------------------------------------

    def _load(self) -> None:
        while True:
            job: Job = self._jobs.take()
            # The last write-back of the unit must be on SSD before its planes are read again.
            self.wait_persisted(job.unit.index, job.number - 1)
            size = self._plan.chunk_of(job.unit)
            bounds = [(a, min(a + size, job.unit.num_trainable)) for a in range(0, job.unit.num_trainable, size)]
            job.chunks_left = len(bounds)
            for begin, end in bounds:
                chunk = self._start_chunk(job, begin, end)
                if begin == 0 and self._plan.deferred and self._plan.weights_from_ssd(job.unit):
                    job.weights = self._cache.acquire_ahead(job.unit.index)
                self._loaded.put(chunk)

    def _start_chunk(self, job: Job, begin: int, end: int) -> Chunk:
        planes = self._plan.ring_planes(job.unit)
        if not planes:
            return Chunk(job, begin, end, None, None, [])
        jitter.pause()
        if "g" in planes:
            self._wait_arrival(job.unit.index)
        with self._exchange.lock:
            self._exchange.wait_for(self._changed, lambda: bool(self._ring), "ring slot", job.unit.name)
            slot = self._ring.pop(0)
        views = self._ring_views(job.unit, planes, slot, end - begin)
        reads = [self._io.read(job.unit.index, name, begin, view, native.nvme_ds.OPTIMIZER)
                 for name, view in views.items()]
        return Chunk(job, begin, end, views, slot, reads)

    def _ring_views(self, unit: UnitSpec, planes: tuple[str, ...], slot: torch.Tensor,
                    count: int) -> dict[str, torch.Tensor]:
        views, cursor = {}, 0
        for name in planes:
            dtype = self._store.plane(unit.index, name).dtype
            views[name] = slot[cursor : cursor + count * dtype.itemsize].view(dtype)
            cursor += align_up(self._plan.chunk_of(unit) * dtype.itemsize, PAGE_BYTES)
        return views

    # --- the updater --------------------------------------------------------------------------------------------

    def _update(self) -> None:
        while True:
            chunk: Chunk = self._loaded.take()
            arrival = self._wait_arrival(chunk.job.unit.index)
            if chunk.begin == 0:
                with self._exchange.tracing.waiting("gradient", chunk.job.unit.name):
                    arrival.arrived.synchronize()
                self._ready_weights(chunk.job)
            for read in chunk.reads:
                self._io.wait(read)
            jitter.pause()
            if self._skips(chunk.job, arrival):
                self._drop(chunk)
            else:
                if chunk.begin == 0:
                    self._may_update(chunk.job.unit.index, chunk.job.number)
                self._run_adamw(chunk, arrival)
                self._write_back(chunk)
            chunk.job.chunks_left -= 1
            if chunk.job.chunks_left == 0:
                self._finish(chunk.job, arrival)

    def _ready_weights(self, job: Job) -> None:
        if not self._plan.deferred:
            # Taken only now: the gradient cannot have arrived before the gather for backward left the copy here.
            job.weights = self._left.pop(job.unit.index, None)
        if job.weights is not None:
            self._cache.ready(job.weights)

    def _skips(self, job: Job, arrival: Arrival) -> bool:
        """A NaN or infinity in the loss reaches the first gradient to arrive, before anything has been updated: the
        whole step is then left out. One that appears later cannot be undone in eager mode.
        """
        if self._plan.deferred:
            return False
        if self._skipped == job.number or isfinite(float(arrival.norm)):
            return self._skipped == job.number
        if self._applied == job.number:
            raise NonFiniteError(f"the gradient of {job.unit.name} is not finite, but other units of update "
                                 f"{job.hyper.step} are updated already; the deferred optimizer skips such a step")
        self._skipped = job.number
        return True

    def _drop(self, chunk: Chunk) -> None:
        if chunk.slot is not None:
            self._free_ring(chunk.slot)

    def _wait_arrival(self, unit: int) -> Arrival:
        with self._exchange.lock:
            self._exchange.wait_for(self._changed, lambda: unit in self._arrivals, "gradient", self._name(unit))
            return self._arrivals[unit]

    def _run_adamw(self, chunk: Chunk, arrival: Arrival) -> None:
        job, planes = chunk.job, self._chunk_planes(chunk, arrival)
        hyper, count = job.hyper, chunk.end - chunk.begin
        begun = perf_counter()
        # The gradient is read, the other planes are read and written.
        with self._exchange.tracing.working("cpu optimizer", job.unit.name, count * (24 + self._plan.grad_bytes)):
            self._pool.adamw(*(planes[p].data_ptr() for p in (*PLANES, "g")), count,
                             grad_dtype="fp32" if self._plan.fp32 else "bf16", lr=hyper.lr, beta1=hyper.beta1,
                             beta2=hyper.beta2, eps=hyper.eps, step=hyper.step, grad_scale=hyper.grad_scale,
                             ranges=decay_ranges(job.unit, chunk.begin, chunk.end, hyper.weight_decay))
        self.busy_s += perf_counter() - begun
        self._applied, job.applied = job.number, True

    def _name(self, unit: int) -> str:
        return self._plan.spec.units[unit].name

    def _chunk_planes(self, chunk: Chunk, arrival: Arrival) -> dict[str, torch.Tensor]:
        unit = chunk.job.unit
        planes = {}
        for name in PLANES:
            tensor = self._store.plane(unit.index, name).tensor
            if tensor is not None:
                planes[name] = tensor[chunk.begin : chunk.end]
        if chunk.job.weights is not None:
            for name, view in self._cache.views(chunk.job.weights).items():
                planes[name] = view[chunk.begin : chunk.end]
        if arrival.host is not None:
            planes["g"] = arrival.host[chunk.begin : chunk.end]
        planes.update(chunk.ring or {})
        return planes

    def _write_back(self, chunk: Chunk) -> None:
        job = chunk.job
        if job.weights is not None:
            for name, view in self._cache.views(job.weights).items():
                job.write_tickets.append(self._io.write(job.unit.index, name, chunk.begin, view[chunk.begin : chunk.end],
                                                        native.nvme_ds.WRITEBACK))
        if chunk.slot is None:
            return
        tickets = [self._io.write(job.unit.index, name, chunk.begin, view, native.nvme_ds.WRITEBACK)
                   for name, view in chunk.ring.items() if name != "g"]
        self._writes.when(lambda: self._engine.wait_all(tickets), lambda: self._free_ring(chunk.slot))

    def _free_ring(self, slot: torch.Tensor) -> None:
        with self._exchange.lock:
            self._ring.append(slot)
            self._changed.notify_all()

    def _finish(self, job: Job, arrival: Arrival) -> None:
        index = job.unit.index
        if arrival.release is not None:
            arrival.release()
        with self._exchange.lock:
            del self._arrivals[index]
            if job.weights is not None and job.keep and not self._flushing:
                job.weights.refs += 1
                self._kept[index] = job.weights
            self._updated[index] += 1
            self._changed.notify_all()
        # Writes retire in order, so that when this runs the unit's chunks are on SSD too.
        self._writes.when(lambda: self._engine.wait_all(job.write_tickets) if job.write_tickets else None,
                          lambda: self._persist(job))

    def _persist(self, job: Job) -> None:
        if job.applied:
            self._store.versions.advance(job.unit.index)  # before anyone reads the unit from SSD again
        if job.weights is not None:
            self._cache.release(job.weights)
        with self._exchange.lock:
            self._persisted[job.unit.index] += 1
            self._changed.notify_all()


def decay_ranges(unit: UnitSpec, begin: int, end: int, weight_decay: float) -> list[tuple[int, float]]:
    """``(end element, weight decay)`` ranges of the chunk ``[begin, end)``, relative to its begin."""
    split = min(max(unit.num_decay - begin, 0), end - begin)
    ranges = [(split, weight_decay)] if split else []
    if split < end - begin:
        ranges.append((end - begin, 0.0))
    return ranges


