"""Sessions whose updates are made before the norm is known, on right and wrong guesses. No tests here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ratel.planner.search.choose
import ratel.runtime.session.training_step
from ratel.memory import jitter
from ratel.runtime.session.result import StepResult
from ratel.runtime.session.session import Session
from tests.support.families import batches
from tests.support.patience import within
from tests.support.sessions import MANY, MIXED, SMALL, everything, open_session

STEPS = 5
NEVER, ALWAYS = 100.0, 0.1
MODES = ("deferred", "speculative")
ON_THE_GPU = {"*": "dram", "block.0": "gpu", "post": "gpu", "block.3": "ssd"}
# The first block that is updated early has its gradient on SSD, so that it is not; those before and
# after it are.
LATE_AMONG_EARLY = {"*": "ssd", "*.?": {"g": "dram"}, "block.2": {"g": "ssd"}}
PLACES: dict[str, dict[str, Any]] = {
    "dram": dict(tier="dram"),
    "ssd": dict(placement={"*": {p: "ssd" for p in ("hi", "lo", "m", "v")}}),
    "mixed": dict(placement=MIXED),
    "some on the GPU": dict(placement=ON_THE_GPU),
    "ssd, one of each buffer": dict(placement={"*": {p: "ssd" for p in ("hi", "lo", "m", "v")}}, buffers=SMALL,
                                    checkpoint_tier="ssd"),
    "one that is not early among them": dict(placement=LATE_AMONG_EARLY, buffers=SMALL),
    "mixed, many buffers": dict(placement=MIXED, buffers=MANY, checkpoint_tier="dram"),
}


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], None]:
    """Decides for each step, by its number from 0, whether its updates are made early."""
    def decide_by(policy: Callable[[int], bool]) -> None:
        monkeypatch.setattr(ratel.runtime.session.training_step, "REMEMBERED_STEPS", None)
        monkeypatch.setattr(ratel.runtime.session.training_step, "expects_no_scaling", lambda before: policy(len(before)))

    decide_by(lambda step: True)
    return decide_by


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the share of the units that may be updated early."""
    def of(part: float) -> None:
        monkeypatch.setattr(ratel.planner.search.choose, "EARLY_SHARE", part)

    of(1.0)
    return of


def open_speculative(ssd: Path, family: str = "llama", **options: Any) -> Session:
    return open_session(ssd, family, **{"weight_decay": 0.1, "optimizer": "speculative", **options})


def run(ssd: Path, family: str = "llama", *, steps: int = STEPS, delay_s: float = 0.0, seed: int = 0,
        **options: Any) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    with jitter.injected(delay_s, seed=seed), open_speculative(ssd, family, **options) as session, within():
        return [session.step(batch) for batch in batches(family, steps)], everything(session)
