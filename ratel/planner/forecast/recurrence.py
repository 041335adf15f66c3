"""When each stage of a step is done, stage by stage: the maximum of what it waits for, plus its own
time.

Every resource does its work in a fixed order, so that all of it is maxima and sums: more of a
resource can never make a step slower here, and a step of a hundred blocks takes milliseconds to
predict. What the simulator (``ratel/planner/forecast/simulate.py``) has and this leaves out are
chunks: a unit's update is one piece here.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from ratel.planner.forecast.compute import GpuSeconds
from ratel.planner.placement import DRAM, GPU, closed_first
from ratel.planner.plan import Plan
from ratel.planner.schedule import Gather, gathers
from ratel.planner.shape import StageSpec, UnitSpec, closing_units, forward_order
from ratel.planner.traffic import (Traffic, activation_traffic, gather_traffic, gradient_traffic, micro_rows,
                                   spill_traffic, update_traffic)

MOST_STEPS = 12
"""Steps followed at most until two take the same time; two or three are enough unless the optimizer
lags behind."""

COPIES_BEHIND = 2
"""Blocks whose activations may still be on their way to DRAM when the next is launched:
ratel/runtime/streams/activations.py."""



@dataclass(frozen=True, kw_only=True)
class Prices:
    """Seconds per byte, and per parameter that the CPU updates, in one pass."""

    ssd: float
    h2d: float
    d2h: float
    update: float


@dataclass(frozen=True, kw_only=True)
class Times:
    step_s: float
    forward_s: float


def follow(plan: Plan, gpu: GpuSeconds, prices: tuple[Prices, Prices]) -> Times:
    """Steady state: steps are followed until two in a row take the same time. ``prices``: of
    forward and backward."""
    steps = _Steps(plan, gpu, prices)
    times = steps.run()
    for _ in range(MOST_STEPS):
        before, times = times, steps.run()
        if abs(times.step_s - before.step_s) <= 1e-9 * times.step_s:
            break
    return times


def update_order(plan: Plan) -> list[UnitSpec]:
    """Units that the CPU updates after backward, in the order in which forward needs them."""
    units = closed_first(plan.spec, plan.placements)
    return forward_order(u for u in units if not plan.updates_in_backward(u))


def step_schedule(plan: Plan) -> list[Gather]:
    """The step's gathers; one brings back all that left the GPU of a block and micro-batch, its
    input or its inside."""
    blocks = range(len(plan.checkpoint_tiers))
    leaving = tuple(DRAM if activation_traffic(plan, block, 1).d2h else GPU for block in blocks)
    return gathers(replace(plan, checkpoint_tiers=leaving, kept=()), training=True)


class Slots:
    """The times at which the slots of a pool are free."""

    def __init__(self, count: int) -> None:
        self._free = [0.0] * count

    def acquire(self) -> float:
        return heappop(self._free)

    def release(self, at: float) -> None:
        heappush(self._free, at)


class _Ssd:
    """What the GPU waits for goes first, reads beside writes; updates are done in what time that
    leaves."""

    def __init__(self) -> None:
        self._reads = self._writes = self._rest = self._owed = 0.0

    def read(self, ready: float, seconds: float) -> float:
        self._reads = max(self._reads, ready) + seconds
        self._owed += seconds
        return self._reads

    def write(self, ready: float, seconds: float) -> float:
        self._writes = max(self._writes, ready) + seconds
        self._owed += seconds
        return self._writes

    def rest(self, ready: float, seconds: float) -> float:
        self._rest = max(self._rest + self._owed, ready) + seconds
        self._owed = 0.0
        return self._rest


class _Steps:
    """The clocks of all resources: each is the time at which what it was last asked for is done."""

    def __init__(self, plan: Plan, gpu: GpuSeconds, prices: tuple[Prices, Prices]) -> None:
        self._plan, self._gpu, self._prices, self._price = plan, gpu, prices, prices[0]
        self._schedule, self._rows = step_schedule(plan), micro_rows(plan)
        # All that is asked for again and again in every step is found once: a search follows a
        # thousand plans.
        off_gpu = [not place.on_gpu for place in plan.placements]
        self._streamed = {s.index: [u for u in s.units if off_gpu[u]] for s in plan.spec.stages}
        self._closing = {stage: [u for u in units if off_gpu[u.index]] for stage, units in closing_units(plan.spec).items()}
        self._in_backward = [plan.updates_in_backward(u) for u in plan.spec.units]
        self._classes = [cls.name for cls in plan.spec.classes]
        self._weights = [gather_traffic(plan, u.index) for u in plan.spec.units]
        self._gradients = [gradient_traffic(plan, u) for u in plan.spec.units]
        self._updates = [update_traffic(plan, u) for u in plan.spec.units]
        self._order = update_order(plan)
        self._ssd = _Ssd()
        self._loading = self._opened = self._h2d = self._compute = self._d2h = self._cpu = self._norm_known = 0.0
        self._updated, self._arrived, self._persisted = ([0.0] * len(plan.spec.units) for _ in range(3))
        self._weight_slots, self._host_slots = _pools(plan, plan.weight_slot_count), _pools(plan, plan.host_weight_slot_count)
        self._grad_slots, self._host_grads = _pools(plan, plan.grad_slot_count), _pools(plan, plan.host_grad_slot_count)
        self._back_slots, self._staging_out, self._staging_in = (Slots(plan.buffers.checkpoint_slots) for _ in range(3))
        self._out = [[activation_traffic(plan, block, rows) for rows in self._rows[:1] + self._rows[-1:]]
                     for block in range(len(plan.checkpoint_tiers))]
        """The traffic of each block for a full micro-batch and for the last. It is asked for in
        every pass of every micro-batch."""
        self._landed: dict[int | tuple[int, int], float] = {}
        self._uses: dict[int, int] = {}
        self._saved: dict[tuple[int, int], float] = {}
        self._copies: deque[float] = deque()
        self._pending: list[UnitSpec] = []
        self._kept: set[int] = set()
        """Units whose updated weights wait in DRAM for the next forward pass."""

    def run(self) -> Times:
        """One step, from the end of the backward pass before it (updates on the GPU go on) to the
        end of its own."""
        began, computed = self._norm_known, self._compute
        self._opened = max(self._opened, began)
        self._todo = iter(self._schedule)
        self._price = self._prices[0]
        if not self._plan.deferred:
            computed = self._first_landing(computed)
        for stage in self._plan.spec.stages[:-1]:
            self._using(stage, lambda stage=stage: self._forward(stage))
        forward_s = self._compute - computed
        self._price = self._prices[1]
        for stage in self._plan.spec.backward_stages:
            self._using(stage, lambda stage=stage: self._backward(stage))
        self._norm_known = self._compute
        self._compute += sum(self._gpu.update(u) for u in self._plan.spec.units if self._plan.placement(u).on_gpu)
        self._pending = list(self._order)
        return Times(step_s=self._norm_known - began, forward_s=forward_s)

    def _first_landing(self, computed: float) -> float:
        """When the first stage can start: what eager updates of the step before take until then is
        that step's."""
        return max([computed, *map(self._landing, self._streamed[0])])

    # --- the GPU ------------------------------------------------------------------------------------------------

    def _using(self, stage: StageSpec, work: Callable[[], None]) -> None:
        units = self._streamed[stage.index]
        for unit in units:
            self._compute = max(self._compute, self._landing(unit))
        work()
        for unit in units:
            self._uses[unit] -= 1
            if not self._uses[unit]:
                del self._landed[unit]
                self._weight_slots[self._class(unit)].release(self._compute)

    def _forward(self, stage: StageSpec) -> None:
        for micro_batch, rows in enumerate(self._rows):
            if stage.kind != "block":
                self._compute += self._gpu.ends(stage, rows)[0]
                continue
            self._save(stage.index - 1, micro_batch)
            self._compute += self._gpu.block(stage.index - 1, rows)[0]

    def _backward(self, stage: StageSpec) -> None:
        closing = self._closing[stage.index]
        for unit in closing:
            self._compute = max(self._compute, self._grad_slots[self._class(unit.index)].acquire())
        for micro_batch, rows in enumerate(self._rows):
            if stage.kind != "block":
                self._compute += self._gpu.ends(stage, rows)[1]
                continue
            key = (stage.index - 1, micro_batch)
            leaves = bool(self._activations(*key).d2h)
            self._compute = max(self._compute, self._landing(key) if leaves else 0.0)
            self._compute = max(self._compute + self._gpu.block(stage.index - 1, rows)[1], self._spilled(rows))
            if leaves:
                del self._landed[key]
                self._back_slots.release(self._compute)
        for unit in closing:
            self._leave(unit)

    def _spilled(self, rows: int) -> float:
        """When what a block's second run saves has left and come back: each way begins with what is
        saved first."""
        moved = spill_traffic(self._plan, rows)
        if not moved.d2h:
            return 0.0
        self._d2h = max(self._d2h, self._compute) + moved.d2h * self._price.d2h
        self._h2d = max(self._h2d, self._compute) + moved.h2d * self._price.h2d
        return max(self._d2h, self._h2d)

    def _class(self, unit: int) -> str:
        return self._classes[unit]

    # --- activations and gradients on their way out ------------------------------------------------------------

    def _activations(self, block: int, micro_batch: int) -> Traffic:
        return self._out[block][micro_batch == len(self._rows) - 1]

    def _save(self, block: int, micro_batch: int) -> None:
        moved = self._activations(block, micro_batch)
        if not moved.d2h:
            return
        if moved.ssd_written:
            # The thread that launches the GPU's work waits for the slot, and so does what it
            # launches next.
            self._compute = max(self._compute, self._staging_out.acquire())
        self._d2h = max(self._d2h, self._compute) + moved.d2h * self._price.d2h
        self._copies.append(self._d2h)
        if len(self._copies) > COPIES_BEHIND * len(self._rows):
            self._compute = max(self._compute, self._copies.popleft())
        self._saved[block, micro_batch] = self._d2h
        if moved.ssd_written:
            written = self._ssd.write(self._d2h, moved.ssd_written * self._price.ssd)
            self._staging_out.release(written)
            self._saved[block, micro_batch] = written

    def _leave(self, unit: UnitSpec) -> None:
        """A complete gradient: to DRAM, then to SSD or straight into its update."""
        moved, cls = self._gradients[unit.index], self._class(unit.index)
        passing = self._plan.grads_pass_through(unit)
        if passing:
            self._compute = max(self._compute, self._host_grads[cls].acquire())
        self._d2h = max(self._d2h, self._compute) + moved.d2h * self._price.d2h
        self._grad_slots[cls].release(self._d2h)
        self._arrived[unit.index] = self._d2h
        if moved.ssd_written:
            self._arrived[unit.index] = self._ssd.rest(self._d2h, moved.ssd_written * self._price.ssd)
        if self._in_backward[unit.index]:
            self._update(unit)
        if passing:
            done = self._arrived if self._plan.deferred else self._updated
            self._host_grads[cls].release(done[unit.index])

    # --- updates ------------------------------------------------------------------------------------------------

    def _update(self, unit: UnitSpec) -> None:
        """Reads go ahead of the gradient by what the ring holds; write-backs trail."""
        plan, index, in_backward = self._plan, unit.index, self._in_backward[unit.index]
        moved, price = self._updates[index], self._prices[in_backward]
        ready = self._arrived[index] if in_backward else max(self._norm_known, self._arrived[index])
        own_weights = 0 if in_backward else plan.host_weight_bytes(unit)
        slot_free_s = 0.0
        if own_weights:
            slot_free_s = self._host_slots[self._class(index)].acquire()
            self._kept.add(index)
        read, written = moved.ssd_read, moved.ssd_written
        chunk = min(plan.chunk_of(unit) / unit.num_trainable, 1.0)
        ring = min(plan.buffers.ring_slots * chunk, 1.0)
        free = max(self._persisted[index], slot_free_s, 0.0 if in_backward else self._norm_known)
        if own_weights:
            self._loading = max(self._loading, free)
            ready = max(ready, self._ssd.rest(self._loading, own_weights * price.ssd))
        begin, update_s = max(self._cpu, ready), unit.num_trainable * price.update
        through = 0.0
        if read + written:
            # What is written has been computed, and no more is read ahead of that than the ring
            # holds.
            through = self._ssd.rest(max(begin - ring * read * price.ssd, free), (read + written) * price.ssd)
        self._cpu = begin + update_s
        if read:
            # The next unit's first chunk takes the place of one that has been written back.
            rest = max(ring - chunk, 0.0)
            self._loading = max(self._loading, through - rest * read * price.ssd,
                                begin + (1 - rest) * update_s + chunk * written * price.ssd)
        # Chunks are read while others are written; after the last read only what the ring holds is
        # left to write.
        self._updated[index] = self._cpu = max(self._cpu, through - ring * written * price.ssd)
        self._persisted[index] = max(self._updated[index], through)
        if index in plan.early:
            self._updated[index] = self._persisted[index]  # no copy of it is kept: forward reads what was written
        if in_backward and plan.weights_from_ssd(unit):
            self._host_slots[self._class(index)].release(self._persisted[index])

    # --- gathers ------------------------------------------------------------------------------------------------

    def _landing(self, key: int | tuple[int, int]) -> float:
        """When a gather has landed; those before it in the schedule are started first."""
        while key not in self._landed:
            gather = next(self._todo)
            if gather.is_unit:
                self._gather(gather)
            else:
                self._fetch(gather.saved[:2])
        return self._landed[key]

    def _fetch(self, key: tuple[int, int]) -> None:
        moved = self._activations(*key)
        self._opened = max(self._opened, self._saved[key])
        ready = self._opened
        if moved.ssd_written:
            self._opened = max(self._opened, self._staging_in.acquire())
            ready = self._ssd.read(self._opened, moved.ssd_written * self._price.ssd)
        self._h2d = max(self._h2d, ready, self._back_slots.acquire()) + moved.d2h * self._price.h2d
        if moved.ssd_written:
            self._staging_in.release(self._h2d)
        self._landed[key] = self._h2d

    def _gather(self, gather: Gather) -> None:
        index = gather.unit
        moved, cls = self._weights[index], self._class(index)
        self._finish_update(index)
        taken_over = index in self._kept
        self._kept.discard(index)
        self._opened = max(self._opened, self._updated[index])
        ready = self._opened
        if moved.ssd_read and not taken_over:
            self._opened = max(self._opened, self._host_slots[cls].acquire())
            ready = self._ssd.read(self._opened, moved.ssd_read * self._price.ssd)
        self._h2d = max(self._h2d, ready, self._weight_slots[cls].acquire()) + moved.h2d * self._price.h2d
        if moved.ssd_read and not gather.keep_for_update:
            self._host_slots[cls].release(max(self._h2d, self._persisted[index]) if taken_over else self._h2d)
        self._landed[index], self._uses[index] = self._h2d, gather.uses

    def _finish_update(self, index: int) -> None:
        """Deferred: make the updates up to this unit's, which are made in an order of their own."""
        while any(u.index == index for u in self._pending):
            self._update(self._pending.pop(0))


def _pools(plan: Plan, count_of: Callable[[str], int]) -> dict[str, Slots]:
    return {cls.name: Slots(count_of(cls.name)) for cls in plan.spec.slot_classes}
