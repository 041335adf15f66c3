"""The parts of a session that hold planes, by themselves: no model, no step. No tests here."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ratel import native
from ratel.memory.anonymous import anonymous_map
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.planner.plan import Plan
from ratel.planner.shape import ModelSpec, ParamSpec, StageSpec, lay_out
from ratel.planner.slot_layout import PAGE_BYTES
from ratel.planner.work import Buffers
from ratel.store.host_cache import HostCache
from ratel.store.plane_io import PlaneIO
from ratel.store.planes import Store
from ratel.store.transfer import UnitTransfer
from tests.support.plans import make_plan

GRAIN = 2048


def small_spec(*shapes: tuple[int, int]) -> ModelSpec:
    """A unit for each pair of trained and frozen elements, all of them blocks but the first and the
    last."""
    kinds = ["pre", *["block"] * (len(shapes) - 2), "post"]
    units = tuple(lay_out(i, f"{kind}.{i - 1}" if kind == "block" else kind, kind,
                          [ParamSpec(name=f"{i}.{what}", shape=(count,), trainable=what == "trained")
                           for what, count in zip(("trained", "frozen"), pair, strict=True) if count])
                  for i, (kind, pair) in enumerate(zip(kinds, shapes, strict=True)))
    stages = tuple(StageSpec(index=u.index, name=u.name, kind=u.kind, units=(u.index,)) for u in units)
    return ModelSpec(name="small", units=units, stages=stages, hidden_size=64, vocab_size=64)


PLAIN = small_spec((3000, 0), (5000, 0), (7000, 0), (2500, 0))
FROZEN = small_spec((3000, 0), (5000, 5000), (0, 4000), (2500, 0))


@dataclass(kw_only=True)
class Parts:
    plan: Plan
    engine: "native.nvme_ds.Engine"
    arena: Arena
    store: Store
    io: PlaneIO
    exchange: Exchange
    transfer: UnitTransfer
    cache: HostCache

    def unit(self, index: int) -> Any:
        return self.plan.spec.units[index]


@contextmanager
def parts(ssd_dir: Path, placement: Any = "ssd", *, spec: ModelSpec = PLAIN, checksums: bool = True, **plan: Any) -> Iterator[Parts]:
    """As a session makes them, with room for every DRAM slot."""
    planned = make_plan(spec, placement, buffers=plan.pop("buffers", Buffers(chunk_elements=GRAIN, host_weight_slots=2)), **plan)
    with ExitStack() as stack:
        pool = stack.enter_context(native.op_ds.Pool(1))
        engine = stack.enter_context(native.nvme_ds.Engine())
        state_bytes = planned.num_slots * planned.slot_layout.num_bytes
        volume = engine.create_volume([ssd_dir], "states", state_bytes) if state_bytes else None
        frozen_bytes = planned.ssd_items.get("frozen planes", 0)
        frozen = engine.create_volume([ssd_dir], "frozen", frozen_bytes) if frozen_bytes else None
        grad_bytes = planned.ssd_items.get("gradients", 0)
        grads = engine.create_volume([ssd_dir], "gradients", grad_bytes) if grad_bytes else None
        exchange = Exchange()
        arena = Arena(planned.arena_bytes, pin=False, pool=pool)
        stack.callback(arena.close)
        store = Store(planned, arena, torch.device("cpu"), volume, frozen, grads, pool, checksums=checksums)
        io = PlaneIO(store, engine, exchange.tracing)
        yield Parts(plan=planned, engine=engine, arena=arena, store=store, io=io, exchange=exchange,
                    transfer=UnitTransfer(store, io, pool, engine), cache=HostCache(planned, store, arena, io, exchange))


def aligned(values: torch.Tensor) -> torch.Tensor:
    """A copy that begins at a page."""
    num_bytes = values.numel() * values.element_size()
    memory = torch.frombuffer(anonymous_map(-(-num_bytes // PAGE_BYTES) * PAGE_BYTES), dtype=torch.uint8)
    copy = memory[:num_bytes].view(values.dtype)
    copy.copy_(values)
    return copy


def random_plane(dtype: torch.dtype, num_elements: int, seed: int) -> torch.Tensor:
    """Any bits that are a finite number."""
    generator = torch.Generator().manual_seed(seed)
    return aligned((torch.randn(num_elements, generator=generator) * 100).to(dtype))
