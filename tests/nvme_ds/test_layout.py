"""The stripe layout: pure arithmetic, checked against a walk over the stripes."""

import pytest

from nvme_ds.layout import file_sizes, integer_weights, stripe_pattern

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("weights, expected", [
    ([1], [1]), ([5.0], [1]), ([1, 1, 1], [1, 1, 1]), ([8, 7], [8, 7]), ([2, 1], [2, 1]), ([4, 2], [2, 1]),
    ([6.8e9, 3.4e9, 1.7e9], [4, 2, 1]), ([1000, 1], [64, 1]),
])
def test_weights_become_small_integers(weights: list[float], expected: list[int]) -> None:
    assert integer_weights(weights) == expected


@pytest.mark.parametrize("weights", [[7.1, 5.3, 3.9], [1.45, 1.02], [3, 5, 7, 11]])
def test_shares_follow_the_weights(weights: list[float]) -> None:
    shares = integer_weights(weights)
    for share, weight in zip(shares, weights):
        assert share / sum(shares) == pytest.approx(weight / sum(weights), rel=0.031)


@pytest.mark.parametrize("weights", [[0, 1], [-1, 2], [float("nan")]])
def test_weights_must_be_positive(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive weight"):
        integer_weights(weights)


def test_the_pattern_is_interleaved() -> None:
    pattern = stripe_pattern([4, 2, 1])
    assert sorted(pattern) == [0, 0, 0, 0, 1, 1, 2]
    doubled = pattern + pattern
    gaps = [b - a for a, b in zip(*[[i for i, d in enumerate(doubled) if d == 1][k:] for k in (0, 1)])]
    assert max(gaps) <= 5 and min(gaps) >= 2, "the stripes of one directory lie in a clump"


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 2, 1]])
@pytest.mark.parametrize("num_bytes", [4096, 65536, 65536 * 6, 65536 * 7 + 4096, 65536 * 13 - 4096])
def test_file_sizes_hold_every_stripe(weights: list[float], num_bytes: int) -> None:
    stripe_bytes, pattern = 65536, stripe_pattern(weights)
    expected = [0] * len(weights)
    for number, begin in enumerate(range(0, num_bytes, stripe_bytes)):
        expected[pattern[number % len(pattern)]] += min(stripe_bytes, num_bytes - begin)
    assert file_sizes(num_bytes, stripe_bytes, pattern) == expected
