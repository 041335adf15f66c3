"""Constants from measured points: seconds are a sum of what a step does, each times a constant.

The only constants that a machine needs are a step's overhead and the rate that its GPU attains. The
error that is made small is one of rates (work / seconds), as a relative one of seconds weighs the
same in small and large steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from ratel.errors import RatelError

Matrix = Sequence[Sequence[float]]
_STEPS, _ENOUGH = 50, 1e-12


@dataclass(frozen=True, kw_only=True)
class Points:
    """``terms``: by point what each constant is multiplied with. ``work``: what is done in those
    ``seconds``, such as rows; with the seconds themselves errors are relative ones."""

    terms: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]
    work: tuple[float, ...]

    def without(self, index: int) -> "Points":
        return Points(terms=_left_out(self.terms, index), seconds=_left_out(self.seconds, index), work=_left_out(self.work, index))

    def rates(self, constants: Sequence[float]) -> list[float]:
        """Predicted."""
        return [work / _sum(terms, constants) for terms, work in zip(self.terms, self.work)]

    def errors(self, constants: Sequence[float]) -> list[float]:
        """Rates as predicted less those measured."""
        return [rate - work / seconds for rate, work, seconds in zip(self.rates(constants), self.work, self.seconds)]


class UndeterminedError(RatelError):
    """More than one set of constants gives the measured points."""


def fit(points: Points) -> tuple[float, ...]:
    """The constants with the least squared error of rates, by Gauss and Newton from the best of
    seconds. Raises UndeterminedError for points that do not say what each constant is."""
    weights = [work / seconds ** 2 for work, seconds in zip(points.work, points.seconds)]
    constants = least_squares([[weight * term for term in terms] for terms, weight in zip(points.terms, weights)],
                              [weight * seconds for weight, seconds in zip(weights, points.seconds)])
    for _ in range(_STEPS):
        seconds = [_sum(terms, constants) for terms in points.terms]
        slopes = [[-work * term / found ** 2 for term in terms] for terms, work, found in zip(points.terms, points.work, seconds)]
        step = least_squares(slopes, [-error for error in points.errors(constants)])
        constants = tuple(constant + change for constant, change in zip(constants, step))
        if max(abs(change) for change in step) <= _ENOUGH * max(map(abs, constants)):
            break
    return constants


def left_out_errors(points: Points) -> dict[int, float]:
    """By point the error of its rate, predicted from all the others; of those that the others can
    predict. The only point with all experts in use is not one of them."""
    errors = {}
    for index in range(len(points.seconds)):
        try:
            constants = fit(points.without(index))
        except UndeterminedError:
            continue
        errors[index] = points.errors(constants)[index]
    return errors


def root_mean_square(errors: Sequence[float]) -> float:
    return sqrt(sum(error ** 2 for error in errors) / len(errors))


def least_squares(rows: Matrix, targets: Sequence[float]) -> tuple[float, ...]:
    """What ``rows`` are to be multiplied with to come nearest to ``targets``, by the normal
    equations: two or three unknowns. Columns are scaled first, as FLOPs and seconds lie 15 powers
    of ten apart. Raises UndeterminedError where there is more than one answer."""
    width = len(rows[0]) if rows else 0
    scales = [sqrt(sum(row[column] ** 2 for row in rows)) or 1.0 for column in range(width)]
    scaled = [[value / scale for value, scale in zip(row, scales)] for row in rows]
    system = [[sum(row[i] * row[j] for row in scaled) for j in range(width)]
              + [sum(row[i] * target for row, target in zip(scaled, targets))] for i in range(width)]
    return tuple(value / scale for value, scale in zip(_solved(system), scales))


def _solved(system: list[list[float]]) -> list[float]:
    """Gauss and Jordan, with the largest pivot."""
    size = len(system)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(system[row][column]))
        if abs(system[pivot][column]) < 1e-10:
            raise UndeterminedError("the measured points differ too little to say what a step costs and what its work costs", field="--fit",
                             remedy="Measure at least three points, with batches or lengths that differ by a factor of two and more")
        system[column], system[pivot] = system[pivot], system[column]
        system[column] = [value / system[column][column] for value in system[column]]
        for row in range(size):
            if row != column:
                system[row] = [value - system[row][column] * above for value, above in zip(system[row], system[column])]
    return [row[-1] for row in system]


def _sum(terms: Sequence[float], constants: Sequence[float]) -> float:
    return sum(term * constant for term, constant in zip(terms, constants))


def _left_out(values: tuple, index: int) -> tuple:
    return values[:index] + values[index + 1:]
