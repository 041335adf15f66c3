"""What a chunk of an update is told of its elements."""

import pytest

from ratel.planner.shape import ParamSpec, lay_out
from ratel.runtime.updates.jobs import decay_ranges

pytestmark = pytest.mark.unit


K = 1024
"""A multiple of what parameters are aligned to."""


@pytest.mark.parametrize("begin, end, expected", [
    (0, 10, [(6, 0.1), (10, 0.0)]),
    (0, 6, [(6, 0.1)]),
    (2, 6, [(4, 0.1)]),
    (2, 5, [(3, 0.1)]),
    (5, 10, [(1, 0.1), (5, 0.0)]),
    (6, 10, [(4, 0.0)]),
    (7, 10, [(3, 0.0)]),
])
def test_weight_decay_ends_where_the_matrices_do(begin: int, end: int, expected: list[tuple[int, float]]) -> None:
    """Relative to the chunk, and without empty ranges."""
    unit = lay_out(0, "block.0", "block", [ParamSpec(name="matrix", shape=(6, K)), ParamSpec(name="norm", shape=(4 * K,), decay=False)])
    assert unit.num_decay == 6 * K
    assert decay_ranges(unit, begin * K, end * K, 0.1) == [(stop * K, decay) for stop, decay in expected]
