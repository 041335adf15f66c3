"""How many stripes each directory gets by turns: small integers that follow the drives' speeds."""

from collections.abc import Sequence

ALIKE = 1.15
"""Rates within this ratio are taken to be equal: measurements of one drive differ by as much from
day to day."""
MOST_STRIPES = 16
"""The most stripes in one round. More follow the speeds more closely, and bring less than the
measurements are good for."""
NEARLY = 0.97
"""The shortest round is taken that gives this share of what the drives could do together."""

Weights = tuple[int, ...]


def stripe_weights(rates_bps: Sequence[float]) -> Weights:
    """Equal drives get equal shares; else the fewest stripes whose slowest part is nearly as fast
    as all drives together."""
    if not rates_bps or max(rates_bps) <= ALIKE * min(rates_bps):
        return (1,) * len(rates_bps)
    most = max(MOST_STRIPES, 2 * len(rates_bps))
    choices = [_shares(rates_bps, total) for total in range(len(rates_bps), most + 1)]
    best_bps = max(striped(rates_bps, weights) for weights in choices)
    return next(weights for weights in choices if striped(rates_bps, weights) >= NEARLY * best_bps)


def striped(amounts: Sequence[float], weights: Weights) -> float:
    """What all directories give together, from the rates or free bytes of each: the one that is
    exhausted first ends it."""
    return min(amount / weight for amount, weight in zip(amounts, weights, strict=True)) * sum(weights)


def _shares(rates_bps: Sequence[float], total: int) -> Weights:
    """``total`` stripes dealt out one by one, each to the drive that would be done with it first;
    one to each before."""
    weights = [1] * len(rates_bps)
    while sum(weights) < total:
        done = [(weight + 1) / rate for weight, rate in zip(weights, rates_bps)]
        weights[done.index(min(done))] += 1
    return tuple(weights)
