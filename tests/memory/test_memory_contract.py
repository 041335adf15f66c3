"""Budgets are promises: under a kernel limit, at any depth, for every budget, and with what the
machine has left."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.machine_memory import Cgroup, Machine, remove_group
from ratel.errors import RatelError
from ratel.hardware.host import available_memory
from ratel.planner.formats import EXACT
from ratel.planner.plan import Plan
from ratel.planner.search.choose import choose, minimum_state_bytes
from ratel.planner.search.options import SessionOptions
from ratel.planner.search.request import Request
from ratel.planner.shape import ModelSpec, ParamSpec, StageSpec, lay_out
from ratel.planner.work import Work
from ratel.runtime.blocks.batch import Batch
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.planning.prepare import Situation, make_plan
from ratel.runtime.session.session import Session
from ratel.units import GIB, MIB
from tests.support.limits import taken_away
from tests.support.patience import patience
from tests.support.tools import ROOT, command, environment, run_tool
from tests.tools.memory_run import BUFFERS, POSITIONS, ROWS, config

TIMES_SMALLER = 3
LAYER_STATE_BYTES = 85e6
SHALLOW, DEEPER = 3, 12


def measures(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = run_tool("memory_run", json.dumps(runs), limit_s=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def by_depth() -> dict[int, dict[str, Any]]:
    """Measures of two depths with all states on SSD, by number of layers."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("RATEL_TEST_SSD")) as ssd:
        depths = (SHALLOW, DEEPER)
        return dict(zip(depths, measures([dict(layers=n, steps=1, tier="ssd", ssd=ssd) for n in depths]), strict=True))


@pytest.fixture(scope="module")
def least_bytes(by_depth: dict[int, dict[str, Any]]) -> int:
    """DRAM that is enough for any depth. Most of it is Python and PyTorch, which differ between
    machines; what is added are the 60 MB of libraries that a forked child has not touched yet, and
    what the measured activations vary by."""
    return by_depth[DEEPER]["dram_bytes"] + int(120e6)


@pytest.fixture(scope="module")
def deep(least_bytes: int) -> int:
    """Layers whose states are ``TIMES_SMALLER`` times what is enough: 33 where that is 0.9 GB."""
    return int(TIMES_SMALLER * least_bytes / LAYER_STATE_BYTES) + 1


@pytest.fixture(scope="module")
def deep_state_bytes(deep: int) -> int:
    with Session(config(deep), device="cpu") as session:
        return minimum_state_bytes(session.parts.spec)


# --- a limit that the kernel holds ----------------------------------------------------------------------------------


def run_in(group: Cgroup, runs: list[dict[str, Any]]) -> subprocess.CompletedProcess:
    return subprocess.run(group.enter(command("memory_run", json.dumps(runs))), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=patience(110))


@pytest.fixture
def group() -> Iterator[Cgroup]:
    try:
        made = Cgroup.create()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here ({error.strerror}); it takes root and a writable cgroup")
    yield made
    remove_group(made.path)


@pytest.mark.e2e
def test_states_on_ssd_train_in_a_fraction_of_their_size(group: Cgroup, ssd_dir: Path, deep: int,
                                                        deep_state_bytes: int) -> None:
    """All of Python, PyTorch and the run together stay within a third of the states. Kernel memory
    counts there too."""
    limit = deep_state_bytes // TIMES_SMALLER
    group.limit(limit)
    done = run_in(group, [dict(layers=deep, steps=2, tier="ssd", dram=limit, ssd=str(ssd_dir), direct="on")])
    assert done.returncode == 0, f"died with {done.returncode} under a limit of {limit} bytes: {done.stderr}"
    (found,) = json.loads(done.stdout)
    assert "refused" not in found, found
    assert found["on_ssd_bytes"] == found["state_bytes"] == deep_state_bytes >= TIMES_SMALLER * limit
    assert found["losses"][1] < found["losses"][0]
    assert found["peak_bytes"] <= found["dram_bytes"] <= limit
    assert group.kills == 0


@pytest.mark.e2e
def test_the_same_limit_stops_what_does_not_keep_to_it(group: Cgroup, deep: int, deep_state_bytes: int) -> None:
    """Told the truth, a run is refused with what is missing; told of memory that is not there, it
    is killed."""
    limit = deep_state_bytes // TIMES_SMALLER
    with Session(config(deep), device="cpu", tier="dram", dram=limit, buffers=BUFFERS) as session:
        with pytest.raises(RatelError, match=r"dram: DRAM is short by \d\.\d+ GiB") as refusal:
            session.prepare(ROWS, POSITIONS)
    assert refusal.value.field == "dram" and "--ssd" in refusal.value.remedy
    group.limit(limit)
    done = run_in(group, [dict(layers=deep, steps=1, tier="dram", dram="1TiB")])
    assert done.returncode in (-9, 137) and group.kills > 0


@pytest.mark.e2e
def test_a_run_that_is_told_nothing_keeps_to_the_limit_it_finds(group: Cgroup, ssd_dir: Path, least_bytes: int) -> None:
    limit = least_bytes + int(240e6)
    group.limit(limit)
    done = run_in(group, [dict(layers=10, steps=1, ssd=str(ssd_dir), direct="on")])
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["on_ssd_bytes"] > 0 and found["on_dram_bytes"] > 0  # neither all of it nor none
    assert found["peak_bytes"] <= limit and group.kills == 0


# --- depth ----------------------------------------------------------------------------------------------------------


def chosen(num_blocks: int, *, tier: str = "ssd", **options: Any) -> Plan:
    """A plan with everything in one tier for blocks of one width."""
    kinds = ["pre", *["block"] * num_blocks, "post"]
    units = tuple(lay_out(i, f"{kind}.{i}", kind, [ParamSpec(name=f"{i}.w", shape=(1024, 4096)),
                                                   ParamSpec(name=f"{i}.b", shape=(1024,), decay=False)])
                  for i, kind in enumerate(kinds))
    stages = tuple(StageSpec(index=u.index, name=u.name, kind=u.kind, units=(u.index,)) for u in units)
    given = SessionOptions(tier=tier, checkpoint_tier="ssd")
    defaults = dict(formats=EXACT["bf16"], options=given, optimizer="deferred", gpu_budget=None, dram_budget=GIB, ssd_budget=1 << 40,
                    work=Work(rows=4, seq_len=128, micro_rows=2, hidden_bytes=MIB))
    return choose(Request(spec=ModelSpec(name="wide", units=units, stages=stages), **{**defaults, **options}))


@pytest.mark.unit
@pytest.mark.parametrize("options", [{}, dict(formats=EXACT["fp32"]), dict(optimizer="eager"), dict(on_host=True)], ids=str)
def test_planned_dram_does_not_depend_on_depth(options: dict[str, Any]) -> None:
    shallow, tall = chosen(8, **options), chosen(64, **options)
    assert tall.ssd_bytes > 6 * shallow.ssd_bytes
    assert tall.arena_bytes == shallow.arena_bytes
    assert tall.dram_bytes == shallow.dram_bytes


@pytest.mark.unit
def test_on_a_cpu_device_gpu_slots_and_activations_are_dram() -> None:
    options = dict(tier="dram", workspace_bytes=300 * MIB, dram_budget=GIB)
    apart, together = chosen(2, **options), chosen(2, on_host=True, **options)
    unspent = min(apart.import_bytes, 300 * MIB)  # import and activations take the same room, one after the other
    assert together.dram_bytes == apart.dram_bytes + apart.gpu_bytes - unspent
    with pytest.raises(RatelError, match="DRAM is short by .* the largest parts are device: workspace 300.00 MiB"):
        chosen(2, on_host=True, **{**options, "dram_budget": together.dram_bytes - 1})
    assert chosen(2, **{**options, "dram_budget": together.dram_bytes - 1})  # with a GPU it fits


@pytest.mark.e2e
def test_measured_dram_does_not_grow_with_depth(by_depth: dict[int, dict[str, Any]]) -> None:
    """Nine layers more are 764 MB of states. The bound is less than one layer's: their modules,
    their checkpoints of 49 KB each, and the heaps of the allocator, which differ by some 20 MB from
    run to run, must do with that."""
    shallow, deeper = by_depth[SHALLOW], by_depth[DEEPER]
    assert deeper["state_bytes"] - shallow["state_bytes"] > 8 * LAYER_STATE_BYTES
    assert deeper["arena_bytes"] == shallow["arena_bytes"]
    assert deeper["peak_bytes"] - shallow["peak_bytes"] < 60e6


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_every_budget_is_kept_and_used(ssd_dir: Path, least_bytes: int) -> None:
    """From just above the least that works to nearly everything in DRAM; the result is the same."""
    budgets = [least_bytes + int(more) for more in (0, 160e6, 320e6)]
    found = measures([dict(layers=6, steps=2, dram=budget, ssd=str(ssd_dir)) for budget in budgets])
    for budget, run in zip(budgets, found, strict=True):
        assert run["peak_bytes"] <= budget and run["dram_bytes"] <= budget
        assert run["dram_bytes"] > budget - 60e6, run["items"]  # what did not fit is a plane of 28 MB, with its slots
    on_ssd = [run["on_ssd_bytes"] for run in found]
    assert found[0]["state_bytes"] > on_ssd[0] > on_ssd[1] > on_ssd[2]
    assert len({tuple(run["losses"]) for run in found}) == 1


@pytest.mark.e2e
def test_activations_on_a_cpu_device_are_in_the_plan(ssd_dir: Path) -> None:
    """16384 tokens of narrow blocks at once: 0.2 GB more than all margins together hide (half as
    many: nothing to spare)."""
    (found,) = measures([dict(layers=2, steps=1, width=192, rows=32, positions=512, micro_batch=32, dtype="fp32",
                              tier="ssd", ssd=str(ssd_dir))])
    assert found["dram_bytes"] - found["workspace_bytes"] < found["peak_bytes"] <= found["dram_bytes"]


# --- memory taken away ----------------------------------------------------------------------------------------------

TAKEN_BYTES = 3 * GIB
WIDE, WIDE_PARAMETERS = 2304, 63.7e6
"""A width, and the parameters of a layer at that width: few units, quickly planned."""


@pytest.fixture
def take_memory() -> Iterator[Any]:
    """A function that reserves huge pages of ``TAKEN_BYTES`` in all; they are given back whatever
    happens."""
    available = Machine().available_bytes()
    if available < 4 * TAKEN_BYTES:
        pytest.skip(f"less than {4 * TAKEN_BYTES // GIB} GiB are free; others on the machine need what there is")
    with ExitStack() as stack:

        def take() -> int:
            """Returns the bytes that were really reserved."""
            try:
                return stack.enter_context(taken_away(TAKEN_BYTES)).taken_bytes
            except RatelError as refusal:
                pytest.skip(f"huge pages cannot be had here: {refusal}")

        yield take


@pytest.mark.e2e
def test_reserved_huge_pages_are_not_planned_with(take_memory: Any, ssd_dir: Path) -> None:
    """Without --dram a session plans with what is free. Others use the machine meanwhile: hence a
    GiB of tolerance."""
    layers = int(available_memory() / (14 * WIDE_PARAMETERS)) + 1  # with their gradients more than there is
    before = planned(layers, ssd_dir)
    reserved = take_memory()
    after = planned(layers, ssd_dir)
    assert before.dram_budget - after.dram_budget == pytest.approx(0.9 * reserved, abs=GIB)
    assert before.ssd_bytes < after.ssd_bytes
    assert before.arena_bytes - after.arena_bytes == pytest.approx(before.dram_budget - after.dram_budget, abs=GIB)


def planned(layers: int, ssd_dir: Path) -> Plan:
    """The plan of a session that is given no budget; nothing is reserved."""
    device = torch.device("cpu")
    with Session(config(layers, WIDE), device="cpu") as session:
        options = SessionOptions(optimizer="deferred", ssd=[ssd_dir], buffers=BUFFERS)
        batch = Batch.sample(session.parts, ROWS, POSITIONS)
        return make_plan(BlockRuns(session.parts), batch, options, Situation(device=device)).plan


# --- the GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["ssd", "dram", "auto"])
def test_gpu_memory_stays_under_its_cap_and_under_the_plan(tier: str, ssd_dir: Path) -> None:
    (found,) = measures([dict(layers=16, steps=3, tier=tier, device="cuda", gpu_memory="1GiB", ssd=str(ssd_dir))])
    assert found["gpu_reserved_bytes"] <= GIB
    assert found["gpu_allocated_bytes"] <= found["gpu_bytes"] <= GIB
    if tier == "auto":
        assert found["on_gpu_bytes"] > 0  # a cap is there to be used
