"""Everything a plan needs to run: memory reserved, files made, threads started; and its orderly
end."""

import os
import weakref
from pathlib import Path

import torch

from ratel import native
from ratel.memory.anonymous import region_bytes
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.memory.holdings import Holdings
from ratel.memory.lanes import Lanes
from ratel.memory.retire import Retirer
from ratel.models import Parts
from ratel.ownership.stamps import STAMP_BYTES, WORKING, new_volume_name
from ratel.planner.placement import SSD
from ratel.planner.plan import Plan
from ratel.planner.shape import UnitSpec
from ratel.planner.slot_layout import PAGE_BYTES
from ratel.runtime.blocks.spiller import Spiller
from ratel.runtime.states.base import FrozenBase
from ratel.runtime.states.commits import remove_leftovers
from ratel.runtime.states.format import describe_planes
from ratel.runtime.states.imports import import_frozen, import_weights
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.saver import Saver
from ratel.runtime.states.targets import CommitLog
from ratel.runtime.streams.activations import Activations
from ratel.runtime.streams.gradients import Gradients
from ratel.runtime.streams.slot_sums import SlotSums
from ratel.runtime.streams.streamer import Streamer
from ratel.runtime.streams.weights import WeightSource
from ratel.runtime.updates.pipeline import OptimizerPipeline
from ratel.startup import arena_ahead
from ratel.store.host_cache import HostCache
from ratel.store.plane_io import PlaneIO
from ratel.store.planes import Store
from ratel.store.transfer import UnitTransfer, aligned_empty
from ratel.store.volumes import IoOptions, create_volume, open_engine, pattern_of, reopen_volume
from ratel.units import align_up


class Machinery:
    """Built once per session. On an error while building, what was built is taken down again."""

    def __init__(self, parts: Parts, plan: Plan, device: torch.device, *, pool: "native.op_ds.Pool", io: IoOptions,
                 commits: Path | None = None, earlier: SavedState | None = None) -> None:
        """``commits``: the directory of the records, where the plan commits in place. ``earlier``:
        a run's commits whose SSD files are to be worked on further."""
        self.plan, self.pool, self._parts, self._io_options = plan, pool, parts, io
        self.exchange, self.log = Exchange(), None
        self._holdings = Holdings(self.exchange)
        self._finalizer = weakref.finalize(self, self._holdings.close)
        try:
            self._build(parts, plan, device, io, commits, earlier)
        except BaseException:
            self.close()
            raise

    def _build(self, parts: Parts, plan: Plan, device: torch.device, io: IoOptions, commits: Path | None,
               earlier: SavedState | None) -> None:
        exchange, held = self.exchange, self._holdings
        self.lanes = held.lanes = Lanes(device)
        self.engine = held.engine = open_engine(io)
        state_volume, frozen_volume, grad_volume, activation_volume = self._open_volumes(plan, io, commits, earlier)
        self.arena = held.arena = Arena(plan.arena_bytes, pin=device.type == "cuda", pool=self.pool,
                           memory=arena_ahead.take(region_bytes(plan.arena_bytes)))
        self.store = Store(plan, self.arena, device, state_volume, frozen_volume, grad_volume, self.pool, checksums=io.checksums)
        self.io = PlaneIO(self.store, self.engine, exchange.tracing)
        self.transfer = UnitTransfer(self.store, self.io, self.pool, self.engine)
        self.base = FrozenBase(plan.spec, plan.formats, self.transfer, exchange)
        cache = self.cache = HostCache(plan, self.store, self.arena, self.io, exchange)
        self.copies, self.writes = Retirer("copies", exchange), Retirer("writes", exchange)
        held.workers += [self.copies, self.writes]
        self.updates = OptimizerPipeline(plan, self.store, cache, self.arena, exchange, self.pool, self.engine, self.io,
                                         self.writes)
        held.workers.append(self.updates)
        self.weights = WeightSource(plan, self.store, cache, exchange, self.lanes, self.updates.ledger)
        self.activations = Activations(plan, self.arena, device, exchange, self.lanes, self.copies,
                                       self.writes, self.engine, activation_volume,
                                       SlotSums(self.pool, activation_volume, enabled=io.checksums))
        self.spiller = Spiller(self.lanes, self.arena.take(plan.spill.region_bytes), plan.spill) if plan.spill else None
        self.gradients = Gradients(plan, self.store, self.arena, exchange, self.lanes, param_order(parts, plan))
        self.streamer = Streamer(exchange, self.lanes, self.copies, self.weights, self.activations)
        held.workers.append(self.streamer)
        self.saver = Saver(plan, self.store, self.arena, exchange, self.lanes, self.io, self.pool, self.engine,
                           self.updates, self.base, update_order(plan))
        held.workers.append(self.saver)
        if plan.commits:
            self.log = CommitLog(commits, plan, self.store, stripe_bytes=io.stripe_bytes, pattern=pattern_of(io),
                                 folders=io.directories)
        assert self.arena.free_bytes == 0, f"{self.arena.free_bytes} bytes of the arena have no use"

    def settle(self) -> None:
        """Wait for the arena, then let the I/O engine have it: registering maps what is not mapped
        yet, on one core. Comes after the import, which needs neither, and before the first step."""
        self.arena.settle()
        self.engine.register_buffer(self.arena.address, self.arena.num_bytes)

    def import_weights(self) -> None:
        """Bring every unit from the model's source to its tier; moments are zero."""
        # Threads have streams of their own: what made the planes on the GPU zeros must not come
        # after what they bring.
        self.lanes.synchronize()
        import_weights(self._parts, self.plan.spec, self.store, self.transfer)
        self._imported()

    def import_state(self, saved: SavedState) -> None:
        """Bring every plane of a saved state to its tier, one at a time, each chunk verified."""
        self._import_base(saved)
        planes = [(unit, name) for unit in self.plan.spec.units for name in self.plan.formats.planes if self.store.has(unit.index, name)]
        # One for all: what one import has let go of need not be free when the next one begins.
        buffer = aligned_empty(max((self._fitted_bytes(saved, *plane) for plane in planes), default=0), torch.uint8)
        for unit, name in planes:
            self.transfer.write(unit, name, self._fitted(saved, unit, name, buffer))
        self._imported()

    def continue_commits(self, saved: SavedState) -> None:
        """The volume holds the saved state already: bring what is not on SSD to its tier, and go on
        from there."""
        self.store.versions.restore(saved.commit.slots)
        self._import_base(saved)
        for unit, name in self.plan.slot_layout.places:
            self.store.checksums.restore(saved.commit.slots[unit], unit, name, saved.checksums(unit, name))
        for unit, name in ((self.plan.spec.units[index], name) for index, name in self.plan.slot_layout.places):
            if self.plan.placement(unit).tier(name) != SSD:
                self.transfer.recall(unit, name)
        self.log.take_over(saved.commit)
        self._imported()

    def _import_base(self, saved: SavedState) -> None:
        """Where the state does not hold what is frozen, it comes from the model, which must be the
        same."""
        if saved.base is not None:
            self.lanes.synchronize()
            import_frozen(self._parts, self.plan.spec, self.store, self.transfer)
            self.lanes.synchronize()
            self.base.check(saved.base)

    def _imported(self) -> None:
        self.store.complete_seconds()
        self.lanes.synchronize()

    def _counts(self, saved: SavedState, unit: UnitSpec, name: str) -> tuple[int, int]:
        """Elements of a plane that come out of a state, and that it has there."""
        num_elements = self.store.plane(unit.index, name).num_elements
        wanted = num_elements if saved.base is None else min(num_elements, unit.num_trainable)
        return wanted, saved.num_elements(unit.index, name)

    def _fitted_bytes(self, saved: SavedState, unit: UnitSpec, name: str) -> int:
        return self.store.plane(unit.index, name).encoding.num_bytes(max(self._counts(saved, unit, name)))

    def _fitted(self, saved: SavedState, unit: UnitSpec, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """What a state has of a plane, in ``buffer``; a state of an older version has its frozen
        part, too. That may be shorter or longer by the frozen parameters' `lo`, which only fp32
        runs have."""
        wanted, count = self._counts(saved, unit, name)
        plane = self.store.plane(unit.index, name)
        values = buffer[: self._fitted_bytes(saved, unit, name)].view(plane.dtype)
        saved.read(unit.index, name, values, plane.encoding)
        values[plane.encoding.place(count) :] = 0
        return plane.part(0, wanted, values)

    def close(self) -> None:
        """End the threads, then the engine, then the memory. Pending updates are lost: flush
        first."""
        self._holdings.close()
        self._finalizer.detach()  # not before: what ends this in the middle leaves the rest to it

    def _open_volumes(self, plan: Plan, io: IoOptions, commits: Path | None, earlier: SavedState | None) -> tuple:
        """Volumes for states, what is frozen, gradients and activations, allocated in full: a full
        disk is found here."""
        items = plan.ssd_items
        remove_leftovers(commits, io.directories)
        states_name, frozen_name, gradients_name, activations_name = WORKING
        if earlier is not None:
            states = reopen_volume(self.engine, earlier.files, items["planes"], io)
        else:
            name = new_volume_name() if plan.commits else states_name
            states = create_volume(self.engine, name, items.get("planes", 0), io)  # the first commit has it kept
        frozen = create_volume(self.engine, frozen_name, items.get("frozen planes", 0), io)
        return (states, frozen, create_volume(self.engine, gradients_name, items.get("gradients", 0), io),
                create_volume(self.engine, activations_name, items.get("checkpoints", 0) + items.get("inner activations", 0), io))


def can_continue(saved: SavedState, plan: Plan, io: IoOptions) -> bool:
    """Whether the plan would work on just the files, places and grains that the commits have."""
    if not (saved.is_in_place and plan.commits and all(path.is_file() for path in saved.files)):
        return False
    folders = [os.path.realpath(folder) for folder in io.directories]
    manifest = saved.manifest
    return ([str(path.parent) for path in saved.files] == folders and manifest["pattern"] == pattern_of(io)
            and manifest["stripe_bytes"] == io.stripe_bytes and manifest["grain"] == plan.grain
            and saved.conversion(plan.formats) is None
            and manifest["planes"] == describe_planes(plan.spec, plan.slot_layout)
            and sum(path.stat().st_size for path in saved.files)
            == align_up(plan.ssd_items["planes"], PAGE_BYTES) + STAMP_BYTES * len(saved.files))


def update_order(plan: Plan) -> list[UnitSpec]:
    """Units in the order in which a save can have them: those on the GPU are complete when a step
    is, the others when their update is."""
    return sorted(plan.spec.units, key=lambda u: (not plan.placement(u).on_gpu, u.kind != "shared",
                                                  u.index if plan.deferred else -u.index))


def param_order(parts: Parts, plan: Plan) -> dict[str, int]:
    """Position of each trained parameter among those of the module: the order in which norms are
    summed."""
    trained = {p.name for u in plan.spec.units for p in u.params if p.trainable}
    names = [name for name, _ in parts.module.named_parameters() if name in trained]
    assert len(names) == len(trained), "a trained parameter is not in the module under its name"
    return {name: index for index, name in enumerate(names)}
