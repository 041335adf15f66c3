"""A GPU's rate and a step's overhead out of steps that somebody has measured on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ratel.errors import RatelError
from ratel.planner.forecast.cost import predict
from ratel.planner.machine.hardware import Hardware
from ratel.planner.plan import Plan
from ratel.planner.pricing.fit import Points, fit, left_out_errors, root_mean_square
from ratel.reading import JsonError, read_json
from ratel.schema import SchemaError, check, listing, number, record, whole

_MEASURED = listing(record({"batch": whole(1, 1 << 31), "length": whole(1, 1 << 31), "seconds": number(0, 1e9, above=True)}), least=2)
_REMEDY = 'Write [{"batch": 8, "length": 512, "seconds": 1.9}, ...], two steps at least'


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One step: rows, tokens of each, padding included."""

    batch: int
    length: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a step's computation consists of: ``flops`` take what the GPU's rate makes of them,
    ``other_s`` is set by its memory."""

    flops: float
    other_s: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``error``: by how much the measured points are missed where each is predicted from the
    others, relative; None where there are too few for that."""

    overhead_s: float
    gpu_flops: float
    num_points: int
    error: float | None

    def of(self, hardware: Hardware) -> Hardware:
        """The machine with the rate that was found. What small micro-batches lose is in the
        overhead."""
        return replace(hardware, gpu_flops=self.gpu_flops, gpu_half_tokens=0,
                       source=f"fitted: to {self.num_points} measured steps; the rest {hardware.source}")


def read_measured(path: str | Path) -> list[Measured]:
    """Raises RatelError for a file that is not as `_REMEDY` says."""
    try:
        return [Measured(**point) for point in check(read_json(path), _MEASURED)]
    except OSError as error:
        raise RatelError(f"cannot be read: {error.strerror}", field="--fit", value=path, remedy=_REMEDY) from error
    except (JsonError, SchemaError) as error:
        raise RatelError(str(error), field="--fit", value=path, remedy=_REMEDY) from None


def step_work(plan: Plan, hardware: Hardware) -> StepWork:
    """By predicting the step at two rates of the GPU: the planner knows what a step computes, and
    nothing here does so again."""
    saturated = replace(hardware, gpu_half_tokens=0)
    once, twice = (predict(plan, replace(saturated, gpu_flops=times * hardware.gpu_flops)).busy_s["compute"] for times in (1, 2))
    return StepWork(flops=2 * hardware.gpu_flops * (once - twice), other_s=2 * twice - once)


def calibrate(works: Sequence[StepWork], seconds: Sequence[float]) -> Calibration:
    """``seconds``: measured, of each step. Raises RatelError for steps that do not take longer the
    more they compute."""
    net = tuple(max(each - work.other_s, each / 100) for work, each in zip(works, seconds))
    points = Points(terms=tuple((1.0, work.flops) for work in works), seconds=net, work=net)
    overhead_s, flop_s = fit(points)
    if overhead_s < 0:  # within the noise of the points there is none
        points = replace(points, terms=tuple((work.flops,) for work in works))
        overhead_s, flop_s = 0.0, *fit(points)
    if flop_s <= 0:
        raise RatelError("larger steps do not take longer in it, so it says nothing of the GPU's rate", field="--fit",
                         remedy="Measure steps that computation binds, with batches or lengths that differ by a factor of two and more")
    errors = left_out_errors(points)
    return Calibration(overhead_s=overhead_s, gpu_flops=1 / flop_s, num_points=len(works),
                       error=root_mean_square([*errors.values()]) if errors else None)
