"""What a whole run takes: the predicted step, as many times as the data have steps, at a price by
the hour."""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from ratel.planner.pricing.rented import Rented

PACKED, ALONE, PADDED = "packed", "alone", "padded"
"""Texts share rows of one length; each has a row of that length to itself; each has a row that is
as long as the longest of its batch."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Once through the data. ``row_tokens``: how wide rows are, on average; ``tokens``: without
    padding."""

    form: str
    rows: int
    row_tokens: float
    tokens: int

    @property
    def padding(self) -> float:
        """The share of what is computed that nobody learns from."""
        return max(0.0, 1 - self.tokens / (self.rows * self.row_tokens))


@dataclass(frozen=True, kw_only=True)
class Step:
    """``overhead_s``: measured beside what is predicted (`Calibration`), and part of ``seconds``."""

    seconds: float
    bound_by: str
    overhead_s: float
    gpu_bytes: int
    dram_bytes: int
    ssd_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """One line: a machine, what is trained, and a form of rows. ``step`` is None where a step does
    not fit; then ``problem`` says why."""

    rented: Rented
    basis: str
    """What the seconds rest on: ``measured``, ``data sheet``, ``paper`` or ``fitted``."""
    trains: str
    """``all``, or the adapters."""
    states: str
    epoch: Epoch
    epochs: int
    batch: int
    largest_batch: int
    """Rows of a step that fit at most."""
    step: Step | None
    problem: str | None = None

    @property
    def steps(self) -> int:
        """The last one may have fewer rows than the others, and counts as one."""
        return ceil(self.epoch.rows * self.epochs / self.batch)

    @property
    def hours(self) -> float | None:
        return None if self.step is None else self.steps * self.step.seconds / 3600

    @property
    def dollars(self) -> float | None:
        price = self.rented.price
        return None if self.hours is None or price is None else self.hours * price.dollars_per_hour

    @property
    def kwh(self) -> float | None:
        """At most: the machine draws all it can for the whole run."""
        watts = self.rented.watts
        return None if self.hours is None or watts is None else self.hours * watts / 1000

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "epoch": {**asdict(self.epoch), "padding": self.epoch.padding}, "steps": self.steps,
                "hours": self.hours, "dollars": self.dollars, "kwh": self.kwh}
