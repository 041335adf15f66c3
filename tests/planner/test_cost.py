"""The predicted step: by hand for one resource at a time, and from what was measured."""

import json
from dataclasses import replace

import pytest

from ratel.errors import RatelError
from ratel.planner.block_profile import BlockProfile, Inner
from ratel.planner.forecast.compute import GpuSeconds
from ratel.planner.forecast.cost import RESOURCES, predict
from ratel.planner.forecast.simulate import simulate
from ratel.planner.machine.hardware import Hardware, Ssd, load_hardware, machine_names, with_ssds
from ratel.planner.machine.pipes import Pipe, SsdRates, ssd_rates
from ratel.planner.traffic import activation_traffic, step_traffic
from ratel.trace.timeline import Span, write_trace
from tests.support.costs import DEEP, FAST, PARAMS
from tests.support.plans import HI_IN_DRAM, STATES_ON_SSD, gpt_spec, make_plan

pytestmark = pytest.mark.unit


# --- one resource at a time, by hand --------------------------------------------------------------------------------


def test_pcie_down_carries_the_weights_twice() -> None:
    found = predict(make_plan(DEEP, "dram", checkpoints="gpu"), replace(FAST, h2d_bps=1e9, duplex_bps=1e9))
    held = 3 * DEEP.units[1].num_elements + DEEP.units[-1].num_elements  # over the turn
    assert found.bound_by == "h2d"
    assert found.busy_s["h2d"] == pytest.approx((4 * PARAMS - 2 * held) / 1e9)
    assert found.step_s == pytest.approx(found.bound_s, rel=0.02)


def test_pcie_up_carries_the_gradients_once() -> None:
    found = predict(make_plan(DEEP, "dram", checkpoints="gpu"), replace(FAST, d2h_bps=1e9, duplex_bps=1e9))
    assert (found.bound_by, found.backward["d2h"]) == ("d2h", pytest.approx(2 * PARAMS / 1e9, rel=1e-6))


@pytest.mark.parametrize("optimizer", ["eager", "deferred"])
def test_ssd_carries_26_bytes_per_parameter(optimizer: str) -> None:
    slow = replace(FAST, ssds=(Ssd(read_bps=1e9, write_bps=1e9, mixed_bps=1e9),))
    found = predict(make_plan(DEEP, STATES_ON_SSD, optimizer=optimizer, checkpoints="gpu"), slow)
    assert found.bound_by == "ssd" and found.step_s == pytest.approx(26 * PARAMS / 1e9, rel=0.06)
    updating, other = (found.backward, found.forward) if optimizer == "eager" else (found.forward, found.backward)
    assert updating["ssd"] > 5 * other["ssd"]


def test_two_devices_are_twice_as_fast_up_to_the_limit_of_their_sum() -> None:
    one = Ssd(read_bps=2e9, write_bps=1e9, mixed_bps=1.5e9)
    assert ssd_rates(replace(FAST, ssds=(one, one))) == SsdRates(read_bps=4e9, write_bps=2e9, mixed_bps=3e9)
    assert ssd_rates(replace(FAST, ssds=(one,) * 4, ssd_limit_bps=5e9)) == SsdRates(read_bps=5e9, write_bps=4e9,
                                                                                  mixed_bps=5e9)
    uneven = replace(FAST, ssds=(one, Ssd(read_bps=9e9, write_bps=9e9, mixed_bps=9e9)))
    assert uneven.stripe_weights == (1, 6) and ssd_rates(uneven).read_bps == 10.5e9  # 7/6 of the faster one, which is the slower
    assert ssd_rates(replace(uneven, stripes=(1, 1))).read_bps == 4e9  # equal stripes wait for the slower device


def test_the_cpu_optimizer_runs_under_backward_or_under_the_next_forward() -> None:
    slow = replace(FAST, adam_params_per_s=1e9, gpu_flops=1e15)
    eager, deferred = (predict(make_plan(DEEP, "dram", optimizer=o), slow) for o in ("eager", "deferred"))
    update_s = PARAMS / 1e9
    assert eager.forward["cpu optimizer"] == 0 and eager.backward["cpu optimizer"] == pytest.approx(update_s)
    assert deferred.backward["cpu optimizer"] == 0 and deferred.forward["cpu optimizer"] == pytest.approx(update_s)
    assert deferred.step_s == pytest.approx(update_s + deferred.backward["compute"], rel=0.03)
    assert eager.step_s == pytest.approx(max(update_s, eager.backward["compute"]) + eager.forward["compute"], rel=0.1)


def test_dram_is_shared_by_the_optimizer_and_the_copies() -> None:
    slow = replace(FAST, dram_bps=1e11)
    found = predict(make_plan(DEEP, "dram", checkpoints="gpu"), slow)
    moved = step_traffic(make_plan(DEEP, "dram", checkpoints="gpu"))
    assert found.bound_by == "dram"
    assert found.busy_s["dram"] == pytest.approx((26 * PARAMS + moved.h2d + moved.d2h) / 1e11)


def test_early_updates_are_as_slow_as_writing_to_other_planes_is() -> None:
    plan = make_plan(DEEP, "dram", checkpoints="gpu", optimizer="speculative", early_units=20)
    slow = replace(FAST, adam_params_per_s=1e9, dram_bps=4e10, adam_elsewhere=0.8)
    found, once = predict(plan, slow), predict(plan, replace(slow, adam_elsewhere=1.0))
    early = sum(DEEP.units[unit].num_trainable for unit in plan.early)
    assert found.backward["cpu optimizer"] == pytest.approx(early / 0.8e9)
    assert found.forward["cpu optimizer"] == pytest.approx((PARAMS - early) / 1e9)
    assert found.backward["dram"] - once.backward["dram"] == pytest.approx(26 * early / 4 / 4e10)
    simulated = [simulate(plan, hardware).step_s for hardware in (slow, replace(slow, adam_elsewhere=1.0))]
    assert simulated[0] > 1.03 * simulated[1] and found.step_s == pytest.approx(simulated[0], rel=0.05)
    assert predict(plan.while_clipped, slow) == predict(plan.while_clipped, replace(slow, adam_elsewhere=1.0))


def test_compute_counts_recomputation_and_an_unsaturated_gpu() -> None:
    plan = make_plan(gpt_spec(20, 2048), "dram", rows=4, micro_rows=2)
    hardware = replace(FAST, gpu_flops=1e14, gpu_half_tokens=2048.0)
    block = 2 * 12 * 2048**2 + 2 * 1024 * 2048
    there, back = GpuSeconds(plan, hardware).block(0, 2)
    assert there == pytest.approx(block * 2048 / 1e14 * 2)  # half of the rate at 2048 tokens
    assert back == pytest.approx(3 * there)
    assert predict(plan, hardware).forward["compute"] == pytest.approx(2 * 20 * there)


def test_the_gpu_tier_updates_in_gpu_memory_alone() -> None:
    plan = make_plan(DEEP, "gpu", checkpoints="gpu")
    found = predict(plan, replace(FAST, gpu_bps=1e12))
    assert found.busy_s["compute"] >= 26 * PARAMS / 1e12
    assert all(found.busy_s[name] == 0 for name in RESOURCES if name != "compute")


def test_a_step_that_clips_updates_nothing_early() -> None:
    early = make_plan(DEEP, "dram", optimizer="speculative", early_units=4)
    hardware = replace(FAST, adam_params_per_s=1e8)
    assert early.early
    assert predict(early.while_clipped, hardware) == predict(replace(early, optimizer="deferred", early_units=0), hardware)
    assert predict(early.while_clipped, hardware).step_s > predict(early, hardware).step_s
    eager = make_plan(DEEP, "dram", optimizer="eager")
    assert predict(eager.while_clipped, hardware) == predict(eager, hardware)


# --- what is kept, what was measured --------------------------------------------------------------------------------

INNER = (Inner(name="qkv", row_bytes=6 << 20, row_flops=3e9), Inner(name="up", row_bytes=8 << 20, row_flops=5e9))
KIND = BlockProfile(forward_flops=1e10, recompute_flops=9e9, inner=INNER)


def profiled(kept: tuple = (), **more) -> "object":
    return make_plan(gpt_spec(10, 2048), profiles=(replace(KIND, **more),) * 10, kept=(kept,) * 10)


def test_what_is_kept_spares_its_flops_and_moves_its_bytes() -> None:
    hardware = replace(FAST, gpu_flops=1e13)
    none, kept = profiled(), profiled((("up", "dram"),))
    assert GpuSeconds(none, hardware).block(0, 8)[1] == pytest.approx(8 * (2e10 + 9e9) / 1e13)
    assert GpuSeconds(kept, hardware).block(0, 8)[1] == pytest.approx(8 * (2e10 + 4e9) / 1e13)
    assert step_traffic(kept).d2h - step_traffic(none).d2h == 10 * 8 * (8 << 20)
    assert step_traffic(kept).h2d - step_traffic(none).h2d == 10 * 8 * (8 << 20)
    assert activation_traffic(profiled((("up", "gpu"),)), 3, 8) == activation_traffic(none, 3, 8)
    assert simulate(kept, hardware).moved["h2d"] == 5 * step_traffic(kept).h2d


def test_measured_blocks_are_interpolated_and_scaled() -> None:
    hardware = replace(FAST, gpu_half_tokens=1024.0)
    seconds = GpuSeconds(profiled(seconds=((2, 1.0, 3.0), (4, 2.0, 5.0))), hardware)
    assert seconds.block(0, 3) == pytest.approx((1.5, 4.0))
    assert seconds.block(0, 4) == pytest.approx((2.0, 5.0))
    assert seconds.block(0, 9) == pytest.approx((4.0, 10.0))  # 9 + 1 rows' time against 4 + 1
    assert seconds.block(0, 1) == pytest.approx((2 / 3, 2.0))
    spared = GpuSeconds(profiled((("qkv", "dram"),), seconds=((4, 2.0, 5.0),)), hardware)
    assert spared.block(0, 4) == pytest.approx((2.0, 5.0 - 0.3 * 2.0))


def test_a_micro_batch_takes_as_long_as_its_kernels_take_to_launch() -> None:
    measured = dict(seconds=((4, 2.0, 5.0),), launch_s=((1.0, 4.0), (3.0, 4.3)))
    assert GpuSeconds(profiled(**measured), FAST).block(0, 4) == (2.0, 5.0)
    assert GpuSeconds(profiled(**measured), replace(FAST, gpu_half_tokens=0.0)).block(0, 1) == (1.0, 4.0)
    kept = GpuSeconds(profiled((("qkv", "dram"),), **measured), FAST)
    assert kept.block(0, 4) == pytest.approx((3.0, 5.0 - 0.3 * 2.0))
    assert GpuSeconds(profiled((("qkv", "dram"), ("up", "dram")), **measured), FAST).block(0, 4) == (3.0, 4.3)


def test_sums_of_several_passes_are_read_and_written() -> None:
    plan = make_plan(gpt_spec(10, 2048), "dram", rows=8, micro_rows=2)
    hardware = replace(FAST, gpu_bps=1e12)
    summed = replace(plan, accumulators=("block", "ends", "shared"))
    blocks = sum(u.num_trainable for u in plan.spec.units if u.kind == "block")
    more = predict(summed, hardware).busy_s["compute"] - predict(plan, hardware).busy_s["compute"]
    assert more == pytest.approx(4 * 6 * blocks / 1e12)  # in each of four passes


def test_a_measured_loss_takes_the_place_of_its_flops() -> None:
    plan = make_plan(gpt_spec(4, 2048), "dram", rows=7, micro_rows=4)
    hardware = replace(FAST, gpu_flops=1e13, gpu_half_tokens=1024.0)
    last, gpu = plan.spec.stages[-1], GpuSeconds(replace(plan, loss_s=0.5), hardware)
    assert GpuSeconds(plan, hardware).ends(last, 4)[1] not in (0, 0.5)
    assert gpu.ends(last, 4) == (0.0, 0.5) and gpu.ends(last, 3) == (0.0, pytest.approx(0.5 * 4 / 5))
    without = predict(plan, hardware).busy_s["compute"] - sum(GpuSeconds(plan, hardware).ends(last, rows)[1] for rows in (4, 3))
    assert predict(replace(plan, loss_s=0.5), hardware).busy_s["compute"] == pytest.approx(without + 0.9)


def test_what_keeping_was_measured_to_save_counts_more_than_its_flops() -> None:
    measured = dict(seconds=((4, 2.0, 5.0),), keeping_seconds=((4, 2.2, 4.2),))
    some, everything = profiled((("qkv", "dram"),), **measured), profiled((("qkv", "dram"), ("up", "gpu")), **measured)
    assert GpuSeconds(profiled(**measured), FAST).block(0, 4) == (2.0, 5.0)
    assert GpuSeconds(some, FAST).block(0, 4) == pytest.approx((2.2, 5.0 - 3 / 8 * 0.8))
    assert GpuSeconds(everything, FAST).block(0, 4) == pytest.approx((2.2, 4.2))


# --- pipes, machines, traces ----------------------------------------------------------------------------------------


def test_a_pipe_is_shared_until_one_direction_is_done() -> None:
    pipe = Pipe(in_bps=10.0, out_bps=8.0, in_beside_bps=6.0, out_beside_bps=4.0)
    assert pipe.seconds(60.0, 0.0) == (6.0, 0.0)
    assert pipe.seconds(60.0, 30.0) == pytest.approx((30 / 6 + 30 / 10, 30 / 4))
    rates = SsdRates(read_bps=10.0, write_bps=5.0, mixed_bps=8.0)
    assert rates.seconds(100.0, 0.0) == 10.0
    assert rates.seconds(40.0, 40.0) == 10.0
    assert rates.seconds(80.0, 40.0) == pytest.approx(10.0 + 4.0)


@pytest.mark.parametrize("name", machine_names())
def test_every_machine_names_its_source_and_survives_json(name: str) -> None:
    hardware = load_hardware(name, ssds=3)
    assert hardware.source.split(":")[0] in ("measured", "data sheet", "paper") and len(hardware.ssds) == 3
    assert Hardware.from_json(json.loads(json.dumps(hardware.to_json()))) == hardware


def test_a_machine_that_is_wrong_is_refused(tmp_path) -> None:
    content = load_hardware("4090").to_json()
    with pytest.raises(RatelError, match="hardware.gpu_flop.*gpu_flops"):
        Hardware.from_json({**content, "gpu_flop": 1})
    with pytest.raises(RatelError, match="hardware.ssds.speed"):
        Hardware.from_json({**content, "ssds": [{"speed": 1}]})
    with pytest.raises(RatelError, match="hardware.cores"):
        Hardware.from_json({k: v for k, v in content.items() if k != "cores"})
    with pytest.raises(RatelError, match="h2d_bps.*0"):
        Hardware.from_json({**content, "h2d_bps": 0})
    with pytest.raises(RatelError, match="Known are .*4090"):
        load_hardware("4091")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RatelError, match="not JSON"):
        load_hardware(str(tmp_path / "bad.json"))
    (tmp_path / "own.json").write_text(json.dumps(content))
    assert load_hardware(str(tmp_path / "own.json")) == load_hardware("4090")
    with pytest.raises(RatelError, match="ssds"):
        with_ssds(replace(FAST, ssds=()), 2)


def test_a_plan_with_ssds_needs_a_machine_with_ssds() -> None:
    bare = with_ssds(FAST, 0)
    assert predict(make_plan(gpt_spec(8, 2048), "dram"), bare).step_s > 0
    with pytest.raises(RatelError, match="hardware.ssds"):
        predict(make_plan(gpt_spec(8, 2048), HI_IN_DRAM), bare)


def test_a_trace_has_one_row_per_lane(tmp_path) -> None:
    spans = [Span(lane="h2d", name="block.0", begin_s=0.0, end_s=0.5),
             Span(lane="compute", name="x", begin_s=0.5, end_s=0.75)]
    write_trace(tmp_path / "trace.json", spans)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    drawn = [(rows[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert drawn == [("h2d", "block.0", 0.0, 5e5), ("compute", "x", 5e5, 2.5e5)]
