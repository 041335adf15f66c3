"""What passes through the optimizer pipeline: gradients that arrive, updates of units, chunks of
updates."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ratel.memory.lanes import Event
from ratel.memory.slots import Slot
from ratel.native import op_ds
from ratel.planner.shape import UnitSpec
from ratel.store.host_cache import HostSlot
from ratel.store.plane_io import Read

KEEP, AGAIN, FORGET = "keep", "again", "forget"
"""What becomes of an early update: its result is the unit's state; it is made once more, with
another scale; or the step is skipped."""


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """What one update of all parameters uses. ``step`` counts updates from 1; ``seed`` is the
    session's."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    seed: int
    grad_scale: float = 1.0

    def of_elements(self, unit: UnitSpec, begin: int, end: int) -> dict[str, Any]:
        """What AdamW is told for the elements ``[begin, end)`` of a unit."""
        return {"lr": self.lr, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps, "step": self.step,
                "grad_scale": self.grad_scale, "ranges": decay_ranges(unit, begin, end, self.weight_decay),
                "rounding": op_ds.Rounding(key=op_ds.rounding_key(self.seed, self.step, unit.index), first=begin)}


@dataclass(frozen=True, slots=True)
class GradientInFlight:
    """A unit's gradient on its way from the device to its update. The owner of the update releases
    it."""

    host: torch.Tensor | None
    """1-D in DRAM, valid once ``arrived``. None: it waits on SSD."""
    norm: torch.Tensor
    """fp32 scalar in DRAM, valid once ``arrived``: the norm of the unit's gradient."""
    arrived: Event
    host_slot: Slot | None = None
    """In DRAM, that it passes through. None: it has a place of its own."""

    def release(self) -> None:
        if self.host_slot is not None:
            self.host_slot.pool.release(self.host_slot, Event())

    def on_ssd(self) -> "GradientInFlight":
        """The same gradient, when it has been written and its slot is others'."""
        return replace(self, host=None, host_slot=None)


@dataclass(slots=True)
class Job:
    """The update of one unit."""

    unit: UnitSpec
    hyper: Hyper
    number: int
    """The number of this among the unit's updates, from 1."""
    weights: HostSlot | None = None
    chunks_left: int = 0
    keep: bool = False
    applied: bool = False
    """Not so where the step is skipped."""
    write_tickets: list[int] = field(default_factory=list)
    early: bool = False
    """Begun before the norm is known, as a rule. ``hyper`` is a guess until there is a
    ``verdict``."""
    ssd_slot: int | None = None
    """The slot that the result goes to. None: the successor's."""
    begun: bool = False
    written: bool = False
    verdict: str | None = None
    after: "Job | None" = None
    """The early update that this one makes again: it may still use the places that this one
    writes."""

    @property
    def is_void(self) -> bool:
        return self.verdict in (AGAIN, FORGET)


@dataclass(slots=True)
class Chunk:
    job: Job
    begin: int
    end: int
    ring: dict[str, torch.Tensor] | None
    """By plane: where the chunk's bytes from SSD go."""
    ring_slot: torch.Tensor | None
    reads: list[Read]


def decay_ranges(unit: UnitSpec, begin: int, end: int, weight_decay: float) -> list[tuple[int, float]]:
    """``(end element, weight decay)`` ranges of the chunk ``[begin, end)``, relative to its
    begin."""
    split = min(max(unit.num_decay - begin, 0), end - begin)
    ranges = [(split, weight_decay)] if split else []
    if split < end - begin:
        ranges.append((end - begin, 0.0))
    return ranges
