"""Everything a plan needs to run: memory reserved, files made, threads started; and its orderly end."""

import errno
import os
from dataclasses import dataclass

import torch

from ratel import native
from ratel.errors import RatelError
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.memory.lanes import Lanes
from ratel.memory.retire import Retirer
from ratel.models import Parts
from ratel.plan.placement import ELEMENT_BYTES
from ratel.plan.plan import Plan
from ratel.plan.schedule import Gather
from ratel.runtime.activations import Checkpoints
from ratel.runtime.gradients import Gradients
from ratel.runtime.optimizer import OptimizerPipeline
from ratel.runtime.state import SavedState
from ratel.runtime.streamer import Source, Streamer
from ratel.runtime.weights import WeightSource
from ratel.store.host_cache import HostCache
from ratel.store.planes import Store
from ratel.store.transfer import UnitTransfer, aligned_empty


@dataclass(frozen=True, kw_only=True)
class IoOptions:
    directories: tuple[str, ...] = ()
    backend: str = "auto"
    bandwidth_bps: float | None = None
    direct: str = "auto"
    queue_depth: int = 32
    stripe_bytes: int = 1 << 20


class Machinery:
    """Built once per session. On an error while building, what was built is taken down again."""

    def __init__(self, parts: Parts, plan: Plan, device: torch.device, *, pool: "native.op_ds.Pool",
                 io: IoOptions) -> None:
        self.plan, self.pool, self._parts = plan, pool, parts
        self.exchange = Exchange()
        self.engine = self.arena = None
        try:
            self._build(parts, plan, device, io)
        except BaseException:
            self.close()
            raise

    def _build(self, parts: Parts, plan: Plan, device: torch.device, io: IoOptions) -> None:
        exchange = self.exchange
        self.lanes = Lanes(device)
        state_volume, scratch_volume = self._open_volumes(plan, io)
        self.arena = Arena(plan.arena_bytes, pin=device.type == "cuda", pool=self.pool)
        if self.engine is not None:
            self.engine.register_buffer(self.arena.address, self.arena.num_bytes)
        self.store = Store(plan, self.arena, device, state_volume)
        self.transfer = UnitTransfer(self.store, self.engine, self.pool)
        cache = self.cache = HostCache(plan, self.store, self.arena, self.engine, exchange)
        self.copies, self.writes = Retirer("copies", exchange), Retirer("writes", exchange)
        self.updates = OptimizerPipeline(plan, self.store, cache, self.arena, exchange, self.pool, self.engine, self.writes)
        self.weights = WeightSource(plan, self.store, cache, exchange, self.lanes, self.updates)
        self.checkpoints = Checkpoints(plan, self.arena, device, exchange, self.lanes, self.copies,
                                       self.writes, self.engine, scratch_volume)
        self.gradients = Gradients(plan, self.store, self.arena, exchange, self.lanes, param_order(parts, plan))
        self.streamer = Streamer(exchange, self.lanes, self.copies, self._source_of)
        assert self.arena.free_bytes == 0, f"{self.arena.free_bytes} bytes of the arena have no use"

    def _source_of(self, gather: Gather) -> Source:
        return self.checkpoints if gather.is_checkpoint else self.weights

    def import_weights(self) -> None:
        """Bring every unit from the model's source to its tier, one unit in memory at a time."""
        master = torch.empty(max(u.num_elements for u in self.plan.spec.units), dtype=torch.float32)
        for unit in self.plan.spec.units:
            part = master[: unit.num_elements]
            self._parts.read_unit(unit.index, part)
            self.transfer.write_weights(unit.index, part)
            for name in ("m", "v"):
                if self.store.has(unit.index, name):
                    self.transfer.clear(unit.index, name)
        self.lanes.synchronize()

    def import_state(self, saved: SavedState) -> None:
        """Bring every plane of a saved state to its tier, one at a time, each chunk verified."""
        for unit in self.plan.spec.units:
            for name in ELEMENT_BYTES:
                if self.store.has(unit.index, name):
                    self.transfer.write(unit.index, name, self._fitted(saved.read(unit.index, name), unit.index, name))
        self.lanes.synchronize()

    def _fitted(self, values: torch.Tensor | None, unit: int, name: str) -> torch.Tensor:
        """A saved plane may be shorter or longer by the frozen parameters' `lo`, which only fp32 runs have."""
        plane = self.store.plane(unit, name)
        fitted = aligned_empty(plane.num_elements, plane.dtype).zero_()
        if values is not None:
            count = min(values.numel(), fitted.numel())
            fitted[:count] = values[:count]
        return fitted

    def close(self) -> None:
        """End the threads, then the engine, then the memory. Pending updates are lost: flush first."""
        self.exchange.close()
        if self.engine is not None:
            self.engine.close()
        for name in ("streamer", "updates", "copies", "writes"):
            if hasattr(self, name):
                getattr(self, name).join()
        if hasattr(self, "lanes"):
            self.lanes.synchronize()
        if self.arena is not None:
            self.arena.close()

    def _open_volumes(self, plan: Plan, io: IoOptions) -> tuple:
        """Volumes for states and checkpoints, allocated in full: a full disk is found here."""
        items = plan.ssd_items
        sizes = {"states": items.get("planes", 0), "checkpoints": items.get("checkpoints", 0)}
        if not any(sizes.values()):
            return None, None
        try:
            self.engine = native.nvme_ds.Engine(backend=io.backend, queue_depth=io.queue_depth,
                                                bandwidth_bps=io.bandwidth_bps)
        except OSError as error:
            raise RatelError(f"the I/O engine cannot start: {error}", field="io_backend", value=io.backend,
                             remedy="Use --io-backend threads or auto") from error
        return tuple(self._open_volume(name, size, io) if size else None for name, size in sizes.items())

    def _open_volume(self, name: str, num_bytes: int, io: IoOptions) -> "native.nvme_ds.Volume":
        try:
            return self.engine.create_volume(list(io.directories), f"ratel-{name}", num_bytes,
                                             stripe_bytes=io.stripe_bytes, direct=io.direct)
        except OSError as error:
            if error.errno == errno.EINVAL and io.direct == "on":
                raise RatelError(str(error), field="direct", value="on", remedy="Use --direct auto, or another directory"
                                 ) from error
            raise RatelError(f"no place for {num_bytes} bytes of {name}: {error}", field="ssd",
                             value=",".join(map(os.fspath, io.directories)),
                             remedy="Give directories on a drive with enough free space that you may write to"
                             ) from error


def param_order(parts: Parts, plan: Plan) -> dict[str, int]:
    """Position of each trained parameter among those of the module: the order in which norms are summed."""
    trained = {p.name for u in plan.spec.units for p in u.params if p.trainable}
    names = [name for name, _ in parts.module.named_parameters() if name in trained]
    assert len(names) == len(trained), "a trained parameter is not in the module under its name"
    return {name: index for index, name in enumerate(names)}
