"""Runs a plan's schedule against a machine's numbers, event by event: the same threads, slots and
queues as the engine.

Every function below that yields is one thread or one stream of ``ratel/runtime`` and does what that
does, with transfers and computation that only take time. The result checks the closed form
(``ratel/planner/forecast/cost.py``) and can be drawn (``ratel/trace/timeline.py``).
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field

from ratel.planner.forecast.events import Event, Pool, Process, Queue, TwoWay
from ratel.planner.forecast.recurrence import COPIES_BEHIND, step_schedule, update_order
from ratel.planner.forecast.simulated import ACTIVATION, OPTIMIZER, WRITE_BACK, Chunk, CopiesInDram, Machine, Update, pools
from ratel.planner.machine.hardware import Hardware
from ratel.planner.placement import closed_first
from ratel.planner.plan import Plan
from ratel.planner.shape import StageSpec, UnitSpec, closing_units
from ratel.planner.traffic import (Traffic, activation_traffic, gather_traffic, gradient_traffic, micro_rows,
                                   spill_traffic, update_traffic)
from ratel.trace.timeline import Span

MOST_CHUNKS = 24
"""Pieces of one unit's update at most: a unit of 3 B parameters has 770 chunks, which would
simulate for a minute."""

CHUNKS_AHEAD = 4
"""Chunks by which the CPU may be ahead of DRAM: so far its waits for others' bursts even out."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    step_s: float
    """Seconds of a step in steady state: the mean of the last two."""
    spans: tuple[Span, ...] = field(repr=False)
    """What every resource did in all steps."""
    step_ends_s: tuple[float, ...]
    moved: dict[str, float]
    """Bytes of all steps by lane: ``h2d``, ``d2h``, ``ssd read``, ``ssd write``."""


def simulate(plan: Plan, hardware: Hardware, *, steps: int = 5) -> Simulation:
    """Run ``steps`` (at least 3) steps; the first ones fill the pipeline."""
    assert steps >= 3, "the first two steps are not in steady state"
    machine = Machine(plan, hardware)
    machine.clock.run(machine.clock.start(_Engine(plan, machine).train(steps)))
    ends = machine.step_ends_s
    moved = dict(zip(("h2d", "d2h", "ssd read", "ssd write"), machine.link.moved + machine.ssd.moved))
    return Simulation(step_s=(ends[-1] - ends[-3]) / 2, spans=tuple(machine.clock.spans), step_ends_s=tuple(ends),
                      moved=moved)


class _Engine:
    """The runtime's threads, simulated. Names follow ``ratel/runtime``."""

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self._plan, self._m, self._clock = plan, machine, machine.clock
        self._rows, self._closing, self._schedule = micro_rows(plan), closing_units(plan.spec), step_schedule(plan)
        self._copies_in_dram, self._weight_slots = CopiesInDram(plan, machine), pools(plan, plan.weight_slot_count)
        self._grad_slots, self._host_grads = pools(plan, plan.grad_slot_count), pools(plan, plan.host_grad_slot_count)
        slots = plan.buffers.checkpoint_slots
        self._back_slots, self._staging_out, self._staging_in = Pool(slots), Pool(slots), Pool(slots)
        self._ring = Pool(plan.buffers.ring_slots)
        self._arrivals: dict[int, Update] = {}
        """By unit, of the step that is running."""
        self._jobs, self._loaded, self._leaving = Queue(), Queue(), Queue()
        self._landed: dict[int | tuple[int, int], Event] = defaultdict(Event)
        self._saved: dict[tuple[int, int], Event] = defaultdict(Event)
        self._uses: dict[int, int] = {}
        self._copies: deque[Event] = deque()
        for process in (self._load(), self._update_chunks(), self._copy_out()):
            self._clock.start(process)

    # --- the main thread ----------------------------------------------------------------------------------------

    def train(self, steps: int) -> Process:
        plan = self._plan
        in_backward = [u for u in closed_first(plan.spec, plan.placements) if plan.updates_in_backward(u)]
        afterwards = update_order(plan)
        for step in range(steps):
            before, self._arrivals = self._arrivals, {u.index: Update(u) for u in in_backward + afterwards}
            self._submit(in_backward)
            self._start_gathers(before)
            if step:
                yield from self._update_on_gpu()
            yield from self._forward_and_backward()
            self._m.step_ends_s.append(self._clock.now_s)
            self._submit(afterwards)

    def _update_on_gpu(self) -> Process:
        """The GPU's updates of the step before: the main thread has only launched it, and the
        gathers of this step have begun."""
        for unit in self._plan.spec.units:
            if self._plan.placement(unit).on_gpu and unit.num_trainable:
                yield from self._compute(f"update {unit.name}", self._m.gpu.update(unit))

    def _forward_and_backward(self) -> Process:
        stages = self._plan.spec.stages
        for stage in stages[:-1]:
            yield from self._using(stage, self._forward(stage))
        for stage in self._plan.spec.backward_stages:
            yield from self._using(stage, self._backward(stage))

    def _compute(self, name: str, seconds: float) -> Process:
        begin_s = self._clock.now_s
        yield self._clock.delay(seconds)
        self._clock.record("compute", name, begin_s)

    def _using(self, stage: StageSpec, work: Process) -> Process:
        units = [u for u in stage.units if not self._plan.placements[u].on_gpu]
        for unit in units:
            yield self._landed[unit]
        yield from work
        for unit in units:
            self._uses[unit] -= 1
            if self._uses[unit] == 0:
                del self._landed[unit]
                self._weight_slots[self._class(unit)].release()

    def _forward(self, stage: StageSpec) -> Process:
        for micro_batch, rows in enumerate(self._rows):
            if stage.kind == "block":
                yield from self._save(stage.index - 1, micro_batch)
                seconds = self._m.gpu.block(stage.index - 1, rows)[0]
            else:
                seconds = self._m.gpu.ends(stage, rows)[0]
            yield from self._compute(f"{stage.name} forward", seconds)

    def _backward(self, stage: StageSpec) -> Process:
        closing = [u for u in self._closing[stage.index] if not self._plan.placement(u).on_gpu]
        for unit in closing:
            yield self._grad_slots[self._plan.class_of(unit)].acquire()
        for micro_batch, rows in enumerate(self._rows):
            if stage.kind != "block":
                yield from self._compute(f"{stage.name} backward", self._m.gpu.ends(stage, rows)[1])
                continue
            leaves = self._activations(stage.index - 1, micro_batch).d2h > 0
            if leaves:
                yield self._landed[stage.index - 1, micro_batch]
            spilled = self._spill(stage.name, rows)
            yield from self._compute(f"{stage.name} backward", self._m.gpu.block(stage.index - 1, rows)[1])
            for copied in spilled:
                yield copied
            if leaves:
                del self._landed[stage.index - 1, micro_batch]
                self._back_slots.release()
        for unit in closing:
            yield from self._leave(unit)

    def _class(self, unit: int) -> str:
        return self._plan.spec.classes[unit].name

    # --- what leaves the GPU ------------------------------------------------------------------------------------

    def _activations(self, block: int, micro_batch: int) -> Traffic:
        return activation_traffic(self._plan, block, self._rows[micro_batch])

    def _spill(self, name: str, rows: int) -> list[Event]:
        """What a block's second run saves, on its way out and back: each way begins with what is
        saved first."""
        moved = spill_traffic(self._plan, rows)
        ways = ((TwoWay.OUT, moved.d2h), (TwoWay.IN, moved.h2d))
        return [self._m.link.move(way, num_bytes, f"saved tensors {name}") for way, num_bytes in ways if num_bytes]

    def _save(self, block: int, micro_batch: int) -> Process:
        moved = self._activations(block, micro_batch)
        if not moved.d2h:
            return
        if moved.ssd_written:
            yield self._staging_out.acquire()
        copied = self._saved[block, micro_batch]
        if moved.ssd_written:
            copied = Event()
            copied.then(lambda: self._clock.start(self._write_activation(block, micro_batch, moved)))
        self._leaving.put((moved.d2h, f"activations {block}.{micro_batch}", copied))
        self._copies.append(copied)
        if len(self._copies) > COPIES_BEHIND * len(self._rows):
            yield self._copies.popleft()

    def _write_activation(self, block: int, micro_batch: int, moved: Traffic) -> Process:
        yield self._m.write(moved.ssd_written, f"activations {block}.{micro_batch}", ACTIVATION)
        self._staging_out.release()
        self._saved[block, micro_batch].set()

    def _leave(self, unit: UnitSpec) -> Process:
        moved, cls = gradient_traffic(self._plan, unit), self._plan.class_of(unit)
        if self._plan.grads_pass_through(unit):
            yield self._host_grads[cls].acquire()
        update = self._arrivals[unit.index]
        copied = Event()
        copied.then(self._grad_slots[cls].release)
        copied.then(lambda: self._clock.start(self._arrive(update, moved, cls)))
        self._leaving.put((moved.d2h, f"gradient {unit.name}", copied))

    def _arrive(self, update: Update, moved: Traffic, cls: str) -> Process:
        if moved.ssd_written:
            yield self._m.write(moved.ssd_written, f"gradient {update.unit.name}", WRITE_BACK)
            self._host_grads[cls].release()
        update.arrived.set()

    def _copy_out(self) -> Process:
        """The ``d2h`` stream: one copy after the other."""
        while True:
            yield self._leaving.some()
            num_bytes, name, copied = self._leaving.take()
            done = self._m.link.move(TwoWay.OUT, num_bytes, name)
            yield done
            copied.set()

    # --- the reader and the uploader ----------------------------------------------------------------------------

    def _start_gathers(self, before: dict[int, Update]) -> None:
        opened = Queue()
        self._clock.start(self._read(opened, before))
        self._clock.start(self._upload(opened))

    def _read(self, opened: Queue, before: dict[int, Update]) -> Process:
        for gather in self._schedule:
            if not gather.is_unit:
                key = gather.saved[:2]
                yield self._saved[key]
                del self._saved[key]
                moved = self._activations(*key)
                if moved.ssd_written:
                    yield self._staging_in.acquire()
                read = self._m.read(moved.ssd_written, f"activations {key}", ACTIVATION)
                opened.put((gather, read, None))
                continue
            if gather.unit in before:
                yield before[gather.unit].updated
            slot = yield from self._copies_in_dram.acquire(gather.unit)
            if slot is not None and gather.keep_for_update:
                self._arrivals[gather.unit].slot = self._copies_in_dram.share(slot)
            if slot is not None:
                self._copies_in_dram.take_over(slot)
            opened.put((gather, slot.filled if slot else Event(done=True), slot))

    def _upload(self, opened: Queue) -> Process:
        for _ in self._schedule:
            yield opened.some()
            gather, read, slot = opened.take()
            if not gather.is_unit:
                key = gather.saved[:2]
                name = f"activations {key}"
                moved = self._activations(*key)
                yield self._back_slots.acquire()
                num_bytes, after = moved.d2h, self._staging_in.release if moved.ssd_written else None
            else:
                key, name = gather.unit, self._plan.spec.units[gather.unit].name
                yield self._weight_slots[self._class(key)].acquire()
                num_bytes, self._uses[key] = gather_traffic(self._plan, key).h2d, gather.uses
                after = (lambda slot=slot: self._copies_in_dram.release(slot)) if slot else None
            yield read
            copied = self._m.link.move(TwoWay.IN, num_bytes, name)
            copied.then(self._landed[key].set)
            if after:
                copied.then(after)

    # --- the loader and the updater -----------------------------------------------------------------------------

    def _submit(self, units: list[UnitSpec]) -> None:
        for unit in units:
            self._jobs.put(self._arrivals[unit.index])

    def _load(self) -> Process:
        persisted: dict[int, Event] = {}
        while True:
            yield self._jobs.some()
            update = self._jobs.take()
            unit = update.unit
            yield persisted.get(unit.index, Event(done=True))
            persisted[unit.index] = update.persisted
            yield from self._load_unit(update)

    def _load_unit(self, update: Update) -> Process:
        unit, plan = update.unit, self._plan
        planes = plan.ring_planes(unit)
        num_bytes = sum(plan.formats.num_bytes(unit, p) for p in planes)
        # Of what is in DRAM an update is one piece; here it is cut as well, since memory is shared
        # with copies all along.
        size = max(min(plan.buffers.chunk_elements, unit.num_trainable), -(-unit.num_trainable // MOST_CHUNKS))
        for begin in range(0, unit.num_trainable, size):
            share = min(size, unit.num_trainable - begin) / unit.num_trainable
            if "g" in planes:
                yield update.arrived
            if planes:
                yield self._ring.acquire()
            read = self._m.read(num_bytes * share, f"states {unit.name}", OPTIMIZER)
            if begin == 0 and not plan.updates_in_backward(unit):
                update.slot = yield from self._copies_in_dram.acquire(unit.index)
            is_last = begin + size >= unit.num_trainable
            self._loaded.put(Chunk(update, share, read, is_first=begin == 0, is_last=is_last))

    def _update_chunks(self) -> Process:
        behind: deque[Event] = deque()
        while True:
            yield self._loaded.some()
            chunk = self._loaded.take()
            update = chunk.update
            yield update.arrived
            if chunk.is_first and update.slot is not None:
                yield update.slot.filled
            yield chunk.read
            begin_s = self._clock.now_s
            seconds, num_bytes = self._m.update(update.unit, chunk.share * update.unit.num_trainable)
            through_s = self._m.memory.take(num_bytes)
            yield self._clock.delay(seconds)
            self._clock.record("cpu optimizer", update.unit.name, begin_s)
            done = self._clock.delay(max(through_s - self._clock.now_s, 0.0))
            done.then(lambda chunk=chunk: self._write_back(chunk))
            behind.append(done)
            if len(behind) > CHUNKS_AHEAD:
                yield behind.popleft()

    def _write_back(self, chunk: Chunk) -> None:
        update, unit = chunk.update, chunk.update.unit
        ring = {p: self._plan.formats.num_bytes(unit, p) for p in self._plan.ring_planes(unit)}
        in_ring = sum(num_bytes for p, num_bytes in ring.items() if p != "g")
        weights = update_traffic(self._plan, unit).ssd_written - in_ring
        written = self._m.write(chunk.share * weights, f"weights {unit.name}", WRITE_BACK)
        if ring:
            written = self._m.write(chunk.share * in_ring, f"states {unit.name}", WRITE_BACK)
            written.then(self._ring.release)
        if chunk.is_last:
            self._finish(update, written)

    def _finish(self, update: Update, written: Event) -> None:
        if not self._plan.deferred:
            self._host_grads[self._plan.class_of(update.unit)].release()
        slot = update.slot
        if slot is not None and not self._plan.updates_in_backward(update.unit):
            self._copies_in_dram.leave(slot)
        if update.unit.index in self._plan.early:
            written.then(update.updated.set)  # no copy of it is kept: forward reads what was written
        else:
            update.updated.set()
        if slot is not None:
            written.then(lambda: self._copies_in_dram.release(slot))
        written.then(update.persisted.set)
