"""The record of a real step: complete, on one clock, and without influence on the step."""

import json
from pathlib import Path
from time import perf_counter

import pytest
import torch

import nvme_ds
from nvme_ds import AlignedBuffer, Engine
from ratel.errors import RatelError
from ratel.planner.traffic import step_traffic
from ratel.runtime.session.session import Session
from ratel.trace.timeline import Span, Timeline
from tests.support.families import batches, build
from tests.support.sessions import open_session

pytestmark = pytest.mark.numerics
MIB = 1 << 20


def open_traced(ssd: Path, device: str = "cpu", **options) -> Session:
    return open_session(ssd, device=device, **{"tier": "ssd", "checkpoint_tier": "ssd", **options})


def lane(timeline: Timeline, prefix: str) -> list[Span]:
    return sorted((s for s in timeline.spans if s.lane.startswith(prefix)), key=lambda s: s.begin_s)


def bytes_of(timeline: Timeline, prefix: str) -> int:
    return sum(span.num_bytes for span in lane(timeline, prefix))


def assert_in_turn(spans: list[Span]) -> None:
    for before, after in zip(spans, spans[1:]):
        assert before.begin_s <= before.end_s <= after.begin_s + 5e-6, (before, after)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("optimizer", ["deferred", "eager"])
def test_a_traced_step_is_complete(optimizer: str, device: str, ssd_dir: Path) -> None:
    # Slow enough that updates of a deferred step are not over before the next one begins.
    with open_traced(ssd_dir, device, optimizer=optimizer, max_grad_norm=0.0, ssd_bandwidth="2MB/s") as session:
        outs = [session.step(batch) for batch in batches("llama", 3)[:2]]
        begun_s = perf_counter()
        outs.append(session.step(batches("llama", 3)[2], trace=True))
        whole_s = perf_counter() - begun_s
        timeline, plan, usage = outs[-1].timeline, session.plan, outs[-1].usage
    assert [out.timeline for out in outs[:2]] == [None, None]
    assert timeline.step == 3 and timeline.lost == 0 and outs[-1].seconds <= timeline.step_s <= whole_s
    for name in ("compute", "h2d", "d2h", "cpu optimizer"):
        spans = lane(timeline, name)
        assert_in_turn(spans)
        assert all(-5e-6 <= s.begin_s and s.end_s <= timeline.step_s for s in spans if name != "cpu optimizer")
    names = {unit.name for unit in plan.spec.units}
    assert {s.name for s in lane(timeline, "h2d")} >= names
    # The first and last updates may be made between this step and its neighbours.
    middle = "block.2"
    assert {middle} <= {s.name for s in lane(timeline, "cpu optimizer")} <= names
    assert {s.name for s in lane(timeline, "d2h")} >= {f"gradient {name}" for name in names}
    assert {s.name for s in lane(timeline, "compute")} >= {f"{stage.name} {what}" for stage in plan.spec.stages[:-1]
                                                           for what in ("forward", "backward")}
    assert {s.name for s in lane(timeline, "ssd read")} >= {f"{plane} {middle}" for plane in ("lo", "m", "v")}
    assert bytes_of(timeline, "h2d") == usage.h2d_bytes == step_traffic(plan).h2d
    assert bytes_of(timeline, "d2h") == usage.d2h_bytes == step_traffic(plan).d2h


def test_spans_of_an_ssd_add_up_to_what_it_moved(ssd_dir: Path) -> None:
    """Block inputs are written and read within a step; other traffic crosses its ends."""
    with open_traced(ssd_dir, tier="dram") as session:
        out = [session.step(batch, trace=True) for batch in batches("llama", 2)][-1]
        plan = session.plan
    assert bytes_of(out.timeline, "ssd read") == out.usage.ssd_read_bytes > 0
    assert bytes_of(out.timeline, "ssd write") == out.usage.ssd_written_bytes > 0
    on_ssd = [block for block, tier in enumerate(plan.checkpoint_tiers) if tier == "ssd"]
    assert {s.name for s in lane(out.timeline, "ssd")} == {f"checkpoint {block}.{micro_batch}" for block in on_ssd
                                                           for micro_batch in range(plan.work.num_micro)}


def test_what_a_block_keeps_comes_back_from_a_tier_at_once(ssd_dir: Path) -> None:
    """Whatever its parts are; three ways each on its own and one that mixes tiers."""
    kept = {"*": "recompute", "block.0": "dram", "block.1": "ssd", "block.2": {"mlp.*": "ssd", "self_attn.?_proj": "dram"}}
    with open_traced(ssd_dir, tier="dram", activations=kept, checkpoint_tier="gpu", micro_batch=2) as session:
        timeline = [session.step(batch, trace=True) for batch in batches("llama", 2)][-1].timeline
        plan = session.plan
    back = [s for s in lane(timeline, "h2d") if s.name.startswith("inside")]
    assert sorted(s.name for s in back) == sorted(f"inside {block}.{micro_batch}" for block, groups in ((0, 1), (1, 1), (2, 2))
                                                  for micro_batch in range(plan.work.num_micro) for _ in range(groups))
    for block in range(3):
        moved = sum(s.num_bytes for s in plan.saved_of(block) if s.tier != "gpu") * plan.work.num_micro
        assert sum(s.num_bytes for s in back if s.name.startswith(f"inside {block}.")) == moved
    assert len([s for s in lane(timeline, "ssd read")]) == len([s for s in lane(timeline, "ssd write")]) == 2 * plan.work.num_micro


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tracing_changes_no_bit(device: str, ssd_dir: Path) -> None:
    results = []
    for trace in (False, True):
        with open_traced(ssd_dir, device) as session:
            losses = [session.step(batch, trace=trace).loss for batch in batches("llama", 3)]
            results.append((losses, session.state_dict()))
    (losses, weights), (traced, same) = results
    assert losses == traced and all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_file_opens_and_covers_the_step(ssd_dir: Path, tmp_path: Path) -> None:
    with open_traced(ssd_dir) as session:
        timeline = [session.step(batch, trace=True) for batch in batches("llama", 3)][-1].timeline
    timeline.write(tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    assert content["otherData"]["step"] == 3 and content["otherData"]["lost_requests"] == 0
    rows = {e["tid"]: e["args"]["name"] for e in content["traceEvents"] if e["ph"] == "M"}
    drawn: dict[int, list[tuple[float, float]]] = {}
    for event in content["traceEvents"]:
        if event["ph"] == "X":
            drawn.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    expected = {"step", "compute", "h2d", "d2h", "cpu optimizer", f"ssd read {ssd_dir}", f"ssd write {ssd_dir}"}
    assert expected <= set(rows.values())
    for row, spans in drawn.items():  # Perfetto nests what overlaps in a row, and cuts off what does not nest
        assert all(before[1] <= after[0] + 0.01 for before, after in zip(sorted(spans), sorted(spans)[1:])), rows[row]
        assert all(0 <= begin <= end <= timeline.step_s * 1e6 + 0.01 for begin, end in spans)


def test_what_is_not_traced_is_not_recorded(ssd_dir: Path) -> None:
    with open_traced(ssd_dir) as session:
        for index, batch in enumerate(batches("llama", 3)):
            session.step(batch, trace=index == 1)
        m = session._machinery
        assert m.lanes._traced is None and not m.exchange.tracing.is_on and m.engine.spans() == ([], 0)
        count = len(m.exchange.tracing._spans)
        session.flush()
        assert len(m.exchange.tracing._spans) == count


@pytest.mark.parametrize("cap_bps", [None, 8 * MIB])
def test_the_engine_records_transfers(cap_bps: float | None, ssd_dir: Path) -> None:
    """One span for a transfer of eight requests; with a cap, at least as long as the cap makes
    it."""
    with Engine(request_bytes=64 << 10, bandwidth_bps=cap_bps) as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", 4 * MIB), AlignedBuffer(4 * MIB)
        engine.wait(engine.submit_write(volume, 0, memory.address, 4 * MIB, nvme_ds.WEIGHT))
        assert engine.spans() == ([], 0)
        engine.watch(100)
        engine.wait(engine.submit_read(volume, MIB, memory.address, 512 << 10, nvme_ds.WEIGHT))
        engine.wait(engine.submit_write(volume, 2 * MIB, memory.address, MIB, nvme_ds.WRITEBACK))
        spans, lost = engine.spans()
        busy_s = engine.stats()["busy_s"]
        engine.watch(1)
        for _ in range(2):
            engine.wait(engine.submit_read(volume, 0, memory.address, 4096, nvme_ds.WEIGHT))
        assert engine.spans()[1] == 1 and len(engine.spans()[0]) == 1
    for op, num_bytes, offset in (("read", 512 << 10, MIB), ("write", MIB, 2 * MIB)):
        mine = [s for s in spans if s.op == op]
        assert sum(s.num_bytes for s in mine) == num_bytes and min(s.offset for s in mine) == offset
        assert all(s.volume == volume.handle and s.directory == str(ssd_dir.resolve()) for s in mine)
    assert lost == 0
    if cap_bps:
        assert len(spans) == 2 and spans[1].end_s - spans[0].begin_s >= 0.6 * 1.5 * MIB / cap_bps
        assert busy_s >= 5.0 * MIB / cap_bps, "what the cap holds back counts as busy"


@pytest.mark.parametrize(("steps", "step"), [(2, 2), (4, 3)])
def test_a_run_traces_its_third_step_or_its_last(steps: int, step: int, tmp_path: Path) -> None:
    import ratel

    file = tmp_path / "trace.json"
    begun_s = perf_counter()
    ratel.train(build("llama"), batches("llama", 4), steps=steps, out=tmp_path / "out", device="cpu", batch_size=4, quiet=True,
                trace=file, eval_fraction=0.0, export=False)
    whole_s = perf_counter() - begun_s
    content = json.loads(file.read_text())
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert content["otherData"]["step"] == step
    assert metrics[step - 1]["step_s"] <= content["otherData"]["step_s"] <= whole_s
    with pytest.raises(ratel.RatelError, match="its directory does not exist"):
        ratel.train(build("llama"), batches("llama", 1), steps=1, out=tmp_path / "o", trace=tmp_path / "none" / "x.json")


@pytest.mark.gpu
def test_clocks_agree() -> None:
    """A copy that the host waits for lies between the host's own readings, at any time after the
    marks."""
    from time import sleep

    from ratel.memory.lanes import Lanes

    lanes = Lanes(torch.device("cuda"))
    source, target = torch.ones(1 << 26, device="cuda"), torch.empty(1 << 26, device="cuda")
    target.copy_(source)
    lanes.synchronize()
    lanes.start_trace()
    readings = []
    for _ in range(20):
        begun_s = perf_counter()
        with lanes.work("h2d", "copy", 1):
            target.copy_(source, non_blocking=True)
        lanes.synchronize()
        readings.append((begun_s, perf_counter()))
        sleep(0.05)
    spans, error_s = lanes.stop_trace()
    assert abs(error_s) < 1e-3 and len(spans) == len(readings)
    for span, (begun_s, ended_s) in zip(spans, readings):
        assert begun_s - 50e-6 <= span.begin_s <= span.end_s <= ended_s + 50e-6
        assert begun_s <= span.launched_s <= ended_s


def test_a_batch_that_is_refused_leaves_nothing_on(ssd_dir: Path) -> None:
    """A record that nobody ends would grow with every step after it."""
    batch = batches("llama", 1)[0]
    with open_traced(ssd_dir) as session:
        session.step(batch)
        with pytest.raises(RatelError, match="no token"):
            session.step({**batch, "labels": torch.full_like(batch["input_ids"], -100)}, trace=True)
        assert not session._machinery.exchange.tracing.is_on
        assert session._machinery.lanes._traced is None
        session.step(batch)
        assert session._machinery.engine.spans() == ([], 0)
