"""Waits that must end and bytes that must have arrived, in the corners that ordinary runs do not
reach.

Also tested: every placement under random delays in test_placement.py; failures in test_failures.py;
skipped steps in test_nonfinite.py.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from ratel.errors import RatelError
from ratel.planner.work import Buffers
from ratel.runtime.session.session import Session
from tests.support.families import batches
from tests.support.patience import interrupted_after, within
from tests.support.sessions import SMALL, assert_same, open_session, with_frozen

pytestmark = pytest.mark.numerics


def train(session: Session, steps: list[dict]) -> tuple[list[float], dict[str, torch.Tensor]]:
    with within():
        losses = [session.step(batch).loss for batch in steps]
        states = session.state_dict()
    return losses, states


@pytest.mark.parametrize("checkpoint_tier", ["dram", "ssd"])
def test_a_batch_of_fewer_micro_batches_than_planned(checkpoint_tier: str, ssd_dir: Path) -> None:
    """The last batch of a data set is smaller; nobody must wait for the checkpoints that it does
    not have."""
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
    """Blocks held over the turn keep their DRAM copies for their updates; those behind must not
    need them to go on."""
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


@pytest.mark.parametrize(("frozen", "slots"), [
    (["embed_tokens"], 5),
    (["layers.0", "layers.2"], 1),
    (["layers.1", "model.norm", "lm_head"], 2),
])
def test_updates_leave_a_slot_to_units_that_are_not_updated(frozen: list[str], slots: int, ssd_dir: Path) -> None:
    """Deferred updates run ahead of the next forward pass, and keep their slots for it; it must get
    past others."""
    steps = batches("llama", 3)
    with open_session(ssd_dir, model=with_frozen(*frozen), tier="dram") as session:
        expected = train(session, steps)
    buffers = Buffers(host_weight_slots=slots, chunk_elements=2048)
    with open_session(ssd_dir, model=with_frozen(*frozen), tier="ssd", buffers=buffers) as session, within():
        losses = []
        for batch in steps:
            losses.append(session.step(batch).loss)
            time.sleep(0.15)  # the updates get as far as they can before the next forward pass begins
        session.evaluate(steps)
        assert_same((losses, session.state_dict()), expected)


def test_a_flush_that_was_interrupted_can_be_followed_by_a_step(ssd_dir: Path) -> None:
    """What it has given up for good (slots kept for the next forward pass) must not be taken again
    half-way."""
    steps = batches("llama", 2)
    with open_session(ssd_dir, model=with_frozen("layers.1"), tier="dram") as session:
        expected = train(session, steps)
    with open_session(ssd_dir, model=with_frozen("layers.1"), tier="ssd", buffers=SMALL) as session:
        session.step(steps[0])
        engine = session._machinery.engine
        engine.inject(max_delay_us=100_000, seed=1)
        with pytest.raises(KeyboardInterrupt), interrupted_after(0.02):
            session.flush()
        time.sleep(0.3)
        engine.inject()
        losses, states = train(session, steps[1:])
    assert_same(([expected[0][0], *losses], states), expected)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x.to(self.linear.weight.dtype))).float()


class Fp32Stream(nn.Module):
    """Hidden states stay fp32 between blocks that compute in bf16."""

    def __init__(self, grows: bool = False) -> None:
        super().__init__()
        self.grows = grows
        self.embed, self.head = nn.Linear(12, 12), nn.Linear(12, 2)
        self.layers = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) if self.grows else self.embed(x).float()
        for layer in self.layers:
            x = layer(x)
        return self.head(x.to(self.head.weight.dtype)).mean(1)


def test_checkpoints_keep_the_dtype_of_the_hidden_states(ssd_dir: Path) -> None:
    """A checkpoint rounded on its way would recompute another forward pass than the one that
    was."""
    steps, results = batches("patches", 2), []
    for checkpoint_tier in ("gpu", "dram", "ssd"):
        torch.manual_seed(0)
        with open_session(ssd_dir, "patches", model=Fp32Stream(), checkpoint_tier=checkpoint_tier) as session:
            results.append(train(session, steps))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    with open_session(ssd_dir, "patches", model=Fp32Stream(grows=True), checkpoint_tier="dram") as session:
        with pytest.raises(RatelError, match="block 1 is given hidden states of more bytes .* .torch.float32"):
            session.step(steps[0])


def test_all_computation_is_on_the_compute_lane(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stream is the caller's current one: what is between the blocks too, or it races with
    what is in them."""
    seen, lane = {}, threading.local()

    @contextmanager
    def on(name: str) -> Iterator[None]:
        previous, lane.name = getattr(lane, "name", None), name
        yield
        lane.name = previous

    def noting(name: str, real: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            seen.setdefault(name, set()).add(getattr(lane, "name", None))
            return real(*args, **kwargs)

        return call

    with open_session(ssd_dir, placement={"*": "dram", "block.1": "gpu"}) as session:
        session.prepare(4, 16)
        m = session._machinery
        monkeypatch.setattr(m.lanes, "on", on)
        for owner, name in ((m.gradients, "begin"), (m.gradients, "collect"), (m.gradients, "close"),
                            (m.gradients, "measure"), (m.gradients, "move"),
                            (m.gradients, "total_norm"), (m.activations, "save_input"), (session.parts, "head"),
                            (session.parts, "tail_logits")):
            monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
        train(session, batches("llama", 2))
        session.evaluate(batches("llama", 1))
    assert len(seen) == 9 and set().union(*seen.values()) == {"compute"}, seen


class Lending(nn.Module):
    """Gives its blocks what ``lend`` makes of a weight of the stage before them: as hidden states,
    or beside those."""

    def __init__(self, lend: Callable[[torch.Tensor], torch.Tensor], *, as_hidden: bool, copies: bool) -> None:
        super().__init__()
        self.lend, self.as_hidden, self.copies = lend, as_hidden, copies
        self.embed, self.lent = nn.Linear(12, 32), nn.Parameter(torch.randn(1, 16, 32))
        self.layers = nn.ModuleList(Adding() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, other = self.embed(x), self.lend(self.lent.expand(len(x), -1, -1))
        other = other.clone() if self.copies else other
        if self.as_hidden:
            hidden, other = other, hidden
        for layer in self.layers:
            hidden = layer(hidden, other)
        return self.head(self.norm(hidden).mean(1))


class Adding(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)

    def forward(self, hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(super().forward(hidden) + other)


@pytest.mark.parametrize("lend", [torch.Tensor.contiguous, nn.Dropout(0.3)], ids=["contiguous", "dropout"])
@pytest.mark.parametrize("as_hidden", [False, True])
def test_weights_that_blocks_are_given_outlive_their_slot(as_hidden: bool, lend: Callable, ssd_dir: Path) -> None:
    """Where what is made of a weight is its memory itself (in one row; in evaluation), the next
    unit lands there."""
    steps, results = batches("patches", 3), []
    for copies in (True, False):
        torch.manual_seed(0)
        model = Lending(lend, as_hidden=as_hidden, copies=copies)
        with open_session(ssd_dir, "patches", model=model, tier="ssd", micro_batch=1) as session:
            losses, states = train(session, steps)
            with within():
                results.append(([*losses, session.evaluate(steps)], states))
    assert_same(*results)


@pytest.mark.parametrize("name", [field.name for field in fields(Buffers)])
def test_counts_of_buffers_that_could_only_hang_are_refused(name: str) -> None:
    with pytest.raises(RatelError, match=f"buffers.{name}: .*given: 0"):
        Buffers(**{name: 0})
    with pytest.raises(RatelError, match="multiple of 2048"):
        Buffers(chunk_elements=3000)


def test_merged_copies_of_fp32_units_on_the_gpu_are_in_the_plan(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(ssd_dir, "llama-tied", dtype="fp32", placement={"*": "gpu", "block.1": "dram"}) as session:
        session.prepare(4, 16)
        streamed = [u.index for u in session.plan.spec.units if not session.plan.placement(u).on_gpu]
        merged, most, attach = {}, [0], session.parts.parameters.attach

        def counting(unit: int, flat: torch.Tensor | None) -> None:
            merged[unit] = 0 if flat is None or unit in streamed else flat.nbytes
            most.append(sum(merged.values()))
            attach(unit, flat)

        monkeypatch.setattr(session.parts.parameters, "attach", counting)
        train(session, batches("llama-tied", 1))
        assert max(most) == session.plan.gpu_items["merged resident weights"]
