"""What a step moves: the table against the formula, the formula against the engine, the engine
against the kernel."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import nvme_ds
import ratel.runtime.session.training_step
from ratel.hardware.storage import supports_direct
from ratel.memory import jitter
from ratel.planner.formats import EXACT, FORMATS
from ratel.planner.placement import forced_placements
from ratel.planner.plan import Plan
from ratel.planner.shape import ModelSpec, ParamSpec, StageSpec, lay_out
from ratel.planner.traffic import Traffic, step_traffic
from ratel.planner.work import Buffers, Work
from ratel.runtime.session.preparing import ready_for
from ratel.runtime.session.session import Session
from ratel.runtime.streams.activations import Activations
from ratel.runtime.streams.gradients import Gradients
from ratel.runtime.streams.weights import WeightSource
from tests.support.families import batches, build, llama, loss_fn_of
from tests.support.plans import gpt_spec, make_plan

STEPS = 3
ONE_EACH = Buffers(weight_slots=1, grad_slots=1, host_weight_slots=1, host_grad_slots=1, ring_slots=1,
                   chunk_elements=4096, checkpoint_slots=1)
MIXED = {"*": {"hi": "dram", "lo": "ssd", "m": "ssd", "v": "dram", "g": "dram"}, "block.1": "ssd", "block.2": "gpu",
         "block.3": {"hi": "ssd", "g": "ssd"}}
HI_IN_DRAM = {"*": {"hi": "dram", "lo": "ssd", "m": "ssd", "v": "ssd", "g": "dram"}}
STATES_ON_SSD = {"*": {"hi": "ssd", "lo": "ssd", "m": "ssd", "v": "ssd", "g": "dram"}}


# --- the table ------------------------------------------------------------------------------------------------------


def deep_spec(num_blocks: int, frozen: bool = False) -> ModelSpec:
    """Blocks alone in number, ends of the same width: what is per parameter shows as depth
    grows."""
    kinds = ["pre", *["block"] * num_blocks, "post"]
    units = tuple(lay_out(i, f"{kind}.{i}", kind, [ParamSpec(name=f"{i}.w", shape=(256, 256), trainable=not frozen)])
                  for i, kind in enumerate(kinds))
    stages = tuple(StageSpec(index=u.index, name=u.name, kind=u.kind, units=(u.index,)) for u in units)
    return ModelSpec(name="deep", units=units, stages=stages)


def deep_plan(placement: dict, *, num_blocks: int = 1000, optimizer: str = "deferred", fp32: bool = False,
              frozen: bool = False, checkpoints: str = "gpu") -> Plan:
    spec = deep_spec(num_blocks, frozen)
    return Plan(spec=spec, formats=EXACT["fp32" if fp32 else "bf16"], optimizer=optimizer, placements=forced_placements(spec, placement),
                checkpoint_tiers=(checkpoints,) * (num_blocks - 1) + ("gpu",),
                work=Work(rows=6, seq_len=8, micro_rows=4, hidden_bytes=4 * 1024))


def per_parameter(plan: Plan) -> tuple[float, float, float, float]:
    moved = step_traffic(plan)
    return tuple(num_bytes / plan.spec.num_params
                 for num_bytes in (moved.ssd_read, moved.ssd_written, moved.h2d, moved.d2h))


@pytest.mark.unit
@pytest.mark.parametrize("optimizer", ["eager", "deferred"])
@pytest.mark.parametrize("placement, read, written", [
    (STATES_ON_SSD, 14, 12),
    (HI_IN_DRAM, 10, 10),
    ({"*": {"hi": "dram", "lo": "dram", "m": "ssd", "v": "ssd"}}, 8, 8),
    ({"*": {"hi": "dram", "lo": "dram", "m": "dram", "v": "ssd"}}, 4, 4),
    ({"*": {"hi": "ssd"}}, 4, 2),
    ({"*": "dram"}, 0, 0),
])
def test_a_deep_model_moves_what_the_table_says(placement: dict, read: float, written: float, optimizer: str) -> None:
    """In the limit: per parameter 2+2 bytes of weights down and 2 of gradient up, whatever lives
    where."""
    found = per_parameter(deep_plan(placement, optimizer=optimizer))
    assert found == pytest.approx((read, written, 4, 2), rel=0.005)


@pytest.mark.unit
@pytest.mark.parametrize(("states", "most"), [("exact", 26), ("bf16", 18), ("8bit", 14.25)])
def test_fewer_bytes_of_states_are_fewer_bytes_moved(states: str, most: float) -> None:
    """With all states on SSD, and gradients in DRAM."""
    plan = replace(make_plan(gpt_spec(40, 1024), STATES_ON_SSD, optimizer="deferred"), formats=FORMATS[states]["bf16"])
    assert 0.96 * most < step_traffic(plan).ssd_bytes / plan.spec.num_params <= most


@pytest.mark.unit
def test_the_table_is_never_exceeded_and_turn_units_save_a_read() -> None:
    plan = deep_plan(STATES_ON_SSD, num_blocks=40)
    unit_bytes = plan.spec.units[0].num_elements * 2
    held = plan.weight_slot_count("block") + 1  # blocks that stay over the turn, and what comes after them
    assert step_traffic(plan).ssd_read == 14 * plan.spec.num_params - held * unit_bytes
    assert step_traffic(plan).ssd_written == 12 * plan.spec.num_params
    assert step_traffic(plan, after_flush=True).ssd_read == step_traffic(plan).ssd_read + 2 * plan.spec.num_params


@pytest.mark.unit
def test_what_lies_elsewhere_costs_nothing_here() -> None:
    assert step_traffic(deep_plan({"*": "gpu"})) == Traffic()
    frozen = per_parameter(deep_plan({"*": "ssd"}, frozen=True))
    assert frozen == pytest.approx((4, 0, 4, 0), rel=0.005)
    spilled = per_parameter(deep_plan({"*": "ssd"}))
    assert spilled == pytest.approx((16, 14, 4, 2), rel=0.005)  # the gradient waits on SSD: 2 more each way
    assert per_parameter(deep_plan({"*": "ssd"}, optimizer="eager"))[:2] == pytest.approx((14, 12), rel=0.005)
    fp32 = per_parameter(deep_plan(STATES_ON_SSD, fp32=True))
    assert fp32 == pytest.approx((16, 12, 8, 4), rel=0.005)  # hi and lo are the compute copy: 4+4, m and v 8


@pytest.mark.unit
def test_checkpoints_cross_once_each_way_per_micro_batch() -> None:
    plain, moved = (step_traffic(deep_plan({"*": "dram"}, num_blocks=9, checkpoints=tier)) for tier in ("gpu", "ssd"))
    assert moved.ssd_read == moved.ssd_written == 8 * 2 * 4096  # 8 blocks, 2 micro-batches, one page each
    assert moved.h2d - plain.h2d == moved.d2h - plain.d2h == 8 * 6 * 1024  # rows that exist, not slots


# --- the engine -----------------------------------------------------------------------------------------------------


class Copies:
    """Counts the bytes that cross between device and DRAM, at the four places where they do."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.h2d = self.d2h = 0
        self._count(patch, WeightSource, "fill", "h2d", lambda self, result, *_: result.nbytes)
        self._count(patch, Activations, "fill", "h2d", lambda self, result, gather, handle, slot:
                    sum(end - begin for begin, end in handle.left.ranges))
        self._count(patch, Gradients, "move", "d2h", lambda self, result, unit, grad, norm:
                    0 if result is None else grad.nbytes + norm.nbytes)
        self._count(patch, Activations, "_copy_out", "d2h", lambda self, result, leaving, name, tensors: sum(t.nbytes for t in tensors))

    def _count(self, patch: pytest.MonkeyPatch, owner: type, name: str, lane: str, size: Callable[..., int]) -> None:
        original = getattr(owner, name)

        def counted(this, *args):
            result = original(this, *args)
            setattr(self, lane, getattr(self, lane) + size(this, result, *args))
            return result

        patch.setattr(owner, name, counted)


def model(family: str) -> torch.nn.Module:
    if family != "llama, partly frozen":
        return build(family)
    made = build("llama")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("embed" not in name and "mlp" not in name and "layers.2" not in name)
    return made


@dataclass(frozen=True)
class Counted:
    """Over ``STEPS`` steps and the updates they asked for: by the engine, and the reads that the
    cache spared it."""

    plan: Plan
    read: int
    written: int
    saved: int


def count(family: str, ssd_dir: Path, *, flush_each: bool, **options) -> Counted:
    base = dict(lr=1e-3, device="cpu", dtype="bf16", micro_batch=3, ssd=[ssd_dir / "a", ssd_dir / "b"])
    with Session(model(family), loss_fn=loss_fn_of(family.partition(",")[0]), **{**base, **options}) as session:
        data = batches(family.partition(",")[0], STEPS)
        ready_for(session._core, data[0])
        machinery = session._machinery
        before = machinery.engine.stats() if machinery.engine else dict(bytes_read=0, bytes_written=0)
        usages = []
        for batch in data:
            usages.append(session.step(batch).usage)
            if flush_each:
                session.flush()
        session.flush()
        usages.append(session._core.meter.read())  # of the last updates
        after = machinery.engine.stats() if machinery.engine else before
        read, written = (after[key] - before[key] for key in ("bytes_read", "bytes_written"))
        assert sum(u.ssd_read_bytes for u in usages) == read and sum(u.ssd_written_bytes for u in usages) == written
        return Counted(session.plan, read, written, machinery.cache.shared_bytes)


def expected(plan: Plan, *, flush_each: bool) -> tuple[Traffic, int]:
    """What ``STEPS`` steps move, and the reads spared by plan: updated copies that the next forward
    pass took over."""
    first, steady = step_traffic(plan, after_flush=True), step_traffic(plan)
    later = first if flush_each else steady
    total = sum([later] * (STEPS - 1), start=first)
    kept = first.ssd_read - steady.ssd_read
    return total, 0 if flush_each else kept * (STEPS - 1)


SPECULATIVE = dict(optimizer="speculative", max_grad_norm=1e9)
"""The first step of a run does not guess; here it must, or its updates of units that are early
later would read more."""

CASES = {
    "ssd": dict(tier="ssd"),
    "ssd, one of each buffer": dict(tier="ssd", buffers=ONE_EACH),
    "ssd, eager": dict(tier="ssd", max_grad_norm=0, buffers=ONE_EACH),
    "ssd, eager, many buffers": dict(tier="ssd", max_grad_norm=0),
    "states on ssd, gradients in dram": dict(placement=STATES_ON_SSD),
    "hi in dram": dict(placement=HI_IN_DRAM),
    "hi in dram, eager": dict(placement=HI_IN_DRAM, max_grad_norm=0),
    "states on ssd, speculative": dict(placement=STATES_ON_SSD, **SPECULATIVE),
    "states on ssd, speculative, one of each": dict(placement=STATES_ON_SSD, buffers=ONE_EACH, **SPECULATIVE),
    "mixed, speculative": dict(placement=MIXED, **SPECULATIVE),
    "mixed": dict(placement=MIXED),
    "mixed, eager": dict(placement=MIXED, max_grad_norm=0, buffers=ONE_EACH, checkpoint_tier="dram"),
    "dram": dict(tier="dram"),
    "gpu, checkpoints on ssd": dict(tier="gpu", checkpoint_tier="ssd"),
    "ssd, checkpoints on ssd": dict(tier="ssd", checkpoint_tier="ssd", micro_batch=1),
    "inner activations in dram": dict(tier="ssd", activations="dram"),
    "inner activations on ssd": dict(tier="dram", activations="ssd", buffers=ONE_EACH),
    "inner activations anywhere": dict(tier="gpu", checkpoint_tier="ssd", micro_batch=1, activations={
        "*": {"mlp.*": "ssd", "sdpa": "gpu", "self_attn.?_proj": "dram"}, "block.2": "recompute", "block.3": "ssd"}),
    "bf16 moments": dict(tier="ssd", states="bf16"),
    "8-bit moments": dict(tier="ssd", states="8bit"),
    "8-bit moments, speculative": dict(placement=STATES_ON_SSD, states="8bit", **SPECULATIVE),
    "fp32": dict(tier="ssd", dtype="fp32"),
    "fp32, mixed": dict(placement=MIXED, dtype="fp32", checkpoint_tier="ssd"),
}


@pytest.mark.numerics
@pytest.mark.parametrize("flush_each", [True, False], ids=["flushed", "running"])
@pytest.mark.parametrize("case", CASES)
def test_the_engine_moves_what_the_formula_says(case: str, flush_each: bool, ssd_dir: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly. A unit asked for again while its DRAM copy is still in use is not read twice: such
    reads are counted where they are spared, and the two counts make up the formula's."""
    copies = Copies(monkeypatch)
    monkeypatch.setattr(ratel.runtime.session.training_step, "expects_no_scaling", lambda before: True)
    counted = count("llama", ssd_dir, flush_each=flush_each, **CASES[case])
    total, spared = expected(counted.plan, flush_each=flush_each)
    lucky = counted.saved - spared
    assert lucky >= 0, "an updated copy was read again"
    assert counted.written == total.ssd_written
    assert counted.read + lucky == total.ssd_read
    assert (copies.h2d, copies.d2h) == (total.h2d, total.d2h)
    if flush_each and not counted.plan.deferred and CASES[case].get("buffers") is ONE_EACH:
        assert lucky == 0  # with one slot and nothing in flight between steps nothing can be found in it


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama-tied", "patches", "llama, partly frozen"])
@pytest.mark.parametrize("options", [dict(tier="ssd"), dict(placement=MIXED, max_grad_norm=0)], ids=["ssd", "mixed"])
def test_shared_frozen_and_other_models_too(family: str, options: dict, ssd_dir: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies(monkeypatch)
    counted = count(family, ssd_dir, flush_each=False, **options)
    total, spared = expected(counted.plan, flush_each=False)
    assert (counted.written, counted.read + counted.saved - spared) == (total.ssd_written, total.ssd_read)
    assert (copies.h2d, copies.d2h) == (total.h2d, total.d2h)


@pytest.mark.numerics
@pytest.mark.parametrize("seed", range(3))
def test_timing_moves_reads_to_the_spared_ones_and_nothing_else(seed: int, ssd_dir: Path) -> None:
    with jitter.injected(0.01, seed=seed):
        counted = count("llama", ssd_dir, flush_each=False, tier="ssd", checkpoint_tier="ssd")
    total, spared = expected(counted.plan, flush_each=False)
    assert counted.saved >= spared
    assert (counted.written, counted.read + counted.saved - spared) == (total.ssd_written, total.ssd_read)


# --- the kernel -----------------------------------------------------------------------------------------------------


def kernel_counters() -> tuple[int, int]:
    """Bytes that this process made the storage layer read and write."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def require_counted_directory(directory: Path) -> None:
    """Skip where the kernel does not count direct I/O: memory file systems, and some containers'
    overlays."""
    if not supports_direct(directory):
        pytest.skip("the file system of the test directory has no O_DIRECT; set RATEL_TEST_SSD to one that has")
    if not os.access("/proc/self/io", os.R_OK):
        pytest.skip("/proc/self/io cannot be read here")
    before = kernel_counters()
    with nvme_ds.Engine() as engine:
        memory = nvme_ds.AlignedBuffer(1 << 20)
        volume = engine.create_volume([str(directory)], "probe", 1 << 20)
        engine.wait(engine.submit_write(volume, 0, memory.address, 1 << 20, 0))
        engine.wait(engine.submit_read(volume, 0, memory.address, 1 << 20, 0))
        volume.close(unlink=True)
    if any(after - first < 1 << 20 for after, first in zip(kernel_counters(), before)):
        pytest.skip("the kernel's I/O counters do not move for direct I/O on this file system")


@pytest.mark.e2e
@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_the_kernel_counts_what_the_engine_counts(backend: str, ssd_dir: Path) -> None:
    """Half a percent and 1 MiB are left for what else the process touches on disk: journal and
    modules loaded late.

    The first step is not compared: blocks that were never written are zeros without a read.
    """
    require_counted_directory(ssd_dir)
    wide = llama(hidden_size=256, intermediate_size=704, num_hidden_layers=6)
    with Session(wide, device="cpu", ssd=ssd_dir, tier="ssd", io_backend=backend, direct="on") as session:
        data = batches("llama", 4)
        session.step(data[0])
        session.flush()
        engine = session._machinery.engine.stats()
        kernel = kernel_counters()
        for batch in data[1:]:
            session.step(batch)
        session.flush()
        engine_moved = [session._machinery.engine.stats()[key] - engine[key] for key in ("bytes_read", "bytes_written")]
        kernel_moved = [after - before for after, before in zip(kernel_counters(), kernel)]
        plan = session.plan
    total = step_traffic(plan, after_flush=True) + step_traffic(plan) + step_traffic(plan)
    assert engine_moved[1] == total.ssd_written
    assert engine_moved[0] <= total.ssd_read
    assert kernel_moved == [pytest.approx(num_bytes, rel=0.005, abs=1 << 20) for num_bytes in engine_moved]
