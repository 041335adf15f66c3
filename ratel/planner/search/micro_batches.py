"""The search over sizes of micro-batches: which are worth planning with, and the best plan for any
of them.

Whoever plans says what is known of each size: a session has tried the blocks out with it
(`ratel.runtime.planning.prepare`), `ratel plan` has counted (`ratel.runtime.planning.planner`).
"""

import logging
from dataclasses import dataclass
from typing import Protocol

from ratel.errors import RatelError
from ratel.planner.activation_policy import AUTO, SPILL
from ratel.planner.forecast.cost import Prediction
from ratel.planner.machine.hardware import Hardware
from ratel.planner.plan import Plan
from ratel.planner.search.choose import choose
from ratel.planner.search.options import SessionOptions
from ratel.planner.search.request import Budgets, Request
from ratel.planner.search.search import search
from ratel.trace import phases

log = logging.getLogger(__name__)

SATURATING_TOKENS = 16384
"""Tokens of a micro-batch beyond which larger ones gain less than their memory is worth elsewhere.
On an H200 with 3.0 B parameters and batch 32: 1.85 s a step with 8192 tokens, 1.80 s with 16384,
1.83 s with 32768 (evaluation_data.md)."""

COMPARED = 3
"""Sizes, from the largest that makes sense downwards, of which the one with the shortest step is
taken."""

class Requests(Protocol):
    """What is asked of a step of ``rows`` rows of ``positions``, and known of it, by sizes of
    micro-batches."""

    options: SessionOptions
    budgets: Budgets
    rows: int
    positions: int
    on_host: bool
    """The device is the CPU."""

    def request(self, micro_rows: int, spills: bool) -> Request | None:
        """``spills``: what second runs save goes through DRAM. None: a block does not fit on the
        GPU with so many rows."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    plan: Plan
    prediction: Prediction | None
    """What a step takes, where the plan was made with a machine's rates."""
    choices: tuple[Request, ...] = ()
    """What it was chosen from."""


def micro_sizes(rows: int, positions: int) -> list[int]:
    """Rows of a micro-batch, from about the smallest that saturates a GPU down to one: each step
    makes twice as many micro-batches. The last one of a step may be smaller than the others, so
    that any number of rows can be split."""
    count, sizes = max(1, rows * positions // SATURATING_TOKENS), []
    while not sizes or sizes[-1] > 1:
        sizes.append(-(-rows // min(count, rows)))
        count *= 2
    return sizes


def may_spill(options: SessionOptions) -> bool:
    """Unasked."""
    return options.activations == AUTO and not options.compiles


def best_plan(requests: Requests, hardware: Hardware | None, before: int | None = None) -> Planned:
    """The best plan of a few sizes of micro-batches, smaller ones only where none fits, and at last
    the smallest with what its second runs save in DRAM. ``hardware`` None: by the simple rule.
    ``before``: rows of a micro-batch in the run that is continued, since with others its sums would
    round otherwise.

    Raises RatelError that says which budget is short, and by how much.
    """
    options, sizes = requests.options, _sizes(requests)
    smaller_may_fit = ("gpu_memory", "dram") if requests.on_host else ("gpu_memory",)
    for group in _groups(sizes, 1 if hardware is None else COMPARED, before if options.micro_batch == AUTO else None):
        try:
            return _plan_for(requests, group, hardware, spills=options.activations == SPILL)
        except RatelError as error:
            failure = error
            if error.field not in smaller_may_fit:
                raise
            if group == [before]:
                log.warning("micro-batches of %d, as before, do not fit any more: with others sums round otherwise", before)
    if may_spill(options) and failure.field == "gpu_memory":
        return _plan_for(requests, sizes[-1:], hardware, spills=True)
    raise failure


def _sizes(requests: Requests) -> list[int]:
    """Those to try: the one given, or from about the smallest that saturates the GPU down to one
    row."""
    given = requests.options.micro_batch
    if given == AUTO:
        return micro_sizes(requests.rows, requests.positions)
    if not 1 <= given <= requests.rows:
        raise RatelError(f"must be between 1 and the {requests.rows} rows of a batch", field="micro_batch", value=given)
    return [given]


def _groups(sizes: list[int], together: int, before: int | None) -> list[list[int]]:
    groups = [sizes[begin : begin + together] for begin in range(0, len(sizes), together)]
    return groups if before is None else [[before], *groups]


def _plan_for(requests: Requests, sizes: list[int], hardware: Hardware | None, *, spills: bool) -> Planned:
    """The best plan with one of these micro-batches."""
    found = [request for request in (requests.request(size, spills) for size in sizes) if request is not None]
    if not found:
        raise RatelError(f"a micro-batch of {sizes[-1]} does not pass a block within the budget"
                         + (", though what backward needs of it goes through DRAM" if spills else ""), field="gpu_memory",
                         value=requests.budgets.gpu, remedy="Give a larger --gpu-memory or a smaller --seq-len")
    if hardware is None:
        return Planned(plan=choose(found[0]), prediction=None, choices=tuple(found))
    with phases.phase("search for a plan"):
        chosen = search(found, hardware)
    return Planned(plan=chosen.plan, prediction=chosen.prediction, choices=tuple(found))
