"""What an earlier start chose among all plans, taken again where nothing that the choice depends on
has changed.

Trying blocks out with three sizes of micro-batches and searching among their plans takes 2 to 3 s,
nearly all of it Python. What is kept is the choice alone: the size of micro-batches that was taken,
and where everything goes. The size is tried out as always, so the memory of activations is measured
and what second runs leave out is learned and checked; the plan is made of these numbers by the code
that runs now, has to fit the budgets of now, and is predicted anew. Whatever differs (blocks that
do something else, less memory, or more than a search would leave unused) leads to a search.
"""

import functools
import hashlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import ratel.planner
from ratel import probe_cache
from ratel.hardware.probe import processors_key
from ratel.planner.placement import TIERS, UnitPlacement
from ratel.planner.plan import Plan
from ratel.planner.search.choose import finished
from ratel.planner.search.filling import with_placements
from ratel.planner.search.request import Request
from ratel.planner.search.search import fits
from ratel.planner.work import Buffers
from ratel.schema import LARGEST, boolean, check, listing, nullable, one_of, record, text, whole

GAIN = 1 / 64
"""By this share a budget must have grown for another plan to be looked for, which may use it."""

_TIER = one_of(*TIERS)
_COUNT = whole(1, 1 << 31)
_CHOICE = record({
    "optimizer": text(), "early_units": whole(0, 1 << 20), "durable": text(), "kept": listing(listing(listing(text()))),
    "checkpoint_tiers": listing(_TIER), "placements": listing(record(dict.fromkeys(("hi", "lo", "m", "v", "g"), _TIER))),
    "buffers": record({name.name: _COUNT for name in fields(Buffers)})})
_KEPT = record({"micro_rows": _COUNT, "spills": boolean, "profiles": text(), "choice": _CHOICE,
                "rooms": listing(nullable(whole(-LARGEST)), least=3, most=3)})

Rooms = list[int | None]
"""Bytes of the GPU, of DRAM and of SSDs for what a plan places there; None where that has no limit,
or nothing goes."""


@dataclass(frozen=True, kw_only=True)
class EarlierPlan:
    """A choice, and what it was made for."""

    micro_rows: int
    spills: bool
    profiles: str
    """A digest of what was learned and timed of the blocks."""
    rooms: Rooms
    choice: dict[str, Any]
    """What a search decides, as JSON."""

    def again(self, request: Request) -> Plan | None:
        """The plan for this request, which is for as many rows; None if it must be searched for."""
        had, have = self.rooms, _rooms(request, request.ssd_budget)
        if len(self.choice["placements"]) != len(request.spec.units):
            return None
        if self.profiles != _digest(request.profiles) or any(map(_is_much_more, have, had)):
            return None
        chosen = replace(request, **{name: self.choice[name] for name in ("optimizer", "early_units", "durable")},
                        kept=_tuples(self.choice["kept"]), buffers=Buffers(**self.choice["buffers"]))
        placements = tuple(UnitPlacement(**planes) for planes in self.choice["placements"])
        plan = finished(chosen, with_placements(chosen, placements, tuple(self.choice["checkpoint_tiers"])))
        return plan if fits(request, plan) else None


def key_of(device: Any, *given: Any) -> probe_cache.Key:
    """``given``: all that a search is given but what is measured at each start; things whose
    ``repr`` tells them apart."""
    return {**processors_key(device), "planner": _planner(), "given": _digest(given)}


def load(key: probe_cache.Key) -> EarlierPlan | None:
    return probe_cache.load(key, lambda content: EarlierPlan(**check(content, _KEPT)))


def store(key: probe_cache.Key, plan: Plan, ssd_budget: int | None) -> None:
    names = ("optimizer", "early_units", "durable", "kept", "checkpoint_tiers")
    choice = {**{name: getattr(plan, name) for name in names}, "buffers": asdict(plan.buffers),
              "placements": [asdict(place) for place in plan.placements]}
    probe_cache.store(key, asdict(EarlierPlan(micro_rows=plan.work.micro_rows, spills=plan.spill is not None, choice=choice,
                                              profiles=_digest(plan.profiles), rooms=_rooms(plan, ssd_budget))))


def _rooms(given: Request | Plan, ssd_budget: int | None) -> Rooms:
    gpu = None if given.gpu_budget is None else given.gpu_budget - given.workspace_bytes
    return [gpu, given.dram_budget - given.process_bytes, ssd_budget]


def _is_much_more(have: int | None, had: int | None) -> bool:
    if have is None or had is None:
        return have is not had
    return have > had * (1 + GAIN)


def _tuples(kept: list[list[list[str]]]) -> tuple:
    return tuple(tuple(map(tuple, block)) for block in kept)


def _digest(thing: Any) -> str:
    return hashlib.sha256(repr(thing).encode()).hexdigest()


@functools.cache
def _planner() -> str:
    """A digest of the planner's own sources, since another planner may choose otherwise, and of
    this one, which writes the choice down."""
    sources = [*sorted(Path(ratel.planner.__file__).parent.rglob("*.py")), Path(__file__)]
    return _digest([source.read_bytes() for source in sources])
