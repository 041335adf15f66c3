"""The closed form of a step's time beside the simulator of the same schedule, and what must hold for any plan."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from ratel.planner.forecast.cost import predict
from ratel.planner.forecast.simulate import simulate
from ratel.planner.machine.hardware import Ssd, load_hardware
from ratel.planner.placement import forced_placements
from ratel.planner.shape import ParamSpec, lay_out
from ratel.planner.traffic import pass_traffic, step_traffic
from ratel.planner.work import Buffers
from ratel.trace.timeline import Span
from tests.support.costs import DEEP, FAST, PARAMS
from tests.support.patience import counted_calls
from tests.support.plans import faster, gpt_spec, make_plan, random_hardware, random_plan, tied_spec

pytestmark = pytest.mark.unit

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


# --- the closed form and the simulator ------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [True, False], ids=["blocks all alike", "blocks that differ"])
@pytest.mark.parametrize("seed", range(30))
def test_the_simulator_confirms_random_plans_within_5_percent(seed: int, uniform: bool) -> None:
    plan, hardware = random_plan(seed, uniform=uniform), random_hardware(seed)
    assert predict(plan, hardware).step_s == pytest.approx(simulate(plan, hardware).step_s, rel=0.05)


@pytest.mark.parametrize("optimizer", ["eager", "deferred"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("placement", ["ssd", "dram", "gpu", {"*": "ssd", "shared": "gpu"}], ids=str)
def test_the_simulator_confirms_tied_and_frozen_models(placement: dict | str, frozen: bool, optimizer: str) -> None:
    plan = make_plan(tied_spec(12, 3072, frozen=frozen), placement, rows=6, micro_rows=4, optimizer=optimizer,
                     checkpoints="ssd")
    run = simulate(plan, random_hardware(3))
    assert predict(plan, random_hardware(3)).step_s == pytest.approx(run.step_s, rel=0.05)
    assert run.moved["h2d"] == 5 * step_traffic(plan).h2d


def test_updates_from_dram_wait_for_those_from_ssd_before_them() -> None:
    """One updater takes chunks in order: while the last blocks' states pass the SSDs, those of the
    others wait."""
    first = {f"block.{i}": "dram" for i in range(50)}
    slow = replace(FAST, ssds=(Ssd(read_bps=1e9, write_bps=1e9, mixed_bps=1e9),), adam_params_per_s=1e9)
    plan = make_plan(DEEP, {"*": {"hi": "dram", "lo": "dram", "m": "ssd", "v": "dram", "g": "dram"}, **first, "pre": "dram"},
                     optimizer="eager", checkpoints="gpu")
    on_ssd = sum(u.num_trainable for u in DEEP.units if plan.placement(u).tier("m") == "ssd")
    assert predict(plan, slow).step_s == pytest.approx((8 * on_ssd + (PARAMS - on_ssd)) / 1e9, rel=0.03)


def test_what_has_the_link_for_itself_is_not_slowed_by_the_other_direction() -> None:
    """One unit in DRAM: its weights come down before its gradient goes up."""
    plan = make_plan(DEEP, {"*": "gpu", "post": "dram"}, checkpoints="gpu", optimizer="deferred")
    shared = replace(FAST, h2d_bps=2e9, d2h_bps=2e9, duplex_bps=1e9)
    assert predict(plan, shared) == predict(plan, replace(shared, duplex_bps=2e9))


@pytest.mark.parametrize("seed", range(12))
def test_a_prediction_moves_the_bytes_that_traffic_counts(seed: int) -> None:
    plan, hardware = random_plan(seed, uniform=False), random_hardware(seed)
    found, moved, passes = predict(plan, hardware), step_traffic(plan), pass_traffic(plan)
    assert (found.ssd_read, found.ssd_written) == (moved.ssd_read, moved.ssd_written)
    assert passes.forward + passes.backward + passes.updates == moved
    run = simulate(plan, hardware, steps=3)
    assert run.moved["h2d"] == 3 * moved.h2d
    assert run.moved["d2h"] <= 3 * moved.d2h  # the last gradients may be on their way when the run ends
    assert run.moved["ssd write"] <= 3 * moved.ssd_written * (1 + 1e-9)


WHAT = ("gpu_flops", "gpu_half_tokens", "gpu_bps", "link", "h2d_bps", "d2h_bps", "duplex_bps", "dram_bps",
        "adam_params_per_s", "ssd", "read_bps", "write_bps", "mixed_bps")


@pytest.mark.parametrize("seed", range(20))
def test_more_of_a_resource_never_predicts_a_slower_step(seed: int) -> None:
    plan, hardware = random_plan(seed, uniform=seed % 2 == 0), random_hardware(seed)
    before, factor = predict(plan, hardware).step_s, random.Random(seed).uniform(1.05, 3)
    for what in WHAT:
        assert predict(plan, faster(hardware, what, factor)).step_s <= before * (1 + 1e-9), what


@pytest.mark.parametrize("seed", range(3))
def test_more_of_a_resource_never_simulates_a_slower_step(seed: int) -> None:
    """Within 1%: requests that come earlier are served in another order, as on a real machine."""
    plan, hardware = random_plan(seed, uniform=True), random_hardware(seed)
    before = simulate(plan, hardware).step_s
    for what in ("gpu_flops", "link", "dram_bps", "adam_params_per_s", "ssd"):
        assert simulate(plan, faster(hardware, what, 2.0)).step_s <= before * 1.01, what


@pytest.mark.parametrize("seed", range(10))
def test_no_step_is_shorter_than_its_bound(seed: int) -> None:
    found = predict(random_plan(seed, uniform=False), random_hardware(seed))
    assert found.exposed_s >= 0 and found.bound_s == found.busy_s[found.bound_by]
    assert found.step_s == pytest.approx(found.forward_s + found.backward_s)


def test_steps_measured_on_the_h200_box_are_predicted() -> None:
    """llama-3b with 24 GiB of GPU memory: what fits on the GPU in forward order, the rest in DRAM,
    deferred updates.

    At batch 8 the step is half optimizer, most of it exposed.
    """
    results = json.loads((RESULTS / "h200_step_24gib.json").read_text(encoding="utf-8"))
    shapes = [(3072, 3072), (3072, 2 * 1024), (3072, 3072), (3072, 8192), (3072, 8192), (8192, 3072)]
    spec = replace(gpt_spec(28, 3072), units=tuple(
        lay_out(u.index, u.name, u.kind, [ParamSpec(name=str(j), shape=s) for j, s in enumerate(shapes)])
        if u.kind == "block" else u for u in gpt_spec(28, 3072).units))
    assert spec.num_params == pytest.approx(results[0]["parameters"], rel=1e-3)
    for measured in results:
        work = measured["plan"]["work"]
        on_gpu = {unit.name: "gpu" for unit in spec.units[: measured["units_on_gpu"]]}
        plan = make_plan(spec, {"*": "dram", **on_gpu}, rows=work["rows"], micro_rows=work["micro_rows"],
                         optimizer=measured["plan"]["optimizer"], checkpoints=measured["plan"]["checkpoints"][0])
        assert predict(plan, load_hardware("h200-box")).step_s == pytest.approx(measured["step_s"], rel=0.08)


def test_a_model_of_400_b_is_predicted_with_few_calls() -> None:
    plan = make_plan(gpt_spec(128, 16384, 50257), "ssd", rows=32, micro_rows=8, optimizer="deferred")
    assert plan.spec.num_params > 400e9
    hardware = load_hardware("4090")
    _, calls = counted_calls(lambda: predict(plan, hardware))
    assert calls < 220_000  # half of them


def test_the_simulated_timeline_keeps_every_lane_in_order() -> None:
    run = simulate(make_plan(gpt_spec(8, 2048), "ssd", checkpoints="ssd", rows=4, micro_rows=2), load_hardware("4090"))
    lanes: dict[str, list[Span]] = {}
    for span in run.spans:
        lanes.setdefault(span.lane, []).append(span)
    assert set(lanes) == {"compute", "h2d", "d2h", "cpu optimizer", "ssd read", "ssd write"}
    for spans in lanes.values():
        for before, after in zip(spans, spans[1:]):
            assert before.begin_s <= before.end_s <= after.begin_s + 1e-9


def test_one_buffer_of_each_kind_does_not_hang_the_simulator() -> None:
    one = Buffers(weight_slots=1, grad_slots=1, host_weight_slots=1, host_grad_slots=1, ring_slots=1,
                  checkpoint_slots=1)
    for optimizer in ("eager", "deferred"):
        plan = make_plan(gpt_spec(8, 2048), "ssd", checkpoints="ssd", optimizer=optimizer, buffers=one, rows=6,
                         micro_rows=2)
        slow = simulate(plan, load_hardware("h200-box")).step_s
        assert slow >= simulate(replace(plan, buffers=Buffers()), load_hardware("h200-box")).step_s * 0.99


def test_predictions_are_deterministic() -> None:
    plan, hardware = random_plan(5, uniform=False), random_hardware(5)
    assert predict(plan, hardware) == predict(plan, hardware) and simulate(plan, hardware) == simulate(plan, hardware)


# --- pipes, machines, traces ----------------------------------------------------------------------------------------


def test_placements_of_the_random_plans_differ() -> None:
    """The property tests mean nothing if they all see the same plan."""
    seen = {random_plan(seed, uniform=False).placements[1] for seed in range(24)}
    assert len(seen) > 10 and forced_placements(DEEP, "gpu")[1] in seen
