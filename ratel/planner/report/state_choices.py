"""What storing states otherwise would bring: the same work planned again in each format."""

from dataclasses import dataclass, replace

from ratel.errors import RatelError
from ratel.planner.formats import EXACT_NAME, FORMATS, StateFormats
from ratel.planner.machine.hardware import Hardware
from ratel.planner.plan import Plan
from ratel.planner.search.micro_batches import Planned
from ratel.planner.search.request import Request
from ratel.planner.search.search import search

EFFECTS = {EXACT_NAME: "the textbook's AdamW", "bf16": "moments rounded stochastically, right on average; weights exact",
           "8bit": "moments rounded stochastically to 8 bits in blocks of 128; weights exact"}
"""What a format changes in the result."""


@dataclass(frozen=True, kw_only=True)
class StateChoice:
    states: str
    """As ``--states`` takes it."""
    param_bytes: float
    """Bytes of the states of one trained parameter."""
    state_bytes: int
    """Bytes of everything that is trained."""
    step_s: float | None
    """None: it does not fit with any of these micro-batches."""
    tokens_per_s: float | None
    problem: str | None
    """Why it does not fit."""
    effect: str


def compare_states(chosen: Planned, hardware: Hardware) -> list[StateChoice]:
    """One for each format, with the micro-batches that the plan was chosen from."""
    return [_choice(name, chosen, hardware) for name in FORMATS]


def in_formats(request: Request, states: str) -> Request:
    """The same, with states that are stored so."""
    return replace(request, formats=FORMATS[states][request.formats.compute.name], options=replace(request.options, states=states))


def _choice(states: str, chosen: Planned, hardware: Hardware) -> StateChoice:
    if states == chosen.plan.formats.name:
        return _described(chosen.plan.formats, chosen.plan, chosen.prediction.step_s, chosen.prediction.tokens_per_s)
    changed = [in_formats(request, states) for request in chosen.choices]
    try:
        found = search(changed, hardware)
    except RatelError as error:
        formats = changed[0].formats
        return replace(_described(formats, replace(chosen.plan, formats=formats), None, None), problem=str(error))
    return _described(found.plan.formats, found.plan, found.prediction.step_s, found.prediction.tokens_per_s)


def _described(formats: StateFormats, plan: Plan, step_s: float | None, tokens_per_s: float | None) -> StateChoice:
    return StateChoice(states=formats.name, param_bytes=formats.trained_bytes - formats.encoding("g").num_bytes(1),
                       state_bytes=plan.state_bytes, step_s=step_s, tokens_per_s=tokens_per_s, problem=None, effect=EFFECTS[formats.name])
