"""A step's random numbers, and what an evaluation must not do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratel.runtime.session.session import Session
from ratel.runtime.streams.activations import Activations
from ratel.runtime.streams.step import mix
from tests.support.families import batches
from tests.support.late_lanes import LateLanes, late_lanes
from tests.support.sessions import MIXED, open_session

pytestmark = pytest.mark.numerics

# --- random numbers ---------------------------------------------------------------------------------------------------

GOLDEN, WORD = 0x9E3779B97F4A7C15, 1 << 64
SPLITMIX = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
"""The first numbers of splitmix64 from 1234567, as its authors' program prints them."""


def test_seeds_are_those_of_splitmix64() -> None:
    """Other ones would be as good, but a run that is resumed with a newer version would draw other
    masks."""
    for number, expected in enumerate(SPLITMIX):
        begin = (1234567 + number * GOLDEN) % WORD
        assert mix(begin) == mix(begin - WORD) == mix(begin + WORD) == expected >> 1
    assert mix(1234567, SPLITMIX[0] ^ 1234567, SPLITMIX[0] ^ 1234567) == SPLITMIX[0] >> 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class DropsAtTheBeginning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * F.dropout(torch.ones_like(x), 0.5, self.training)
        for block in self.blocks:
            x = block(x)
        return x


def mean_square(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().mean()


def test_what_comes_before_the_blocks_draws_the_same_in_both_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row to a micro-batch: its mask differs from the others', and backward's is forward's."""
    masks: list[float] = []
    dropout, powers = F.dropout, 2.0 ** torch.arange(24)

    def watched(x: Tensor, *args: object) -> Tensor:
        out = dropout(x, *args)
        if x.shape == (1, 64):
            masks.append(((out[0, :24] == 0) * powers).sum().item())
        return out

    monkeypatch.setattr(F, "dropout", watched)
    torch.manual_seed(0)
    batch = {"x": torch.randn(1, 64).repeat(3, 1)}
    with Session(DropsAtTheBeginning(), loss_fn=mean_square, device="cpu", dtype="fp32", lr=1e-3, micro_batch=1) as session:
        session.step(batch)
        masks.clear()
        session.step(batch)
    # The loss of a module with one of its own runs this part as well, and what it makes there goes to nobody.
    assert len(masks) == 3 * 3 and masks[:3] == masks[-3:] and len(set(masks[:3])) == 3


@pytest.mark.parametrize("call", [lambda session, batch: session.step(batch), lambda session, batch: session.evaluate([batch])])
def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_drawn(call: Callable) -> None:
    (batch,) = batches("llama", 1)
    with open_session(None) as session:
        session.step(batch)
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        call(session, batch)
        assert torch.equal(torch.rand(4), expected)


# --- evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["gpu", "dram", "ssd"])
def test_an_evaluation_keeps_nothing_for_a_backward_that_does_not_come(tier: str, ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[int, int]] = []
    save_input = Activations.save_input

    def noted(self: Activations, block: int, micro: int, hidden: Tensor) -> None:
        saved.append((block, micro))
        save_input(self, block, micro, hidden)

    monkeypatch.setattr(Activations, "save_input", noted)
    (batch,) = batches("llama", 1)
    with open_session(ssd_dir, checkpoint_tier=tier) as session:
        session.step(batch)
        assert len(saved) == 4 * 2
        saved.clear()
        first = session.evaluate([batch])
        assert saved == [] and session.evaluate([batch]) == first


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(placement=MIXED, checkpoint_tier="dram"),
                                     dict(tier="dram", activations="ssd", checkpoint_tier="ssd")])
def test_no_copy_makes_the_main_thread_wait(options: dict, ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a copy that is not told so waits for all that its stream has to do before it."""
    blocking: list[str] = []
    enqueue = LateLanes.enqueue

    def watched(self: LateLanes, lane: str, func: object, args: tuple, kwargs: dict) -> None:
        if "copy_" in str(func) and not (kwargs.get("non_blocking") or len(args) > 2 and args[2]):
            blocking.append(f"{lane} {func}")
        enqueue(self, lane, func, args, kwargs)

    monkeypatch.setattr(LateLanes, "enqueue", watched)
    with late_lanes(monkeypatch) as made, open_session(ssd_dir, **options) as session:
        for batch in batches("llama", 2):
            session.step(batch)
    assert made[0].num_copies > 20 and blocking == []


def test_what_is_on_ssd_says_what_it_is(ssd_dir: Path) -> None:
    """In traces, and where bytes are found damaged."""
    with open_session(ssd_dir, tier="dram", activations="ssd", checkpoint_tier="ssd") as session:
        session.step(batches("llama", 1)[0])
        _, places = session._machinery.activations.on_ssd()
        inputs = {f"checkpoint {block}.{micro}" for block, tier in enumerate(session.plan.checkpoint_tiers) if tier == "ssd" for micro in range(2)}
        inside = {f"inside {group.block}.{micro}" for group in session.plan.groups if group.is_inner for micro in range(2)}
    assert inputs and inside and sorted(name for _, name in places) == sorted(inputs | inside)


def test_a_trace_counts_the_bytes_of_weights_that_go_down(ssd_dir: Path) -> None:
    with open_session(ssd_dir, placement=MIXED) as session:
        session.step(batches("llama", 1)[0])
        spans = session.step(batches("llama", 1, seed=6)[0], trace=True).timeline.spans
        sizes = {unit.name: 2 * unit.num_elements for unit in session.plan.spec.units}
    found = {(span.name, span.num_bytes) for span in spans if span.lane == "h2d" and span.name in sizes}
    assert len(found) >= 4 and found == {(name, sizes[name]) for name, _ in found}


def test_gradients_take_the_memory_that_the_plan_says(ssd_dir: Path) -> None:
    with open_session(ssd_dir, tier="dram") as session:
        session.step(batches("llama", 1)[0])
        plan, gradients = session.plan, session._machinery.gradients
        sums = {cls: total.nbytes for cls, total in gradients._acc.items()}
        slots = {cls: {slot.buffer.nbytes for slot in pool._free} for cls, pool in gradients._pools.items()}
    assert sums and sums == {cls: plan.max_bytes(cls, "acc") for cls in plan.accumulators}
    assert slots == {cls: {plan.max_bytes(cls, "grads")} for cls in slots}
