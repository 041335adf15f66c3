"""A loss or gradient that is not finite leaves no trace: the step is skipped and reported, every
state bit stays."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ratel.errors import NonFiniteError, RatelError
from ratel.planner.work import Buffers
from ratel.runtime.session.session import Session
from tests.support.families import batches, build, patches_loss

pytestmark = pytest.mark.numerics

ONE_OF_EACH = Buffers(weight_slots=1, grad_slots=1, host_weight_slots=1, host_grad_slots=1, ring_slots=1,
                      chunk_elements=2048, checkpoint_slots=1)
MIXED = {"*": {"hi": "dram", "lo": "ssd", "m": "ssd", "v": "dram", "g": "dram"}, "block.1": "ssd", "block.2": "gpu",
         "block.3": {"hi": "ssd", "g": "ssd"}}
DEFERRED = {
    "gpu": dict(tier="gpu"),
    "dram": dict(tier="dram"),
    "ssd": dict(tier="ssd"),
    "mixed": dict(placement=MIXED),
    # Slow, so that reads overtake writes: what is not waited for is not there.
    "gradients on a slow SSD": dict(placement={"*": {"g": "ssd"}}, ssd_bandwidth=2e6),
    "ssd, one of each buffer": dict(tier="ssd", buffers=ONE_OF_EACH, checkpoint_tier="ssd"),
    "without clipping": dict(tier="ssd", optimizer="deferred", max_grad_norm=0),
    "fp32": dict(tier="ssd", dtype="fp32"),
}
EAGER = {name: {**DEFERRED[name], "optimizer": "eager", "max_grad_norm": 0}
         for name in ("gpu", "dram", "ssd", "mixed", "ssd, one of each buffer", "fp32")}
EAGER["the tail on the GPU"] = dict(placement={"*": "ssd", "post": "gpu", "block.3": "gpu"}, optimizer="eager",
                                    max_grad_norm=0)


class Poison:
    """Makes the gradient of one parameter infinite, or the loss NaN, while ``on``."""

    def __init__(self, model: nn.Module, parameter: str | None) -> None:
        self.on = False
        if parameter is not None:
            dict(model.named_parameters())[parameter].register_hook(self._hook)

    def _hook(self, grad: Tensor) -> Tensor:
        return torch.full_like(grad, math.inf) if self.on else grad

    def loss_fn(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = patches_loss(model, batch)
        return loss * math.nan if self.on else loss


def open_poisoned(ssd_dir: Path | None, poisoned: str | None, options: dict) -> tuple[Session, Poison, list]:
    """A session in which the gradient of a parameter of llama is poisoned, or, for None, of the
    loss of the hand-written transformer."""
    family = "patches" if poisoned is None else "llama"
    model = build(family)
    poison = Poison(model, poisoned)
    session = Session(model, loss_fn=poison.loss_fn if poisoned is None else None, lr=1e-2, weight_decay=0.1,
                      device="cpu", ssd=ssd_dir and [ssd_dir], **{"micro_batch": 2, **options})
    return session, poison, batches(family, 4)


def states(session: Session) -> dict[str, Tensor]:
    units = [unit for unit in session.plan.spec.units if unit.num_trainable]
    return {f"{u.name}.{plane}": session.read_state(u, plane) for u in units for plane in ("hi", "lo", "m", "v")}


def assert_same_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"states differ: {different[:6]}"


@cache
def of_the_good_ones(poisoned: str | None, dtype: str, clip: float) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and states where only the good steps are made: the same in any tier and mode
    (test_placement.py)."""
    options = dict(tier="dram", dtype=dtype, max_grad_norm=clip, optimizer="deferred")
    session, _, (first, _, _, last) = open_poisoned(None, poisoned, options)
    with session:
        return [session.step(first).loss, session.step(last).loss], states(session)


def check_skipped_exactly(ssd_dir: Path, poisoned: str | None, options: dict) -> None:
    """good, bad, bad, good: as if only the good ones had been."""
    expected, after = of_the_good_ones(poisoned, options.get("dtype", "bf16"), options.get("max_grad_norm", 1.0))
    session, poison, (first, *bad, last) = open_poisoned(ssd_dir, poisoned, options)
    with session:
        losses = [session.step(first).loss]
        before = states(session)
        if session._machinery.engine is not None:
            session._machinery.engine.inject(max_delay_us=3000, seed=3)
        poison.on = True
        for number, batch in enumerate(bad, start=2):
            out = session.step(batch)
            assert out.skipped and out.step == number and not math.isfinite(out.grad_norm)
            assert math.isnan(out.loss) == (poisoned is None)
        poison.on = False
        assert_same_states(states(session), before)
        out = session.step(last)
        assert not out.skipped and math.isfinite(out.grad_norm)
        assert [*losses, out.loss] == expected
        assert_same_states(states(session), after)
        assert session._core.updates_made == 2, "bias correction counts updates"


@pytest.mark.parametrize("what", DEFERRED)
@pytest.mark.parametrize("poisoned", [None, "model.embed_tokens.weight"])
def test_deferred_skips_the_step(poisoned: str | None, what: str, ssd_dir: Path) -> None:
    check_skipped_exactly(ssd_dir, poisoned, DEFERRED[what])


@pytest.mark.parametrize("what", EAGER)
def test_eager_skips_a_step_whose_loss_is_not_finite(what: str, ssd_dir: Path) -> None:
    check_skipped_exactly(ssd_dir, None, EAGER[what])


def test_skipping_does_not_wait_for_a_flush(ssd_dir: Path) -> None:
    """Updates and spilled gradients of other steps are on their way when a step is skipped; slow
    disks, no flush."""
    for options in (dict(tier="ssd"), dict(placement={"*": {"g": "ssd"}}),
                    dict(tier="ssd", optimizer="eager", max_grad_norm=0)):
        results = []
        for pattern in ((False, False), (False, True, True, False, True)):
            session, poison, (first, bad, _, last) = open_poisoned(ssd_dir, None, options)
            with session:
                session.step(first)
                session._machinery.engine.inject(max_delay_us=8000, seed=7)
                good = iter((last, first))
                for is_bad in pattern:
                    poison.on = is_bad
                    assert session.step(bad if is_bad else next(good)).skipped is is_bad
                results.append(states(session))
        assert_same_states(*results)


@pytest.mark.parametrize(("what", "poisoned", "unit"), [
    ("dram", "model.embed_tokens.weight", "pre"),
    ("ssd", "model.layers.1.mlp.up_proj.weight", "block.1"),
    ("mixed", "model.layers.2.mlp.up_proj.weight", "block.2"),
])
def test_eager_cannot_skip_what_comes_late_and_names_it(what: str, poisoned: str, unit: str, ssd_dir: Path) -> None:
    session, poison, (first, second, third, _) = open_poisoned(ssd_dir, poisoned, EAGER[what])
    session.step(first)
    poison.on = True
    with pytest.raises(NonFiniteError, match=f"gradient of {unit} .*not finite.*deferred optimizer skips"):
        session.step(second)
    with pytest.raises(RatelError, match="the session ended with an earlier error .NonFiniteError"):
        session.step(third)
    session.close()
    assert list(ssd_dir.iterdir()) == []


def test_eager_on_the_gpu_alone_skips_whatever_comes_late(ssd_dir: Path) -> None:
    check_skipped_exactly(ssd_dir, "model.embed_tokens.weight", EAGER["gpu"])
