"""`benchmarks/speed/before_after.py`: both checkouts are measured in turns, and a slower one is
seen in the table."""

import pytest

from benchmarks.speed import before_after
from benchmarks.tables.target_tables import target_lines

pytestmark = pytest.mark.unit


def test_medians_and_ratio_of_what_did_not_fail() -> None:
    points = [{"name": "batch 8", "tree": tree, "step_s": s} for tree, s in
              (("before", 1.0), ("after", 1.5), ("after", 1.7), ("before", 3.0), ("before", 2.0), ("after", 1.6))]
    points += [{"name": "batch 32", "tree": "before", "step_s": 1.0}, {"name": "batch 32", "tree": "after", "error": "full\nno room"}]
    steps = before_after.summarize(points, "step_s")
    assert list(steps) == ["batch 8"] and steps["batch 8"]["ratio"] == pytest.approx(1.6 / 2.0)
    text = "\n".join(target_lines("change", {"points": points, "steps": steps, "before_commit": "a" * 40, "commit": None}))
    assert "| batch 8 | 3 | 2.000 | 1.600 | 0.800 |" in text and "batch 32, after | failed: no room" in text
    assert "aaaaaaaaaa, s | not known, s" in text


def test_no_checkout_is_always_first() -> None:
    assert {before_after.in_turn(number)[0] for number in range(4)} == {"before", "after"}
