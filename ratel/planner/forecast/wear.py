"""What a run writes to its SSDs, and how long they last."""

from collections.abc import Sequence
from dataclasses import dataclass

from ratel.errors import RatelError
from ratel.planner.forecast.cost import Prediction
from ratel.planner.machine.stripes import Weights, striped
from ratel.planner.plan import Plan
from ratel.units import parse_bytes

DAY_S = 86400.0
YEAR_DAYS = 365.25


@dataclass(frozen=True, kw_only=True)
class Wear:
    """Bytes written to all SSDs together. What is not known is None."""

    step_bytes: int
    """Bytes of a step with the share of a save that it has, where saves go to the SSDs."""
    day_bytes: float
    """Bytes of a day of training without a pause."""
    drive_writes_per_day: float | None
    """How often the drive that is written most for its size is written from end to end."""
    years: float | None
    """Years of training without a pause until the rated endurance of the first drive is used up."""


def wear(plan: Plan, prediction: Prediction, *, weights: Weights, capacities: Sequence[int] = (),
         endurance_bytes: float | None = None, save_every: int = 0) -> Wear:
    """``weights``: the drives' shares of the stripes; ``capacities``: bytes of each drive, where
    they are known; ``endurance_bytes`` as one drive is rated; ``save_every`` steps states are
    saved, which writes to these SSDs where they are committed in place."""
    saves = plan.save_bytes // save_every if plan.commits and save_every else 0
    step_bytes = prediction.ssd_written + saves
    day_bytes = step_bytes * DAY_S / prediction.step_s
    capacity_bytes = striped(capacities, weights) if capacities else None
    rated = endurance_bytes and striped([endurance_bytes] * len(weights), weights)
    return Wear(step_bytes=step_bytes, day_bytes=day_bytes,
                drive_writes_per_day=day_bytes / capacity_bytes if capacity_bytes else None,
                years=rated / day_bytes / YEAR_DAYS if rated and day_bytes else None)


def parse_endurance(text: str, field: str = "--endurance") -> float:
    """Bytes of ``3500TBW`` or ``3.5PBW`` as data sheets write it: a million million bytes each, or
    a thousand of these."""
    number = text.strip().upper().removesuffix("W")
    if number.replace(".", "", 1).isdigit():
        raise RatelError("has no unit", field=field, value=text, remedy=f"Write the unit: {text.strip()}TBW")
    factor = 1000 if number.endswith("PB") else 1
    try:
        endurance = parse_bytes(number[:-2] + "TB" if number.endswith("PB") else number, field=field) * factor
    except RatelError as error:
        raise RatelError("not an endurance", field=field, value=text, remedy="Write it like 3500TBW") from error
    if endurance <= 0:
        raise RatelError("must be above 0", field=field, value=text, remedy="Write it like 3500TBW")
    return float(endurance)
