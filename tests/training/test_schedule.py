"""The learning rate against closed forms and against the schedules people compare with."""

import math

import pytest
import torch

from ratel.training.schedule import make_schedule

LR, MIN_LR, STEPS, WARMUP = 3e-4, 3e-5, 50, 7

pytestmark = pytest.mark.unit


def closed_form(kind: str, step: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / (STEPS - WARMUP)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]
    return MIN_LR + (LR - MIN_LR) * share


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_closed_form(kind: str) -> None:
    schedule = make_schedule(kind, lr=LR, steps=STEPS, warmup_steps=WARMUP, min_lr=MIN_LR)
    for step in range(STEPS):
        assert schedule(step) == pytest.approx(closed_form(kind, step), rel=1e-12)


def scheduler_rates(make) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, rates = make(optimizer), []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_equals_hugging_face(kind: str) -> None:
    from transformers import get_scheduler

    theirs = scheduler_rates(lambda o: get_scheduler(kind, o, num_warmup_steps=WARMUP, num_training_steps=STEPS))
    schedule = make_schedule(kind, lr=LR, steps=STEPS, warmup_steps=WARMUP)
    assert [schedule(step) for step in range(WARMUP, STEPS)] == pytest.approx(theirs[WARMUP:], rel=1e-9)


def test_cosine_equals_torch() -> None:
    theirs = scheduler_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=MIN_LR))
    schedule = make_schedule("cosine", lr=LR, steps=STEPS, min_lr=MIN_LR)
    assert [schedule(step) for step in range(STEPS)] == pytest.approx(theirs, rel=1e-9)


def test_first_step_learns_and_nothing_falls_below_the_minimum() -> None:
    schedule = make_schedule("cosine", lr=LR, steps=STEPS, warmup_steps=WARMUP, min_lr=MIN_LR)
    assert schedule(0) > 0
    assert all(schedule(step) >= MIN_LR for step in range(STEPS, STEPS + 5))


def test_warmup_may_take_every_step() -> None:
    schedule = make_schedule("linear", lr=LR, steps=5, warmup_steps=5)
    assert [schedule(step) for step in range(5)] == pytest.approx([LR * k / 6 for k in range(1, 6)])
