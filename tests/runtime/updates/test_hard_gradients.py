"""Gradients that moments in few bits might not bear: tiny, seldom, with spikes, and with updates
below the resolution of bf16."""

import pytest
import torch

from ratel.native import op_ds
from ratel.planner.formats import FORMATS
from ratel.runtime.updates.arithmetic import UPDATES
from ratel.store.encodings import DTYPES
from tests.runtime.updates.test_rounded_states import of_each

pytestmark = pytest.mark.numerics


def trained(states: str, gradients: list[torch.Tensor], weights: torch.Tensor, lr: float) -> list[torch.Tensor]:
    """Masters after each of the updates, all of one vector."""
    formats, n = FORMATS[states]["fp32"], len(weights)
    planes = {name: torch.zeros(encoding.place(n), dtype=DTYPES[encoding.name])
              for name, encoding in ((row.plane, row.encoding) for row in formats.rows) if name != "g"}
    masters = []
    with op_ds.Pool(2) as pool:
        pool.split(weights.data_ptr(), planes["hi"].data_ptr(), planes["lo"].data_ptr(), n)
        for step, grad in enumerate(gradients, start=1):
            given = {**planes, "g": grad}
            UPDATES[formats.update].in_memory(pool, given, given, lr=lr, beta1=0.9, beta2=0.999, eps=1e-15, step=step,
                                              rounding=op_ds.Rounding(key=op_ds.rounding_key(0, step, 0)))
            masters.append(torch.empty(n))
            pool.merge(planes["hi"].data_ptr(), planes["lo"].data_ptr(), masters[-1].data_ptr(), n)
    return masters


def moved(masters: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    return (masters[-1].double() - weights.double()).abs()


N = 4096


def directions(step: int) -> torch.Tensor:
    """A gradient with a trend in each element, and noise."""
    rng = torch.Generator().manual_seed(1000 + step)
    return torch.linspace(0.2, 2.0, N) + torch.randn(N, generator=rng)


@of_each
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e3])
def test_gradients_of_any_size_train_as_exact_states_do(scale: float, states: str) -> None:
    """AdamW does not see their scale; squares of tiny ones are far below what fp16 can hold."""
    weights, gradients = torch.zeros(N), [scale * directions(step) for step in range(200)]
    exact, short = (moved(trained(name, gradients, weights, 1e-3), weights) for name in ("exact", states))
    assert exact.min() > 0 and (short / exact).mean().item() == pytest.approx(1, abs=0.01)
    assert ((short / exact) - 1).std() < 0.1


@of_each
def test_updates_below_the_resolution_of_bf16_add_up(states: str) -> None:
    """At a learning rate of 1e-6 a weight of 1 moves by a four-thousandth of bf16's step there; the
    lower half takes it."""
    weights, gradients = torch.ones(N), [directions(step) for step in range(300)]
    masters = trained(states, gradients, weights, 1e-6)
    exact = moved(trained("exact", gradients, weights, 1e-6), weights)
    assert (masters[0] != 1).all() and (masters[0].bfloat16() == 1).all()
    assert (moved(masters, weights) / exact).mean().item() == pytest.approx(1, abs=0.01) and exact.mean() > 1e-4


@of_each
def test_rows_that_are_seldom_touched(states: str) -> None:
    """An embedding has them: a gradient in one step of a hundred, zeros in between, in which moments
    decay and do not stay."""
    weights = torch.zeros(N)
    gradients = [directions(step) if step % 100 == 0 else torch.zeros(N) for step in range(400)]
    exact, short = (moved(trained(name, gradients, weights, 1e-3), weights) for name in ("exact", states))
    spread = {"bf16": 0.15, "8bit": 0.4}[states]  # of single weights; on average they move as far
    assert (short / exact).mean().item() == pytest.approx(1, abs=0.02) and ((short / exact) - 1).std() < spread


@of_each
def test_a_spike_is_forgotten_at_the_same_pace(states: str) -> None:
    """A gradient a thousand times as large as the others holds the step back for as long as the
    second moment remembers it."""
    weights = torch.zeros(N)
    gradients = [directions(step) * (1000 if step == 50 else 1) for step in range(600)]
    results = {name: trained(name, gradients, weights, 1e-3) for name in ("exact", states)}
    for begin, end in ((0, 49), (60, 300), (300, 599)):
        exact, short = ((masters[end] - masters[begin]).double().norm() for masters in results.values())
        assert short.item() == pytest.approx(exact.item(), rel={"bf16": 0.03, "8bit": 0.1}[states]), (begin, end)
    assert all(torch.isfinite(masters[-1]).all() for masters in results.values())
