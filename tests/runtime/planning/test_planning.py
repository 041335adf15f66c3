"""A session that plans with a machine's rates does what its plan says, and trains to the same
bits."""

import os
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from ratel.planner.forecast.cost import predict
from ratel.planner.machine.hardware import Hardware, load_hardware
from ratel.planner.traffic import step_traffic
from ratel.runtime.session.session import Session
from tests.support.families import batches, build, loss_fn_of

pytestmark = pytest.mark.numerics
FAST = load_hardware("h200-box")
BUDGETS = dict(gpu_memory="24MiB", dram="2GiB")


def trained(ssd_dir: Path, family: str = "llama", **options: object) -> tuple[Session, dict[str, torch.Tensor], list]:
    session = Session(build(family), loss_fn=loss_fn_of(family), device="cpu", ssd=[ssd_dir], lr=1e-3, micro_batch=2,
                      **{**BUDGETS, **options})
    with session:
        outs = [session.step(batch) for batch in batches(family, 4)]
        return session, session.state_dict(), outs


@cache
def by_the_simple_rule(family: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("RATEL_TEST_SSD")) as path:
        return trained(Path(path), family, hardware="none")[1]


def slow_copies() -> Hardware:
    return replace(FAST, h2d_bps=1e3, d2h_bps=1e3, duplex_bps=1e3)


def slow_compute() -> Hardware:
    return replace(FAST, gpu_flops=1e6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize("machine", [FAST, slow_copies(), slow_compute()], ids=["fast", "slow copies", "slow compute"])
def test_whatever_is_planned_the_bits_are_the_same(machine: Hardware, family: str, ssd_dir: Path) -> None:
    expected = by_the_simple_rule(family)
    session, found, outs = trained(ssd_dir, family, hardware=machine)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert session.prediction == predict(session.plan, session.machine)
    moved = step_traffic(session.plan)
    usage = [out.usage for out in outs[1:]]  # the first step reads weights that later ones find in DRAM
    assert sum(u.ssd_read_bytes + u.ssd_written_bytes for u in usage) <= len(usage) * (moved.ssd_read + moved.ssd_written)


def test_the_rates_decide(ssd_dir: Path) -> None:
    """Where copies cost everything nothing inside blocks leaves the GPU."""
    dear, _, _ = trained(ssd_dir, hardware=slow_copies())
    tiers = {tier for block in dear.plan.kept for _, tier in block}
    assert tiers <= {"gpu"}
    assert all(tier == "gpu" for tier in dear.plan.checkpoint_tiers)


def test_the_simple_rule_predicts_nothing(ssd_dir: Path) -> None:
    session, _, _ = trained(ssd_dir, hardware="none")
    assert session.prediction is None and session.machine is None
