"""Idle time of the compute lane and its causes: on spans made by hand, and on steps that were
slowed down on purpose."""

import json
import time
from pathlib import Path

import pytest

from ratel import cli
from ratel.planner.forecast.cost import predict
from ratel.planner.formats import FORMATS
from ratel.planner.machine.hardware import load_hardware
from ratel.planner.report.utilization import StepReport, busy_seconds, describe, report_step
from ratel.planner.work import Buffers
from ratel.runtime.session.session import Session
from ratel.trace.bubbles import find_bubbles
from ratel.trace.timeline import Span, Timeline
from ratel.training.bench.step import details
from tests.support.families import batches, build
from tests.support.plans import gpt_spec, make_plan

GIB = 1 << 30


def timeline(*spans: Span, step_s: float = 10.0) -> Timeline:
    return Timeline(step=1, step_s=step_s, spans=spans)


def span(lane: str, begin_s: float, end_s: float, cause: str = "", launched_s: float | None = None, num_bytes: int = 0) -> Span:
    return Span(lane=lane, name="x", begin_s=begin_s, end_s=end_s, cause=cause, launched_s=launched_s, num_bytes=num_bytes)


def compute(*bounds: tuple[float, float]) -> list[Span]:
    return [span("compute", begin, end) for begin, end in bounds]


@pytest.mark.unit
def test_nothing_but_computation_has_no_bubbles() -> None:
    found = find_bubbles(timeline(*compute((-1, 4), (4, 12))))
    assert found.busy_s == 10 and found.idle_s == {} and found.exposed_optimizer_s == 0


@pytest.mark.unit
def test_idle_without_a_wait_is_launch() -> None:
    found = find_bubbles(timeline(*compute((1, 4), (6, 9))))
    assert found.busy_s == 6 and found.idle_s == {"launch": 4}


@pytest.mark.unit
def test_a_wait_for_weights_is_followed_to_what_held_them_up() -> None:
    """From 1 to 3 the uploader waits for the SSD, from 3 to 4 the reader for a slot, from 4 to 5
    the copy runs."""
    found = find_bubbles(timeline(*compute((0, 1), (6, 10)), span("main waits", 0.5, 5.5, "weights"),
                                  span("uploader waits", 0, 3, "SSD read"), span("reader waits", 2, 4, "DRAM slot"),
                                  span("h2d", 4, 5)))
    assert found.idle_s == {"weights: SSD read": 2, "weights: DRAM slot": 1, "weights: copy in": 1, "weights": 0.5,
                            "launch": 0.5}


@pytest.mark.unit
def test_weights_that_wait_for_their_update_are_exposed_optimizer_time() -> None:
    """The update computes from 1 to 2, waits for its bytes to 4, and then for nothing but
    write-backs, which fill the ring."""
    found = find_bubbles(timeline(*compute((0, 1), (7, 10)), span("main waits", 1, 7, "weights"),
                                  span("reader waits", 0.5, 6, "update"), span("cpu optimizer", 1, 2),
                                  span("updater waits", 2, 4, "SSD read"), span("loader waits", 0, 5.5, "ring slot")))
    assert found.idle_s == {"update: SSD read": 2, "update: SSD write": 1.5, "update: CPU": 1, "weights": 1, "update": 0.5}
    assert found.exposed_optimizer_s == 5 and found.busy_s == 4


@pytest.mark.unit
def test_on_a_gpu_only_copies_delay_what_is_enqueued() -> None:
    """Enqueued at 2, it waits for the copy of its weights to 4 and for a gradient to leave to 5,
    whatever main does."""
    late = span("compute", 5.5, 10, launched_s=2)
    found = find_bubbles(timeline(span("compute", 0, 1, launched_s=0), late, span("main waits", 2.5, 9, "norm"),
                                  span("main waits", 1.5, 1.75, "weights"), span("h2d", 1, 4), span("d2h", 3, 5)))
    assert found.idle_s == pytest.approx({"copy in": 2, "launch": 1.25, "copy out": 1, "weights: copy in": 0.25})


@pytest.mark.unit
def test_after_the_last_span_the_step_waits_for_the_norm() -> None:
    found = find_bubbles(timeline(*compute((0, 8)), span("main waits", 3, 9, "norm")))
    assert found.idle_s == {"launch": 1, "norm": 1} and found.busy_s == 8


@pytest.mark.unit
def test_busy_time_is_a_union_within_the_step() -> None:
    assert busy_seconds([span("ssd read /a", -1, 2), span("ssd read /a", 1, 3), span("ssd read /a", 9, 12)], 10) == 4


@pytest.mark.unit
def test_resources_are_held_to_the_measured_rates() -> None:
    machine = load_hardware("4090", ssds=2)
    rates = machine.ssds[0]
    spans = [*compute((0, 4)), span("h2d", 0, 2, num_bytes=int(machine.h2d_bps)), span("ssd read /a", 0, 4, num_bytes=4 * GIB),
             span("ssd read /b", 0, 5, num_bytes=4 * GIB), span("ssd write /a", 6, 7, num_bytes=GIB),
             span("cpu optimizer", -1, 1, num_bytes=52 * 10**9)]
    report = report_step(timeline(*spans), machine, compute_s=3.0)
    found = report.resources
    assert found["compute"].busy_s == 4 and found["compute"].fraction(10) == 0.75
    assert found["h2d"].fraction(10) == pytest.approx(0.5, rel=1e-6)
    assert (found["ssd read"].busy_s, found["ssd write"].busy_s, found["ssd"].busy_s) == (5, 1, 5)
    assert found["ssd read"].at_rate_s == pytest.approx(8 * GIB / (2 * rates.read_bps))
    assert found["cpu optimizer"].busy_s == 1 and found["cpu optimizer"].num_bytes == 26 * 10**9, "half of it is in the step"
    assert found["cpu optimizer"].at_rate_s == pytest.approx(10**9 / machine.adam_params_per_s)
    dram = int(machine.h2d_bps) + 9 * GIB + 26 * 10**9
    assert found["dram"].num_bytes == dram and found["dram"].fraction(10) == pytest.approx(dram / machine.dram_bps / 10)
    assert report.bound("busy_s") == ("ssd", 5) and report.bound("at_rate_s")[0] == "compute"
    formats = FORMATS["8bit"]["bf16"]
    short = report_step(timeline(span("cpu optimizer", 0, 1, num_bytes=int(10**9 * formats.update_bytes))), machine, None, formats)
    assert short.resources["cpu optimizer"].at_rate_s == pytest.approx(10**9 / (formats.update_speed * machine.adam_params_per_s))
    text = describe(report.to_json())
    assert "bound as it was busy: ssd, 5.000 s, 50.0%" in text and "exposed optimizer: 0.000 s" in text


@pytest.mark.unit
def test_a_simulated_compute_lane_has_bubbles_that_add_up() -> None:
    """What a plan is predicted to lose can be read off the same way, though nobody waits in the
    simulator."""
    from ratel.planner.forecast.simulate import simulate

    plan, machine = make_plan(gpt_spec(8, 2048), "ssd"), load_hardware("4090")
    run = simulate(plan, machine)
    end_s = run.step_ends_s[-1]
    found = find_bubbles(Timeline(step=5, step_s=end_s, spans=run.spans))
    assert found.busy_s + sum(found.idle_s.values()) == pytest.approx(end_s)
    assert found.busy_s / len(run.step_ends_s) == pytest.approx(predict(plan, machine).busy_s["compute"], rel=0.05)


def traced(ssd: Path, prepare=lambda session: None, **options) -> StepReport:
    """The report of the third step."""
    with Session(build("llama"), **{**dict(device="cpu", ssd=[ssd], lr=1e-3, micro_batch=2), **options}) as session:
        for index, batch in enumerate(batches("llama", 3)):
            out = session.step(batch, trace=index == 2)
            if index == 0:
                prepare(session)
    return report_step(out.timeline, None, None)


@pytest.mark.numerics
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("optimizer", ["eager", "deferred"])
def test_bubbles_and_computation_make_up_the_step(device: str, optimizer: str, ssd_dir: Path) -> None:
    report = traced(ssd_dir, device=device, optimizer=optimizer, max_grad_norm=0.0, tier="ssd", checkpoint_tier="ssd",
                    gpu_memory="4GiB" if device == "cuda" else None)
    bubbles = report.bubbles
    assert bubbles.busy_s + sum(bubbles.idle_s.values()) == pytest.approx(report.step_s, abs=1e-6)
    assert 0 < bubbles.busy_s == pytest.approx(report.resources["compute"].busy_s, abs=1e-6)


@pytest.mark.numerics
def test_a_slow_ssd_binds_and_reading_is_why_the_step_waits(ssd_dir: Path) -> None:
    """Only `hi` of blocks is on SSD, which forward and backward read and updates write. There is a
    DRAM slot for each: with fewer (the ends share one), half of the waiting is for slots whose last
    users wait for the SSD."""
    report = traced(ssd_dir, placement={"*": "dram", "block.*": {"hi": "ssd"}}, checkpoint_tier="gpu",
                    ssd_bandwidth="100KB/s", buffers=Buffers(host_weight_slots=16))
    assert report.bound("busy_s")[0] == "ssd" and report.bound("busy_s")[1] > 0.6 * report.step_s
    reading_s = sum(seconds for cause, seconds in report.bubbles.idle_s.items() if cause.endswith("SSD read"))
    idle_s = sum(report.bubbles.idle_s.values())
    assert next(iter(report.bubbles.idle_s)).endswith("SSD read"), report.bubbles.idle_s
    assert reading_s > 0.5 * idle_s > 0.25 * report.step_s, report.bubbles.idle_s


@pytest.mark.numerics
def test_a_slow_optimizer_is_exposed(ssd_dir: Path) -> None:
    """Deferred updates run under forward, which takes next to nothing here: all that they are
    slowed down shows."""
    exposed = []
    for delay_s in (0.0, 0.1):

        def slow_down(session: Session, delay_s: float = delay_s) -> None:
            pool = session._machinery.pool
            adamw = pool.adamw
            pool.adamw = lambda *args, **options: (time.sleep(delay_s), adamw(*args, **options))

        report = traced(ssd_dir, slow_down, tier="dram", optimizer="deferred")
        exposed.append(report.bubbles.exposed_optimizer_s)
    units = 6
    assert exposed[1] - exposed[0] >= 0.65 * units * 0.1 - report.bubbles.busy_s, exposed  # under computation it may hide
    assert max(report.bubbles.idle_s, key=report.bubbles.idle_s.get) == "update: CPU"
    assert report.to_json()["exposed_optimizer_fraction"] == pytest.approx(exposed[1] / report.step_s)


@pytest.mark.e2e
def test_bench_step_reports_what_the_docs_say(ssd_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "step.json"
    assert cli.main(["bench", "step", "--ssd", str(ssd_dir), "--tier", "ssd", "--batch-size", "2", "--seq-len", "32",
                     "--steps", "1", "--warmup", "1", "--trace", str(trace), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["traced"]
    documented = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text()
    for key in (*found, *found["resources"], *found["resources"]["ssd"]):
        assert f"`{key}`" in documented, key
    assert found["compute_busy_s"] + sum(found["bubbles_s"].values()) == pytest.approx(found["step_s"], abs=1e-6)
    assert json.loads(trace.read_text())["otherData"]["step"] == 2
    assert "exposed optimizer" in details(result)
    assert cli.main(["bench", "step", "--trace", str(tmp_path / "none" / "x.json")]) == 2
    assert "--trace: cannot be written" in capsys.readouterr().err
