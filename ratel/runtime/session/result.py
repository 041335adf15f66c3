"""What one step tells its caller."""

from dataclasses import dataclass

from ratel.runtime.session.meter import Usage
from ratel.trace.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did. ``loss`` is the mean over target tokens; ``grad_norm`` is taken before
    clipping.

    ``seconds`` is wall time; ``bound_s`` the busy time of the busiest resource, named by
    ``bound_by``. A step whose gradients are not finite is ``skipped``: no state has changed.
    ``early_units`` were updated before the norm was known, ``redone_units`` of them again.
    ``timeline`` is that of a step that was traced.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    bound_s: float
    bound_by: str
    skipped: bool
    early_units: int
    redone_units: int
    usage: Usage
    timeline: Timeline | None = None
