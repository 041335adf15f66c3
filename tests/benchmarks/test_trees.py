"""The comparison of two trees: a session tells the same twice, and what differs is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.exactness import trees

pytestmark = pytest.mark.numerics
ONE = "llama, dtype=bf16, tier=ssd, optimizer=speculative, max_grad_norm=0.001"


def test_every_session_has_a_name_of_its_own() -> None:
    names = [case.name for case in trees.cases()]
    assert len(set(names)) == len(names) > 100 and ONE in names


def test_a_tree_is_equal_to_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.exactness.trees", ".", ".", "--only", ONE], cwd=trees.HERE.parents[2],
                          stdout=subprocess.PIPE, text=True)
    assert json.loads(done.stdout) == {"sessions": 1, "equal": 1, "different": [], "refused": {}} and done.returncode == 0


def test_a_seed_changes_what_dropout_leaves(tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        place = tmp_path / str(number)
        place.mkdir()
        case = trees.Case(family="gpt2 with dropout", options={"dtype": "fp32", "tier": "dram", "seed": seed})
        digests.append(trees.digest_of(case, place))
    assert digests[0] == digests[1] != digests[2]


def test_differences_and_refusals_are_named() -> None:
    one = {"a": {"digest": "1"}, "b": {"digest": "2"}, "c": {"refused": "no such option"}}
    other = {"a": {"digest": "1"}, "b": {"digest": "3"}, "c": {"digest": "4"}}
    assert trees.compared(one, other) == {"sessions": 2, "equal": 1, "different": ["b"], "refused": {"c": ["no such option", None]}}
