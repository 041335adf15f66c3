"""The simple rule: fill GPU memory, then DRAM, then SSD, hottest planes first; refuse what fits
nowhere."""

from dataclasses import replace
from functools import partial

from ratel.errors import RatelError
from ratel.planner.formats import EXACT, PLANES
from ratel.planner.placement import DRAM, GPU, SSD, Forced, check_forced, closed_first, forced_placements
from ratel.planner.plan import Plan
from ratel.planner.search.filling import fill_dram, fill_gpu, whatever_fits, with_placements
from ratel.planner.search.request import Request
from ratel.planner.shape import ModelSpec
from ratel.units import format_bytes

EARLY_SHARE = 0.75
"""The share of the units on the CPU that the simple rule has updated early: backward with
recomputation takes three quarters of the time of both passes, under which the updates are
spread."""

WITHOUT_RATES = {"auto": "deferred", "any": "eager"}
"""Which optimizer is taken where nothing says what is fast: the one that takes the least memory."""


def choose(request: Request) -> Plan:
    """Place everything, or raise a RatelError that says which budget is short, by how much, and
    what would fit."""
    _check_tiers(request)
    mode = WITHOUT_RATES.get(request.optimizer, request.optimizer)
    plan = _choose_early(request) if mode == "speculative" else _placed(replace(request, optimizer=mode))
    _check_budgets(request, plan)
    return plan


def _choose_early(request: Request) -> Plan:
    """As many early units as memory allows, up to a share of those that the CPU updates; one at
    least."""
    updated = closed_first(request.spec, _placed(request).placements)
    for count in early_counts(round(EARLY_SHARE * len(updated)))[::-1]:
        plan = _placed(replace(request, early_units=count))
        if _exceeded(request, plan) is None:
            break
    return plan


def early_counts(most: int) -> list[int]:
    """Numbers of early units to try: by eighths, from the fewest."""
    return sorted({max(1, most * eighths // 8) for eighths in range(1, 9)})


def _placed(request: Request) -> Plan:
    checkpoints = _checkpoint_tiers(request)
    if request.forced is not None:
        plan = with_placements(request, forced_placements(request.spec, request.forced), checkpoints)
    else:
        placements = fill_gpu(request, checkpoints, partial(whatever_fits, ends_at=lambda unit: request.spec.classes[unit.index].is_deep))
        plan = fill_dram(request, checkpoints, placements, whatever_fits)
    return finished(request, plan)


def finished(request: Request, plan: Plan) -> Plan:
    """With the way in which states are made to last, and what memory is left for it."""
    return _with_save_pieces(request, _with_durability(request, plan))


def _with_durability(request: Request, plan: Plan) -> Plan:
    """``auto`` commits in place where that spares more copying than it costs space: most states are
    on SSD, twice fits."""
    if request.durable != "auto":
        return replace(plan, durable=request.durable)
    commits = replace(plan, durable="step")
    fits = commits.ssd_bytes <= (request.ssd_budget or 0)
    return commits if fits and 2 * plan.slot_layout.num_bytes >= commits.slot_layout.num_bytes else replace(
        plan, durable="checkpoint")


def _with_save_pieces(request: Request, plan: Plan) -> Plan:
    """DRAM that is left over takes what a save copies, so that updates wait for memory instead of
    for a drive."""
    if plan.durable == "off":
        return plan
    wanted = -(-plan.copied_bytes // plan.save_piece_bytes)
    spare = max(0, request.dram_budget - plan.dram_bytes) // plan.save_piece_bytes
    return replace(plan, save_pieces=plan.save_pieces + min(wanted, spare))


def place_checkpoints(request: Request, tier: str) -> tuple[str, ...]:
    """All to one tier; but the last block's input is still on the GPU when backward needs it."""
    return (tier,) * (request.num_blocks - 1) + (GPU,)


def _checkpoint_tiers(request: Request) -> tuple[str, ...]:
    """``auto`` keeps them on the GPU where nothing limits it or they take less than a tenth of it,
    else moves them to DRAM, or to SSD where they would take more than half of the DRAM budget.
    """
    tier = request.checkpoint_tier
    if tier == "auto":
        total = request.num_blocks * request.work.num_micro * request.work.hidden_bytes
        spills = request.ssd_budget is not None and total > request.dram_budget / 2
        small = request.gpu_budget is None or total <= request.gpu_budget / 10
        # On a CPU device they would fill the same DRAM from either side.
        tier = GPU if small and not (request.on_host and spills) else SSD if spills else DRAM
    return place_checkpoints(request, tier)


def _check_tiers(request: Request) -> None:
    keeps_on_ssd = any(tier == SSD for block in request.kept for _, tier in block)
    if request.ssd_budget is None and (request.checkpoint_tier == SSD or keeps_on_ssd or _forces_ssd(request.forced)):
        raise RatelError("something was placed on SSD but no directory was given", field="ssd",
                         remedy="Give --ssd DIR on a fast drive")


def _forces_ssd(forced: Forced | None) -> bool:
    if forced is None or isinstance(forced, str):
        return forced == SSD
    check_forced(forced)
    return any(SSD in (choice if isinstance(choice, str) else choice.values()) for choice in forced.values())


def _check_budgets(request: Request, plan: Plan) -> None:
    error = _exceeded(request, plan)
    if error is not None:
        raise error


def _exceeded(request: Request, plan: Plan) -> RatelError | None:
    if request.gpu_budget is not None and plan.gpu_bytes > request.gpu_budget:
        return _short("gpu_memory", "GPU memory", request.gpu_budget, plan.gpu_bytes, plan.gpu_items,
                      "Give a larger --gpu-memory, a smaller --micro-batch or --seq-len, or --checkpoint-tier dram"
                      + ("; what backward needs of a block goes through DRAM already" if request.spill else ""))
    if plan.dram_bytes > request.dram_budget:
        remedy = "Give a larger --dram" if request.ssd_budget is not None else "Give a larger --dram, or --ssd DIR"
        return _short("dram", "DRAM", request.dram_budget, plan.dram_bytes, plan.host_items, remedy)
    if plan.ssd_bytes > (request.ssd_budget or 0):
        return _short("ssd", "SSD space", request.ssd_budget or 0, plan.ssd_bytes, plan.ssd_items,
                      "Free space, or add a directory to --ssd")
    return None


def _short(field: str, what: str, budget: int, needed: int, items: dict[str, int], remedy: str) -> RatelError:
    largest = sorted(items.items(), key=lambda pair: -pair[1])[:3]
    parts = ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in largest)
    return RatelError(f"{what} is short by {format_bytes(needed - budget)}: {format_bytes(needed)} needed, "
                      f"{format_bytes(budget)} allowed; the largest parts are {parts}", field=field,
                      value=format_bytes(budget), remedy=remedy)


def minimum_state_bytes(spec: ModelSpec) -> int:
    """Bytes of all states, wherever they go: 12 per trained parameter, 2 per frozen one."""
    return sum(EXACT["bf16"].num_bytes(u, p) for u in spec.units for p in PLANES)
