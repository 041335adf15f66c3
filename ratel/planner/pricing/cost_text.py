"""What runs cost as a table that a person understands."""

from collections.abc import Iterable, Sequence

from ratel.planner.pricing.run_cost import PADDED, RunCost
from ratel.units import format_seconds

_HEAD = ("GPU", "trains", "states", "rows", "tokens wide", "padding", "batch", "largest", "step", "steps", "hours", "dollars", "bound by",
         "rests on")
_NAMES = {"compute": "GPU", "h2d": "link to the GPU", "d2h": "link from the GPU", "cpu optimizer": "CPU optimizer", "dram": "DRAM",
          "ssd": "SSDs"}


def describe_costs(costs: Sequence[RunCost], notes: Iterable[str]) -> str:
    """The table, the cheapest and the fastest of its lines, where prices are from, and notes."""
    return "\n".join([*_table([_HEAD, *map(_row, costs)]), "", *_best(costs), *_energy(costs), *_prices(costs), *_problems(costs),
                      *(f"note: {note}" for note in notes)])


def _row(cost: RunCost) -> tuple[str, ...]:
    step = cost.step
    return (cost.rented.name, cost.trains, cost.states, cost.epoch.form, f"{cost.epoch.row_tokens:,.0f}", f"{cost.epoch.padding:.0%}",
            str(cost.batch), f"{cost.largest_batch:,}", format_seconds(step.seconds) if step else "does not fit", f"{cost.steps:,}",
            _amount(cost.hours), _amount(cost.dollars),
            _NAMES[step.bound_by] if step else "", cost.basis)


def _amount(value: float | None) -> str:
    """To the cent; of less than one as many digits."""
    return "" if value is None else f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns in which every line has the same are left out of it, and said once above."""
    columns = [column for column in zip(*rows) if len(set(column[1:])) > 1 or column[0] not in ("trains", "states", "rows", "batch")]
    same = [f"{column[0]} {column[1]}" for column in zip(*rows) if column not in columns]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths))).rstrip()
             for row in zip(*columns)]
    return [*([f"{', '.join(same)}:", ""] if same else []), *lines]


def _best(costs: Sequence[RunCost]) -> list[str]:
    priced = [cost for cost in costs if cost.dollars is not None]
    timed = [cost for cost in costs if cost.hours is not None]
    lines = []
    if len(priced) > 1:
        cheapest = min(priced, key=lambda cost: cost.dollars)
        lines.append(f"cheapest: {_named(cheapest)}, ${_amount(cheapest.dollars)}")
    if len(timed) > 1:
        fastest = min(timed, key=lambda cost: cost.hours)
        lines.append(f"fastest: {_named(fastest)}, {_amount(fastest.hours)} hours")
    return lines


def _named(cost: RunCost) -> str:
    trained = "" if cost.trains == "all" else f", {cost.trains}"
    return f"{cost.rented.name} with {cost.epoch.form} rows and {cost.states} states{trained}"


def _energy(costs: Sequence[RunCost]) -> list[str]:
    most = {cost.rented.name: max(other.kwh for other in costs if other.rented is cost.rented and other.kwh is not None)
            for cost in costs if cost.kwh is not None}
    return [f"energy: {name} at most {kwh:,.1f} kWh" for name, kwh in most.items()]


def _prices(costs: Sequence[RunCost]) -> list[str]:
    by_name = {cost.rented.name: cost.rented.price for cost in costs}
    priced = [f"price: {name} ${price.dollars_per_hour:.2f}/h as of {price.as_of}, {price.source}"
              for name, price in by_name.items() if price is not None]
    unpriced = [name for name, price in by_name.items() if price is None]
    return [*priced, *([f"price: none is known of {', '.join(unpriced)}; give --price FILE"] if unpriced else [])]


def _problems(costs: Sequence[RunCost]) -> list[str]:
    lines = [f"{_named(cost)}: {cost.problem}" for cost in costs if cost.problem]
    if any(cost.epoch.form == PADDED for cost in costs):
        lines.append("note: padded rows are as wide as the longest of a batch is on average; there is memory for the longest of all")
    return lines
