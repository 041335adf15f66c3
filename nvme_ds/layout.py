"""How a volume is dealt to its directories: stripes in a repeating pattern that follows small
integer weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

MAX_CYCLE = 64
SHARE_TOLERANCE = 0.03  # a directory's share may differ this much, relatively, from its weight


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The smallest integers whose shares follow the weights (bandwidths, say) within
    SHARE_TOLERANCE, or the nearest ones of a cycle of MAX_CYCLE. Small integers are taken as they
    are."""
    if any(not weight > 0 for weight in weights):
        raise ValueError(f"weights: every directory needs a positive weight (given: {list(weights)})")
    if all(float(weight).is_integer() for weight in weights) and sum(weights) <= MAX_CYCLE:
        common = gcd(*map(int, weights))
        return [int(weight) // common for weight in weights]
    total = sum(weights)
    best, best_error = [1] * len(weights), float("inf")
    for cycle in range(len(weights), max(MAX_CYCLE, len(weights)) + 1):
        shares = [max(1, round(weight / total * cycle)) for weight in weights]
        error = max(abs(share / sum(shares) / (weight / total) - 1) for share, weight in zip(shares, weights))
        if error < best_error - 1e-12:
            best, best_error = shares, error
        if best_error <= SHARE_TOLERANCE:
            break
    common = gcd(*best)
    return [share // common for share in best]


def stripe_pattern(weights: Sequence[float]) -> list[int]:
    """The directory of each stripe of one cycle, every directory spread as evenly over it as its
    weight allows."""
    shares = integer_weights(weights)
    credit, pattern = [0] * len(shares), []
    for _ in range(sum(shares)):
        credit = [have + share for have, share in zip(credit, shares)]
        chosen = credit.index(max(credit))
        credit[chosen] -= sum(shares)
        pattern.append(chosen)
    return pattern


def file_sizes(num_bytes: int, stripe_bytes: int, pattern: Sequence[int]) -> list[int]:
    """Bytes of each directory's file. Only the last stripe of the volume may be partial."""
    full, rest = divmod(num_bytes, stripe_bytes)
    cycles, extra = divmod(full, len(pattern))
    sizes = [0] * (max(pattern) + 1)
    for position, index in enumerate(pattern):
        sizes[index] += (cycles + (position < extra)) * stripe_bytes
    sizes[pattern[extra]] += rest
    return sizes
