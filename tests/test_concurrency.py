"""Waits that must end and bytes that must have arrived, in the corners that ordinary runs do not reach.

Also tested: every placement under random delays in test_placement.py; failures in test_failures.py; skipped steps in
test_nonfinite.py.
"""

from pathlib import Path

import pytest
import torch

from families_common import batches, build, loss_fn_of
from ratel.plan.plan import Buffers
from ratel.runtime.session import Session
from test_failures import SMALL, within

pytestmark = pytest.mark.numerics


def open_session(directory: Path, family: str = "llama", **options: object) -> Session:
    return Session(options.pop("model", None) or build(family), ssd=[directory], device="cpu", lr=1e-3,
                   loss_fn=loss_fn_of(family), **{"micro_batch": 2, **options})


def train(session: Session, steps: list[dict]) -> tuple[list[float], dict[str, torch.Tensor]]:
    with within():
        losses = [session.step(batch).loss for batch in steps]
        states = session.state_dict()
    return losses, states


def assert_same(one: tuple, other: tuple) -> None:
    assert one[0] == other[0], "losses differ"
    different = [name for name in one[1] if not torch.equal(one[1][name], other[1][name])]
    assert not different, f"states differ: {different[:5]}"


@pytest.mark.parametrize("checkpoint_tier", ["dram", "ssd"])
def test_a_batch_of_fewer_micro_batches_than_planned(checkpoint_tier: str, ssd_dir: Path) -> None:
    """The last batch of a data set is smaller; nobody must wait for the checkpoints that it does not have."""
    steps = [batches("llama", 1, rows=rows, seed=rows)[0] for rows in (4, 2, 3, 1, 4)]
    results = []
    for options in (dict(tier="dram", checkpoint_tier="gpu"),
                    dict(tier="ssd", checkpoint_tier=checkpoint_tier, buffers=SMALL)):
        with open_session(ssd_dir, **options) as session:
            results.append(train(session, steps))
            with within():
                session.evaluate(steps[1:])
    assert_same(*results)


@pytest.mark.parametrize("checkpoint_tier", ["gpu", "dram"])
def test_eager_with_fewer_slots_in_dram_than_on_the_gpu(checkpoint_tier: str, ssd_dir: Path) -> None:
    """Blocks held over the turn keep their DRAM copies for their updates; those behind must not need them to go on."""
    eager = dict(optimizer="eager", max_grad_norm=0)
    steps = batches("llama", 2)
    with open_session(ssd_dir, tier="dram", **eager) as session:
        expected = train(session, steps)
    for weight_slots, host_weight_slots in ((2, 1), (4, 1), (4, 3)):
        buffers = Buffers(weight_slots=weight_slots, host_weight_slots=host_weight_slots, chunk_elements=2048)
        for placement in ({"*": "ssd"}, {"*": "ssd", "block.1": "dram"}, {"*": "ssd", "block.2": "gpu"}):
            with open_session(ssd_dir, placement=placement, buffers=buffers, checkpoint_tier=checkpoint_tier,
                              **eager) as session:
                assert_same(train(session, steps), expected)
