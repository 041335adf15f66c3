"""The CPU optimizer pipeline: state chunks from SSD, fused AdamW, and back, under the GPU's computation.

Two threads, each a plain loop over the same sequence of chunks: the *loader* reserves ring slots and starts reads ahead
of need, the *updater* waits for a chunk's bytes and its unit's gradient, runs AdamW and starts the write-back. One
result whatever the mode: *eager* feeds units as their gradients arrive, *deferred* feeds all of them, in forward order,
once the norm of the step is known. *Speculative* feeds some as their gradients arrive, with the scale that is likely;
these write beside what they read, and when the norm is known their result is kept or forgotten. What is forgotten is
updated once more, like the rest, from the same state.
"""

from collections.abc import Callable
from math import isfinite
from time import perf_counter

import torch

from ratel import native
from ratel.errors import NonFiniteError
from ratel.memory import jitter
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange, Mailbox, Worker, join_all
from ratel.memory.retire import Retirer
from ratel.planner.plan import PAGE_BYTES, Plan
from ratel.planner.shape import UnitSpec
from ratel.runtime.updates.jobs import AGAIN, FORGET, KEEP, Arrival, Chunk, Hyper, Job
from ratel.runtime.updates.arithmetic import UPDATES
from ratel.store.host_cache import HostCache, HostSlot
from ratel.store.plane_io import PlaneIO
from ratel.store.planes import Store
from ratel.units import align_up


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
        self._may_update: Callable[[int, int], None] = at_once
        self._early: list[Job] = []
        self._again: dict[int, Job] = {}
        self._never_updated = [u.index for u in plan.spec.units if not u.num_trainable and plan.weights_from_ssd(u)]
        self._unkept = self._never_updated
        """Units of which no updated copy is left in DRAM: the next forward pass reads them from SSD."""
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
            self._cache.expect_reads(self._unkept)
            self._asked[unit.index] += 1
            self._jobs.put(Job(unit, hyper, number=self._asked[unit.index], keep=self._plan.deferred,
                               after=self._again.pop(unit.index, None)))

    def submit_early(self, units: list[UnitSpec], hyper: Hyper) -> None:
        """Ask for updates that start when gradients arrive, with the scale that is likely; ``decide`` must follow."""
        with self._exchange.lock:
            for unit in units:
                self._asked[unit.index] += 1
                self._early.append(Job(unit, hyper, number=self._asked[unit.index], early=True))
            self._jobs.put(*self._early)

    def decide(self, hyper: Hyper | None) -> list[UnitSpec]:
        """The norm is known: ``hyper`` has the right scale; None: the step is skipped, and its early updates forgotten.

        Returns units whose early update was begun with another scale; they must be submitted like those that were not
        updated early.
        """
        with self._exchange.lock:
            early, self._early = self._early, []
            for job in early:
                self._judge(job, hyper)
            self._unkept = self._never_updated + [job.unit.index for job in early if job.verdict == KEEP
                                                  and self._plan.weights_from_ssd(job.unit)]
            return [job.unit for job in early if job.verdict == AGAIN]

    def _judge(self, job: Job, hyper: Hyper | None) -> None:
        job.verdict = FORGET if hyper is None else AGAIN if job.begun and job.hyper != hyper else KEEP
        if job.verdict == KEEP:
            job.hyper = hyper
        if job.verdict == AGAIN:
            self._again[job.unit.index] = job
            self._asked[job.unit.index] -= 1  # it is the same update that will be asked for again
        elif job.written:
            self._conclude(job)

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

    def join(self, timeout_s: float) -> bool:
        return join_all(self._workers, timeout_s)

    # --- the loader ---------------------------------------------------------------------------------------------

    def _load(self) -> None:
        while True:
            job: Job = self._jobs.take()
            # The last write-back of the unit must be on SSD before its planes are read again.
            self.wait_persisted(job.unit.index, job.number - 1)
            self._wait_forgotten(job)
            size = self._plan.chunk_of(job.unit)
            bounds = [(a, min(a + size, job.unit.num_trainable)) for a in range(0, job.unit.num_trainable, size)]
            job.chunks_left = len(bounds)
            for begin, end in bounds:
                chunk = self._start_chunk(job, begin, end)
                if begin == 0 and job.keep and self._plan.weights_from_ssd(job.unit):
                    job.weights = self._cache.acquire_ahead(job.unit.index)
                self._loaded.put(chunk)

    def _wait_forgotten(self, job: Job) -> None:
        if job.after is not None:
            with self._exchange.lock:
                self._exchange.wait_for(self._changed, lambda: job.after.written, "early update", job.unit.name)

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
                    self._begin(chunk.job)
                self._run_adamw(chunk, arrival)
                self._write_back(chunk)
            chunk.job.chunks_left -= 1
            if chunk.job.chunks_left == 0:
                self._finish(chunk.job, arrival)

    def _ready_weights(self, job: Job) -> None:
        if not job.keep:
            # Taken only now: the gradient cannot have arrived before the gather for backward left the copy here.
            job.weights = self._left.pop(job.unit.index, None)
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
                    job.slot = self._store.versions.spare(job.unit.index)

    def _skips(self, job: Job, arrival: Arrival) -> bool:
        """A NaN or infinity in the loss reaches the first gradient to arrive, before anything has been updated: the
        whole step is then left out. One that appears later cannot be undone in eager mode.
        """
        if self._plan.deferred:
            return job.is_void
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
        targets = {**planes, **self._second_places(chunk)}
        begun = perf_counter()
        formats = self._plan.formats
        with self._exchange.tracing.working("cpu optimizer", job.unit.name, int(count * formats.update_bytes)):
            UPDATES[formats.update].in_memory(
                self._pool, planes, targets, lr=hyper.lr, beta1=hyper.beta1, beta2=hyper.beta2, eps=hyper.eps,
                step=hyper.step, grad_scale=hyper.grad_scale,
                ranges=decay_ranges(job.unit, chunk.begin, chunk.end, hyper.weight_decay))
        self.busy_s += perf_counter() - begun
        self._applied, job.applied = job.number, True

    def _name(self, unit: int) -> str:
        return self._plan.spec.units[unit].name

    def _chunk_planes(self, chunk: Chunk, arrival: Arrival) -> dict[str, torch.Tensor]:
        unit = chunk.job.unit
        planes = {}
        for name in self._plan.formats.planes:
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

    def _second_places(self, chunk: Chunk) -> dict[str, torch.Tensor]:
        """Of planes in DRAM: an early update leaves them as they are. What comes from SSD it changes in its buffers."""
        if not chunk.job.early:
            return {}
        seconds = {name: self._store.second(chunk.job.unit.index, name) for name in self._plan.formats.planes}
        return {name: second[chunk.begin : chunk.end] for name, second in seconds.items() if second is not None}

    def _write_back(self, chunk: Chunk) -> None:
        job = chunk.job
        if job.weights is not None:
            for name, view in self._cache.views(job.weights).items():
                job.write_tickets.append(self._io.write(job.unit.index, name, chunk.begin, view[chunk.begin : chunk.end],
                                                        native.nvme_ds.WRITEBACK, job.slot))
        if chunk.slot is None:
            return
        tickets = [self._io.write(job.unit.index, name, chunk.begin, view, native.nvme_ds.WRITEBACK, job.slot)
                   for name, view in chunk.ring.items() if name != "g"]
        self._writes.when(lambda: self._engine.wait_all(tickets), lambda: self._free_ring(chunk.slot))

    def _free_ring(self, slot: torch.Tensor) -> None:
        with self._exchange.lock:
            self._ring.append(slot)
            self._changed.notify_all()

    def _finish(self, job: Job, arrival: Arrival) -> None:
        index = job.unit.index
        if job.early:
            self._writes.when(lambda: self._wait_written(job), lambda: self._note_written(job))
            return
        if arrival.release is not None:
            arrival.release()
        with self._exchange.lock:
            del self._arrivals[index]
            if job.weights is not None and job.keep and not self._flushing:
                job.weights.refs += 1
                self._kept[index] = job.weights
            self._updated[index] += 1
            self._changed.notify_all()
        self._writes.when(lambda: self._wait_written(job), lambda: self._persist(job))

    def _wait_written(self, job: Job) -> None:
        # Writes retire in order, so that when this has returned the unit's chunks are on SSD too.
        if job.write_tickets:
            self._engine.wait_all(job.write_tickets)

    def _note_written(self, job: Job) -> None:
        """An early update has ended, whatever becomes of it."""
        if job.weights is not None:
            self._cache.release(job.weights)
        with self._exchange.lock:
            job.written = True
            if job.verdict in (KEEP, FORGET):
                self._conclude(job)
            self._changed.notify_all()

    def _conclude(self, job: Job) -> None:
        """An early update is over and decided about: keep it, or leave everything as it was."""
        index = job.unit.index
        if job.verdict == KEEP:
            self._store.keep_second(index)
            self._store.versions.advance(index, job.slot)
        del self._arrivals[index]
        self._updated[index] += 1
        self._persisted[index] += 1
        self._changed.notify_all()

    def _persist(self, job: Job) -> None:
        if job.applied:
            self._store.versions.advance(job.unit.index)  # before anyone reads the unit from SSD again
        if job.weights is not None:
            self._cache.release(job.weights)
        with self._exchange.lock:
            self._persisted[job.unit.index] += 1
            self._changed.notify_all()


def at_once(unit: int, number: int) -> None:
    """No update is held back."""


def decay_ranges(unit: UnitSpec, begin: int, end: int, weight_decay: float) -> list[tuple[int, float]]:
    """``(end element, weight decay)`` ranges of the chunk ``[begin, end)``, relative to its begin."""
    split = min(max(unit.num_decay - begin, 0), end - begin)
    ranges = [(split, weight_decay)] if split else []
    if split < end - begin:
        ranges.append((end - begin, 0.0))
    return ranges


