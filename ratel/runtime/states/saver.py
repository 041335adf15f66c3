"""Copies states out while training goes on: one thread, unit by unit, in the order in which they
are updated.

A save is of one moment: after the updates asked for so far. Each unit is copied once these are on
its tier, into buffers in DRAM and from there to the target; only the unit's *next* update waits for
that. So training is held up by what the copy takes of its bandwidth, and by nothing where a whole
step lies between two updates of a unit.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ratel import native
from ratel.errors import DamagedError, RatelError, remedy_for
from ratel.memory import jitter
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange, Mailbox, Worker, join_all
from ratel.memory.lanes import Event, Lanes
from ratel.planner.formats import TRAINED
from ratel.planner.placement import GPU, SSD
from ratel.planner.plan import Plan
from ratel.planner.shape import UnitSpec
from ratel.planner.slot_layout import pieces
from ratel.runtime.states.base import FrozenBase
from ratel.runtime.updates.pipeline import OptimizerPipeline
from ratel.runtime.updates.updater import at_once
from ratel.store.plane_io import PlaneIO, Read
from ratel.store.planes import Store

FILLS_AHEAD = 4
"""Buffers that fill while earlier ones are written."""


class Target(Protocol):
    """Where a save goes. Its methods are called on the saver's thread, in this order."""

    is_in_place: bool
    """It is made of the files that training works on. A unit with planes there may be updated again
    only when the whole save is complete; after a failure nothing is known of what training has
    written, so the session ends."""

    def begin(self) -> None: ...

    def wanted(self, unit: UnitSpec) -> tuple[str, ...]:
        """The planes of the unit that have to be copied. Asked once for each unit, when it may
        be."""

    def write(self, unit: UnitSpec, plane: str, begin: int, values: torch.Tensor, sums: np.ndarray) -> int:
        """Start writing a piece; returns the ticket."""

    def finish(self, training: dict[str, Any]) -> None:
        """Everything is written: make it last, and known."""

    def drop(self) -> None:
        """It will not be complete: remove what there is of it."""


@dataclass(slots=True, eq=False)
class Save:
    target: Target
    training: dict[str, Any]
    last_updates: list[int]
    """By unit: the number of the last update that belongs to it."""
    gpu_ready: Event
    copied: set[int] = field(default_factory=set)
    done: bool = False
    error: Exception | None = None


@dataclass(slots=True)
class _Filling:
    """A buffer on its way from a plane; ``source`` says when it is full."""

    unit: UnitSpec
    plane: str
    begin: int
    buffer: torch.Tensor
    values: torch.Tensor
    source: "Event | Read"


class Saver:
    def __init__(self, plan: Plan, store: Store, arena: Arena, exchange: Exchange, lanes: Lanes, io: PlaneIO,
                 pool: "native.op_ds.Pool", engine: "native.nvme_ds.Engine", updates: OptimizerPipeline,
                 base: FrozenBase, order: list[UnitSpec]) -> None:
        self._plan, self._store, self._exchange, self._lanes = plan, store, exchange, lanes
        self._io, self._pool, self._engine, self._updates, self._order = io, pool, engine, updates, order
        self._base = base
        self._changed = exchange.condition()
        self._free = [arena.take(plan.save_piece_bytes) for _ in range(plan.save_pieces)]
        self._filling: deque[_Filling] = deque()
        self._writing: deque[tuple[int, torch.Tensor]] = deque()
        self._save: Save | None = None
        self._mail = Mailbox(exchange)
        self._worker = Worker("saver", exchange, self._run)
        updates.hold_back(self.wait_copied)

    # --- other threads ------------------------------------------------------------------------------------------

    def request(self, target: Target, training: dict[str, Any]) -> None:
        """Save what the updates asked for so far lead to. An earlier save must have been waited
        for."""
        save = Save(target, training, self._updates.submitted(), self._lanes.record("compute"))
        with self._exchange.lock:
            assert self._save is None, "one save at a time"
            self._save = save
            self._mail.put(save)

    def wait(self) -> Save | None:
        """Block until the save under way, if any, has ended, and return it. What it failed with is
        in it."""
        with self._exchange.lock:
            save = self._save
            if save is not None:
                self._exchange.wait_for(self._changed, lambda: save.done)
                self._save = None
        return save

    def ended(self) -> Save | None:
        """As ``wait``, but without waiting."""
        with self._exchange.lock:
            return self.wait() if self._save is not None and self._save.done else None

    def wait_copied(self, unit: int, number: int) -> None:
        """Block until the save under way, if any, no longer needs what update ``number`` of the
        unit overwrites."""
        with self._exchange.lock:
            save = self._save
            if save is None or number <= save.last_updates[unit]:
                return
            self._exchange.wait_for(self._changed, lambda: save.done or self._may_overwrite(save, unit), "saving")

    def join(self, timeout_s: float) -> bool:
        self._updates.hold_back(at_once)  # else each of the two keeps the other until the next collection, and so the planes
        return join_all([self._worker], timeout_s)

    def _may_overwrite(self, save: Save, unit: int) -> bool:
        holds = save.target.is_in_place and self._plan.has_states_on_ssd(self._plan.spec.units[unit])
        return unit in save.copied and not holds

    # --- the saver's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._lanes.is_cuda:
            torch.cuda.set_device(self._lanes.device)
        while True:
            save: Save = self._mail.take()
            try:
                self._copy(save)
            except native.nvme_ds.StallError:
                raise  # the device still has the buffers, and perhaps those of training: the session ends
            except (OSError, RatelError, DamagedError) as error:
                self._abort(save, error)
                if save.target.is_in_place or isinstance(error, DamagedError):
                    raise
            with self._exchange.lock:
                save.done = True
                self._changed.notify_all()

    def _copy(self, save: Save) -> None:
        save.target.begin()
        for unit in self._order:
            self._updates.ledger.wait_persisted(unit.index, save.last_updates[unit.index])
            jitter.pause()
            self._copy_unit(save, unit)
            with self._exchange.lock:
                save.copied.add(unit.index)
                self._changed.notify_all()
        while self._writing:
            self._complete_write()
        save.target.finish({**save.training, **self._base.describe()})

    def _abort(self, save: Save, error: Exception) -> None:
        """Nothing of the save may still be moving when its buffers are used again and its files are
        removed."""
        while self._filling:
            filling = self._filling.popleft()
            self._settle(lambda: self._wait_full(filling))
            self._free.append(filling.buffer)
        while self._writing:
            self._settle(self._complete_write)
        save.error = error
        with suppress(OSError):  # a drive that fails may let nothing be removed either; the next start removes it
            save.target.drop()

    def _settle(self, wait: Callable[[], None]) -> None:
        try:
            wait()
        except native.nvme_ds.StallError:
            raise
        except (OSError, DamagedError):
            pass  # the first error is the one to report

    def _copy_unit(self, save: Save, unit: UnitSpec) -> None:
        for name in save.target.wanted(unit):
            if self._store.has(unit.index, name):
                count = self._plan.formats.num_elements(unit, name, (TRAINED,))
                for begin, end in pieces(unit, count, self._plan.piece_elements):
                    self._filling.append(self._start_fill(save, unit, name, begin, end))
                    if len(self._filling) > min(FILLS_AHEAD, self._plan.save_pieces - 1):
                        self._pass_on(save)
        while self._filling:
            self._pass_on(save)

    def _start_fill(self, save: Save, unit: UnitSpec, name: str, begin: int, end: int) -> _Filling:
        while not self._free:
            self._complete_write()
        plane = self._store.plane(unit.index, name)
        buffer = self._free.pop()
        values = buffer[: plane.encoding.num_bytes(end - begin)].view(plane.dtype)
        if plane.tier == SSD:
            source = self._io.read(unit.index, name, begin, values, native.nvme_ds.BACKGROUND)
        elif plane.tier == GPU:
            source = self._fetch(save, plane.part(begin, end), values)
        else:
            part = plane.part(begin, end)
            self._pool.copy(values.data_ptr(), part.data_ptr(), values.numel() * values.element_size())
            source = Event()
        return _Filling(unit, name, begin, buffer, values, source)

    def _fetch(self, save: Save, part: torch.Tensor, values: torch.Tensor) -> Event:
        self._lanes.wait("d2h", save.gpu_ready)
        with self._lanes.work("d2h", "save"):
            values.copy_(part, non_blocking=True)
        return self._lanes.record("d2h")

    def _pass_on(self, save: Save) -> None:
        """The oldest buffer is full: write it."""
        filling = self._filling.popleft()
        try:
            self._wait_full(filling)
            encoding = self._store.plane(filling.unit.index, filling.plane).encoding
            sums = self._store.checksums.compute(filling.unit.index, filling.begin, filling.values, encoding)
            jitter.pause()
            ticket = save.target.write(filling.unit, filling.plane, filling.begin, filling.values, sums)
        except BaseException:
            self._free.append(filling.buffer)  # its read is over, and cannot be waited for again
            raise
        self._writing.append((ticket, filling.buffer))

    def _wait_full(self, filling: _Filling) -> None:
        if isinstance(filling.source, Event):
            filling.source.synchronize()
        else:
            self._io.wait(filling.source)

    def _complete_write(self) -> None:
        ticket, buffer = self._writing.popleft()
        self._free.append(buffer)
        self._engine.wait(ticket)


def raise_failure(save: Save | None) -> None:
    """What a save failed with, as the user should read it. The session goes on: its own states are
    well."""
    if save is None or save.error is None:
        return
    if isinstance(save.error, OSError):
        reason = (getattr(save.error, "strerror", None) or str(save.error)).split(". ")[0]  # what helps is said here
        raise RatelError(f"the state could not be written: {reason}", field="state", value=getattr(save.target, "path", None),
                         remedy=remedy_for(save.error, "Free space there or give another directory; an earlier state is untouched, and can be resumed from")
                         ) from save.error
    raise save.error
