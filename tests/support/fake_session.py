"""A session without a model, for tests of what goes on around steps. No tests here."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ratel import interrupt
from ratel.training.loop import Loop, Progress
from ratel.training.schedule import make_schedule


@dataclass(frozen=True, kw_only=True)
class FakeResult:
    step: int
    loss: float
    lr: float
    skipped: bool = False
    grad_norm: float = 1.0
    tokens: int = 100
    seconds: float = 0.5
    bound_s: float = 0.25
    bound_by: str = "ssd"
    early_units: int = 3
    redone_units: int = 0
    usage: Any = field(default_factory=lambda: SimpleNamespace(ssd_read_bytes=7, ssd_written_bytes=6))


class FakeSession:
    """Losses are the batches themselves; ``act`` is called in each step with its number."""

    def __init__(self, act: Any = lambda number: None) -> None:
        self.act = act
        self.calls: list[str] = []
        self.rates: list[float] = []
        self.hardware = {"device": "fake"}
        self.parts = SimpleNamespace(spec=SimpleNamespace(vocab_size=None), module=object(), is_causal_lm=True, probed=True, task=None)
        self.accuracy = None
        self.plan = object()

    def step(self, batch: float, lr: float | None = None) -> FakeResult:
        assert lr is not None
        self.rates.append(lr)
        self.act(len(self.rates))
        return FakeResult(step=len(self.rates), loss=batch, lr=lr, skipped=not math.isfinite(batch))

    def evaluate(self, batches: Iterable[float]) -> float:
        losses = list(batches)
        self.calls.append("evaluate")
        return sum(losses) / len(losses)

    def flush(self) -> None:
        self.calls.append("flush")

    def export(self, path: Path, *, dtype: str) -> None:
        self.calls.append("export")
        Path(path).mkdir()

    def __enter__(self) -> "FakeSession":
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self.calls.append("close" if kind is None else f"close after {kind.__name__}")


def run_loop(session: FakeSession, batches: Iterable[float], *, steps: int,
             **options: Any) -> tuple[Progress, list[dict]]:
    progress, records = Progress(), []
    schedule = make_schedule("linear", lr=1.0, steps=steps)
    with interrupt.finishing() as stop:
        Loop(session=session, steps=steps, schedule=schedule, record=records.append, stop=stop, **options
             ).run(iter(batches), progress)
    return progress, records
