"""Every event that the runtime has to wait for is waited for: seen on a CPU, with copies that run
late (`late_lanes`)."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ratel.errors import RatelError
from ratel.planner.checkpoints import Spill
from ratel.runtime.blocks.spiller import Spiller
from ratel.runtime.session.session import Session
from tests.support.families import batches, build
from tests.support.late_lanes import LateLanes, late_lanes
from tests.support.sessions import MANY, MIXED, SMALL

pytestmark = pytest.mark.numerics
CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "dram": dict(tier="dram"),
    "gpu": dict(tier="gpu"),
    "ssd, one of each buffer": dict(tier="ssd", buffers=SMALL, checkpoint_tier="ssd"),
    "ssd, many buffers": dict(tier="ssd", buffers=MANY, checkpoint_tier="dram"),
    "mixed, one of each buffer": dict(placement=MIXED, buffers=SMALL, checkpoint_tier="dram"),
    "insides in dram": dict(tier="dram", activations="dram", checkpoint_tier="dram"),
    "insides on ssd": dict(tier="dram", activations="ssd", checkpoint_tier="ssd", buffers=SMALL),
    "spilled": dict(tier="dram", activations="spill", checkpoint_tier="dram"),
}


def run(ssd: Path, **options: Any) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    with Session(build("llama"), lr=1e-2, device="cpu", ssd=[ssd], max_grad_norm=0.5, micro_batch=2, **options) as session:
        session.prepare(4, 16)
        lanes = session._machinery.lanes
        outs = []
        for batch in batches("llama", 3):
            with lanes.watching() if isinstance(lanes, LateLanes) else torch.enable_grad():
                outs.append(session.step(batch))
        return [(out.loss, out.grad_norm) for out in outs], session.state_dict()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    return {dtype: run(tmp_path_factory.mktemp("ssd"), tier="dram", dtype=dtype) for dtype in ("bf16", "fp32")}


def test_a_checkpoint_is_held_until_it_has_been_copied(expected: dict, ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory must be nobody else's before, also where the main thread itself is about to wait
    for that copy."""
    monkeypatch.setattr("ratel.runtime.streams.activations.MAX_COPIES_BEHIND", 0.5)  # of two micro-batches
    with late_lanes(monkeypatch, max_delay_s=0.02) as made:
        outs, _ = run(ssd_dir, dtype="bf16", **VARIANTS["spilled"])
    assert made[0].violations == []
    assert outs == expected["bf16"][0]


@pytest.mark.parametrize("variant, dtype", [*((v, "bf16") for v in VARIANTS), ("mixed, one of each buffer", "fp32"), ("spilled", "fp32")])
def test_copies_that_run_late_change_nothing(variant: str, dtype: str, expected: dict, ssd_dir: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    with late_lanes(monkeypatch, seed=len(variant)) as made:
        outs, states = run(ssd_dir, dtype=dtype, **VARIANTS[variant])
    (lanes,) = made
    assert lanes.violations == []
    assert lanes.num_copies > 20 or variant == "gpu"
    assert outs == expected[dtype][0]
    assert [name for name in states if not torch.equal(states[name], expected[dtype][1][name])] == []


@pytest.mark.parametrize("deaf", ["compute", "h2d", "d2h"])
def test_a_lane_that_does_not_wait_is_noticed(deaf: str, ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with late_lanes(monkeypatch, deaf=deaf) as made:
        with suppress(RatelError):  # what arrives too late may be noticed by the check of a block's second run, too
            run(ssd_dir, **VARIANTS["ssd, one of each buffer"])
    assert any(line.startswith(deaf) for line in made[0].violations)


def half_used(x: Tensor, w: Tensor) -> Tensor:
    """Autograd saves for a branch that the result does not use; it is fetched ahead, and never
    asked for."""
    for _ in range(4):
        x = torch.tanh(x @ w)
        torch.sin(x * 2).cos().mul(x)
    return x


def test_what_was_fetched_and_not_used_is_in_nobodys_way() -> None:
    """Its copy may still run when its memory is given up, and when its place in DRAM is written
    over in the next block."""
    lanes, region = made(0.01), torch.empty(1 << 20, dtype=torch.uint8)
    spiller = Spiller(lanes, region, Spill(region_bytes=1 << 20, window_bytes=4 * 4096, least_bytes=64))
    x, w = torch.randn(32, 32), torch.randn(32, 32).requires_grad_()
    results = []
    for _ in range(3):
        with lanes.watching():
            with spiller.saving([x, w]):
                y = half_used(x, w).sum()
            y.backward()
            spiller.finish()
        results.append(w.grad)
        w.grad = None
    half_used(x, w).sum().backward()
    assert lanes.violations == [] and lanes.num_copies > 12
    assert all(torch.equal(result, w.grad) for result in results)
    lanes.end()


# --- the stand-in itself ----------------------------------------------------------------------------------------------


def copied(lanes: LateLanes, lane: str, target: Tensor, source: Tensor) -> None:
    with lanes.work(lane, "a test"):
        target.copy_(source, non_blocking=True)


def made(max_delay_s: float = 0.05) -> LateLanes:
    return LateLanes(CPU, seed=1, max_delay_s=max_delay_s)


def test_a_copy_runs_late_and_its_event_says_when() -> None:
    lanes, source, target = made(), torch.arange(8.0), torch.zeros(8)
    copied(lanes, "h2d", target, source)
    assert not torch.equal(target, source)
    lanes.record("h2d").synchronize()
    assert torch.equal(target, source) and lanes.violations == []
    lanes.end()


@pytest.mark.parametrize("waits", [True, False])
def test_what_is_computed_from_a_copy_waits_for_it(waits: bool) -> None:
    lanes, source, target = made(), torch.ones(8), torch.zeros(8)
    copied(lanes, "h2d", target, source)
    if waits:
        lanes.wait("compute", lanes.record("h2d"))
    with lanes.watching():
        target[2:4].sum()
    assert (lanes.violations == []) == waits
    lanes.end()


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_a_copy_waits_for_what_was_computed(reads: bool, waits: bool) -> None:
    """Both ways: it copies what has been computed, or over what has been read."""
    lanes, used, other = made(0.0), torch.ones(8), torch.zeros(8)
    with lanes.watching():
        used.mul_(2) if reads else used.sum()
    if waits:
        lanes.wait("d2h", lanes.record("compute"))
    copied(lanes, "d2h", *((other, used) if reads else (used, other)))
    assert (lanes.violations == []) == waits
    lanes.end()


def test_an_event_that_was_recorded_too_early_does_not_help() -> None:
    lanes, used = made(0.0), torch.ones(8)
    early = lanes.record("compute")
    with lanes.watching():
        used.mul_(2)
    lanes.wait("d2h", early)
    copied(lanes, "d2h", torch.zeros(8), used)
    assert len(lanes.violations) == 1
    lanes.end()


def test_order_is_passed_on_from_lane_to_lane() -> None:
    """d2h waited for h2d, which had waited for the compute lane."""
    lanes, used, target = made(0.0), torch.ones(8), torch.zeros(8)
    with lanes.watching():
        used.mul_(2)
    lanes.wait("h2d", lanes.record("compute"))
    lanes.wait("d2h", lanes.record("h2d"))
    copied(lanes, "d2h", target, used)
    assert lanes.violations == []
    lanes.end()


@pytest.mark.parametrize("waits", [True, False])
def test_the_copies_of_both_lanes_wait_for_each_other(waits: bool) -> None:
    lanes, middle = made(), torch.zeros(8)
    copied(lanes, "d2h", middle, torch.ones(8))
    if waits:
        lanes.wait("h2d", lanes.record("d2h"))
    copied(lanes, "h2d", torch.zeros(8), middle)
    lanes.synchronize()
    assert len([line for line in lanes.violations if "does not wait" in line]) == (not waits)
    lanes.end()


def test_memory_must_stay_until_its_copy_has_run() -> None:
    lanes, target = made(), torch.zeros(8)
    source = torch.ones(8)
    copied(lanes, "d2h", target, source)
    del source
    lanes.synchronize()
    assert lanes.violations == ["memory of d2h aten.copy_.default was freed before it had run"]
    lanes.end()
