"""Finds the plan with the shortest predicted step: a fixed grid of choices, each filled to the
budgets and predicted.

The grid does not depend on rates, and a rate that grows makes none of its candidates slower.
Filling goes as far as a budget allows. That may be too far on the GPU, where an update takes time
that nothing hides (3% of a step were seen); the best candidate of each micro-batch size is
therefore compared with plans that have fewer units there. All are tried with some of their updates
made early as well, and without clipping once more with all of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from ratel.planner.block_profile import BlockProfile, Inner
from ratel.planner.forecast.cost import Prediction, predict, predict_below
from ratel.planner.machine.hardware import Hardware
from ratel.planner.placement import DRAM, GPU, SSD, closed_first, forced_placements
from ratel.planner.plan import Plan
from ratel.planner.search.choose import choose, early_counts, finished, place_checkpoints
from ratel.planner.search.filling import as_far_as_fits, fill_dram, fill_gpu, fits_gpu, largest, off_gpu, placed_on_gpu, with_placements
from ratel.planner.search.request import Request
from ratel.planner.shape import forward_order
from ratel.planner.work import Buffers

LEAN = Buffers(weight_slots=2, grad_slots=1, host_weight_slots=2, host_grad_slots=2, ring_slots=2, chunk_elements=1 << 20,
               checkpoint_slots=2)
"""Few buffers, but something still moves while something else is used."""
FEWEST = Buffers(weight_slots=1, grad_slots=1, host_weight_slots=1, host_grad_slots=1, ring_slots=1, chunk_elements=1 << 20,
                 checkpoint_slots=1)
"""What the largest models are trained with."""

SHARES = (0.0, 0.25, 0.5, 1.0)
"""The shares of all inner activations, best first, that the search lets a tier keep."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    plan: Plan
    prediction: Prediction
    considered: int
    """Candidates that fitted."""


def search(requests: list[Request], hardware: Hardware) -> Choice:
    """The best plan for any of the requests, which differ in the micro-batch and what depends on
    it.

    Where nothing of the grid fits, the simple rule of `ratel.planner.search.choose.choose` has the
    last word, with the fewest buffers: it finds a place, or its RatelError says what is short.
    """
    given = requests[0].buffers
    sizes = [given, LEAN, FEWEST] if given == Buffers() else [given]
    for buffers in sizes:
        found = _best([replace(request, buffers=buffers) for request in requests], hardware)
        if found is not None:
            return found
    plan = choose(replace(requests[-1], buffers=sizes[-1]))
    return Choice(plan=plan, prediction=predict(plan, hardware), considered=1)


def _best(requests: list[Request], hardware: Hardware) -> Choice | None:
    """The choice with the shortest step, and the first of equal ones: larger micro-batches, less
    moved."""
    return _better(*(_best_of_size(request, hardware) for request in requests))


def _better(*choices: Choice | None) -> Choice | None:
    """The choice with the shortest step, and the first of equal ones."""
    found = [choice for choice in choices if choice is not None]
    if not found:
        return None
    return replace(min(found, key=_step_s), considered=sum(choice.considered for choice in found))


def _best_of_size(request: Request, hardware: Hardware) -> Choice | None:
    if request.optimizer == "any":
        return _better(*(_best_of_size(replace(request, optimizer=mode), hardware) for mode in ("eager", "auto")))
    may_speculate = request.optimizer in ("auto", "speculative")
    deferred = replace(request, optimizer="deferred") if may_speculate else request
    # Where early updates are asked for, a plan that is slow without them is not out of the
    # question.
    tried = _Tried(hardware, stops_at_best=request.optimizer != "speculative")
    tried.add(candidates(deferred))
    if tried.best is None:
        return None
    tried.add(_lighter(deferred, tried.best.plan))
    if not may_speculate:
        return tried.result
    early = _Tried(hardware)
    if request.optimizer == "auto" or not any(_may_be_early(request, choice.plan) for choice in tried.predicted):
        early.best = tried.best
    for choice in sorted(tried.predicted, key=_step_s):
        if choice.prediction.bound_s < early.best_s:  # else it cannot be better with early updates either
            early.add(_speculative(replace(request, optimizer="speculative"), choice.plan))
    early.considered += tried.considered
    return early.result


class _Tried:
    """Plans of one size of micro-batches. With ``stops_at_best`` they are predicted as far as they
    may be the best so far."""

    def __init__(self, hardware: Hardware, *, stops_at_best: bool = True) -> None:
        self._hardware, self._stops_at_best = hardware, stops_at_best
        self.best: Choice | None = None
        self.predicted: list[Choice] = []
        self.considered = 0

    @property
    def best_s(self) -> float:
        return self.best.prediction.step_s if self.best else float("inf")

    @property
    def result(self) -> Choice | None:
        return self.best and replace(self.best, considered=self.considered)

    def add(self, plans: Iterable[Plan]) -> None:
        for plan in plans:
            self.considered += 1
            prediction = predict_below(plan, self._hardware, self.best_s if self._stops_at_best else float("inf"))
            if prediction is None:
                continue
            self.predicted.append(Choice(plan=plan, prediction=prediction, considered=1))
            if prediction.step_s < self.best_s:
                self.best = self.predicted[-1]


def _step_s(choice: Choice) -> float:
    return choice.prediction.step_s


def _speculative(request: Request, plan: Plan) -> Iterator[Plan]:
    """The plan with more and more units updated early, by eighths, for which what is in DRAM makes
    room; and with as many as DRAM has room for as it is."""
    most = len(closed_first(plan.spec, plan.placements))
    made = {count: _with_early(request, plan, count) for count in early_counts(most)}

    def leaves_the_rest(count: int) -> bool:
        if count and count not in made:
            made[count] = _with_early(request, plan, count)
        return not count or (made[count] is not None and made[count].ssd_bytes <= plan.ssd_bytes)

    tried = {*made, largest(most, leaves_the_rest)} - {0}
    yield from (made[count] for count in sorted(tried) if made[count] is not None)


def _may_be_early(request: Request, plan: Plan) -> bool:
    """Something may be updated early: by the CPU, from a gradient that is in DRAM or may go
    there."""
    if request.forced is None:
        return bool(closed_first(plan.spec, plan.placements))
    return bool(replace(plan, early_units=len(plan.spec.units)).early)


def _with_early(request: Request, plan: Plan, count: int) -> Plan | None:
    """With so many units updated early, if that fits."""
    speculative = replace(request, early_units=count, kept=plan.kept, durable=plan.durable)
    rest = off_gpu(request)
    resident = tuple(place if place.on_gpu else rest for place in plan.placements)
    filled = (with_placements(speculative, plan.placements, plan.checkpoint_tiers) if request.forced is not None
              else fill_dram(speculative, plan.checkpoint_tiers, resident, as_far_as_fits))
    made = finished(speculative, filled)
    return made if filled.early and fits(speculative, made) else None


def _lighter(request: Request, plan: Plan) -> Iterator[Plan]:
    """The plan with fewer and fewer units on the GPU, down to none."""
    count = sum(place.on_gpu for place in plan.placements)
    if request.forced is not None or request.gpu_budget is None:
        return
    request, order = replace(request, kept=plan.kept), forward_order(request.spec.units)
    for fewer in sorted({count * eighths // 8 for eighths in range(8)} - {count}, reverse=True):
        lighter = finished(request, fill_dram(request, plan.checkpoint_tiers, placed_on_gpu(request, order[:fewer]), as_far_as_fits))
        if fits(request, lighter):
            yield lighter


def candidates(request: Request) -> Iterator[Plan]:
    """Every choice of the grid that fits, filled. Of equal ones the first is taken: that which
    writes least of what is made anew at every step to SSDs, which wear."""
    for checkpoints, kept in sorted(product(_checkpoint_choices(request), _kept_choices(request)), key=_num_on_ssd):
        plan = _filled(replace(request, kept=kept), checkpoints)
        if plan is not None:
            yield plan


def fits(request: Request, plan: Plan) -> bool:
    return (fits_gpu(request, plan) and plan.dram_bytes <= request.dram_budget
            and plan.ssd_bytes <= (request.ssd_budget or 0))


# --- what is tried ----------------------------------------------------------------------------------------------------


def _checkpoint_choices(request: Request) -> list[tuple[str, ...]]:
    if request.checkpoint_tier != "auto":
        return [place_checkpoints(request, request.checkpoint_tier)]
    tiers = [GPU, DRAM] + ([SSD] if request.ssd_budget is not None else [])
    return [place_checkpoints(request, tier) for tier in tiers]


def _kept_choices(request: Request) -> list[tuple]:
    """Inner activations on each tier: the best per byte on the GPU, the next in DRAM, then on
    SSD."""
    if request.kept or not any(profile.inner for profile in request.profiles):
        return [request.kept]
    items = _by_worth(request.profiles)
    on_ssd = (0.0, 0.5, 1.0) if request.ssd_budget is not None else (0.0,)
    shares = [(g, d, s) for g, d, s in product(SHARES, SHARES, on_ssd) if g + d + s <= 1]
    return list(dict.fromkeys(_assigned(request.profiles, items, *share) for share in shares))


def _by_worth(profiles: tuple[BlockProfile, ...]) -> list[tuple[int, Inner]]:
    """(block, inner) by FLOPs saved per byte; the later block first, which is needed again
    soonest."""
    pairs = [(block, inner) for block, profile in enumerate(profiles) for inner in profile.inner]
    return sorted(pairs, key=lambda pair: (-pair[1].flops_per_byte, -pair[0], pair[1].name))


def _assigned(profiles: tuple[BlockProfile, ...], items: list[tuple[int, Inner]], on_gpu: float, in_dram: float,
              on_ssd: float) -> tuple:
    ends = [round(len(items) * share) for share in (on_gpu, on_gpu + in_dram, on_gpu + in_dram + on_ssd)]
    tiers = [GPU] * ends[0] + [DRAM] * (ends[1] - ends[0]) + [SSD] * (ends[2] - ends[1])
    chosen = {(block, inner.name): tier for (block, inner), tier in zip(items, tiers)}
    return tuple(tuple((inner.name, chosen[block, inner.name]) for inner in profile.inner if (block, inner.name) in chosen)
                 for block, profile in enumerate(profiles))


def _num_on_ssd(choice: tuple[tuple[str, ...], tuple]) -> int:
    checkpoints, kept = choice
    return checkpoints.count(SSD) + sum(tier == SSD for block in kept for _, tier in block)


# --- filling ----------------------------------------------------------------------------------------------------------


def _filled(request: Request, checkpoints: tuple[str, ...]) -> Plan | None:
    """As much as fits on the GPU, then in DRAM, the rest on SSD; None where even that does not
    fit."""
    if request.forced is not None:
        plan = with_placements(request, forced_placements(request.spec, request.forced), checkpoints)
    else:
        placements = fill_gpu(request, checkpoints, as_far_as_fits)
        if not fits_gpu(request, with_placements(request, placements, checkpoints)):
            return None  # most candidates keep more on the GPU than there is room for
        plan = fill_dram(request, checkpoints, placements, as_far_as_fits)
    plan = finished(request, plan)
    return plan if fits(request, plan) else None
