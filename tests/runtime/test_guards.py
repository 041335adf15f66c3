"""Guards that an ordinary run seldom needs: each test holds open the moment that its guard is for,
and fails without it."""

import mmap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ratel import native
from ratel.errors import WorkerError
from ratel.memory.exchange import Exchange
from ratel.planner.work import Buffers
from ratel.runtime.session.session import Session
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.saver import Saver
from ratel.store.host_cache import HostCache, HostSlot
from ratel.store.versions import Versions
from tests.support.families import batches, build
from tests.support.sessions import assert_same

HELD_OPEN_S = 0.3


# --- gradients --------------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Every row goes to one of two experts, and in the batch below all rows of a step go to the
    same one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x.detach()[:, 0] > 0).long()
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]).tanh())
        return torch.cat([x[:, :1], (x + out)[:, 1:]], 1)  # the routing of all blocks is the first one's


class RoutedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Routed() for _ in range(4))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def routed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


@pytest.mark.numerics
def test_an_expert_without_rows_has_a_gradient_of_zero(ssd_dir: Path) -> None:
    """Its place in the buffer still holds what another unit's backward has left there."""
    def model() -> nn.Module:
        torch.manual_seed(0)
        return RoutedModel()

    generator = torch.Generator().manual_seed(3)
    steps = [{"x": torch.randn(4, 16, generator=generator), "y": torch.randn(4, 1, generator=generator)} for _ in range(2)]
    for batch, sign in zip(steps, (1, -1)):
        batch["x"][:, 0] = sign
    plain = model()
    moments = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    with Session(model(), loss_fn=routed_loss, ssd=[ssd_dir], tier="ssd", device="cpu", lr=0.0, max_grad_norm=0, micro_batch=2,
                 buffers=Buffers(grad_slots=1), dtype="fp32") as session:
        for batch in steps:
            session.step(batch)
            plain.zero_grad()
            routed_loss(plain, batch).backward()
            for name, parameter in plain.named_parameters():
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                moments[name].mul_(0.9).add_(grad, alpha=0.1)
        unused = [name for name, p in plain.named_parameters() if p.grad is None]
        assert len(unused) == 8  # one expert of each block, weight and bias
        for unit in session.plan.spec.units:
            m = session.read_state(unit, "m")
            for p in unit.params:
                torch.testing.assert_close(m[p.offset : p.end].view(p.shape), moments[p.name], rtol=1e-5, atol=1e-8)


# --- randomness -------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * F.dropout(torch.ones_like(x), 0.5, self.training)


class DroppingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dropping() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.numerics
def test_micro_batches_draw_masks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows, one to a micro-batch: what dropout leaves of them differs, and a second run draws
    what the first drew."""
    torch.manual_seed(0)
    masks: list[float] = []
    dropout, powers = F.dropout, 2.0 ** torch.arange(24)

    def watched(x: Tensor, *args: object) -> Tensor:
        out = dropout(x, *args)
        if x.shape == (1, 64):
            masks.append(((out[0, :24] == 0) * powers).sum().item())  # asked for as a number, it is made in every run
        return out

    monkeypatch.setattr(F, "dropout", watched)
    row = torch.randn(1, 64)
    with Session(DroppingModel(), loss_fn=lambda model, batch: model(batch["x"]).square().mean(), device="cpu", dtype="fp32", lr=1e-3,
                 micro_batch=1) as session:
        session.step({"x": row.repeat(3, 1)})
        masks.clear()
        session.step({"x": row.repeat(3, 1)})
    assert len(masks) == 2 * 9 and len(set(masks)) == 9  # three blocks, three micro-batches, each run twice
    assert all(masks.count(mask) == 2 for mask in masks)


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.numerics
def test_an_update_on_the_gpu_waits_for_the_copy_of_what_it_overwrites(ssd_dir: Path, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of the last unit begins only when the next step has had time to update it."""
    updated = threading.Event()
    copy_unit = Saver._copy_unit

    def late(self: Saver, save: object, unit: object) -> None:
        if unit is self._order[-1]:
            updated.wait(HELD_OPEN_S)
        copy_unit(self, save, unit)

    monkeypatch.setattr(Saver, "_copy_unit", late)
    first, second = batches("llama", 2)
    with Session(build("llama"), ssd=[ssd_dir], device="cpu", tier="gpu", lr=1e-3, micro_batch=2) as session:
        session.step(first)
        session.flush()
        expected = {unit.name: session.read_state(unit, "m") for unit in session.plan.spec.units}
        session.save(tmp_path / "state", wait=False)
        session.step(second)
        updated.set()
        session.wait_saved()
    saved = SavedState(tmp_path / "state")
    units = saved.manifest["model"]["units"]
    found = {units[unit]["name"]: saved.read(unit, plane) for unit, plane in saved.planes() if plane == "m"}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.unit
def test_a_spare_slot_is_neither_the_current_nor_the_committed_one() -> None:
    versions = Versions([True], 3)
    versions.include(0)
    versions.commit()
    seen = set()
    for _ in range(6):
        committed = versions._committed[0]
        assert versions.spare(0) not in (versions.current[0], committed)
        versions.advance(0)
        assert versions.current[0] != committed
        seen.add((committed, versions.current[0], versions.spare(0)))
        versions.include(0)
        versions.commit()
    assert all(len(set(slots)) == 3 for slots in seen) and len(seen) > 1


@pytest.mark.numerics
@pytest.mark.parametrize("optimizer", ["eager", "deferred", "speculative"])
def test_a_copy_in_dram_goes_when_the_next_reader_finds_the_same_on_ssd(optimizer: str, ssd_dir: Path, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """With commits every update goes to another place on SSD. A copy that went before that place is
    known would leave the weights of the step before to whoever asks next."""
    release, last_holds, differing = HostCache.release, [], []

    def compared(self: HostCache, slot: HostSlot) -> None:
        with self._exchange.lock:
            if slot.refs == 1 and self._by_unit.get(slot.unit) is slot:
                for name, view in self.views(slot).items():
                    there = torch.frombuffer(mmap.mmap(-1, view.numel() * view.element_size()), dtype=view.dtype)  # page aligned
                    self._io.wait(self._io.read(slot.unit, name, 0, there, native.nvme_ds.WEIGHT))
                    (last_holds if torch.equal(there, view) else differing).append((slot.unit, name))
            release(self, slot)

    monkeypatch.setattr(HostCache, "release", compared)
    with Session(build("llama"), device="cpu", lr=1e-2, micro_batch=4, max_grad_norm=0.0 if optimizer == "eager" else 0.5,
                 optimizer=optimizer, ssd=[ssd_dir], tier="ssd", durable="step", commits=tmp_path / "commits",
                 buffers=Buffers(weight_slots=1, host_weight_slots=2)) as session:
        for batch in batches("llama", 4):
            session.step(batch)
            session.commit(wait=True)
    assert not differing and len(last_holds) > 4 * len(session.plan.spec.units)


@pytest.mark.numerics
@pytest.mark.parametrize("optimizer", ["eager", "speculative"])
def test_weights_are_let_go_when_they_are_on_ssd(optimizer: str, ssd_dir: Path) -> None:
    """Nothing but weights is on SSD, which is so slow that reads overtake writes: no write of a
    moment before it keeps the DRAM copy until then."""
    places = {"tier": "dram"}, {"placement": {"*": {"hi": "ssd", "lo": "dram", "m": "dram", "v": "dram", "g": "dram"}},
                                "ssd_bandwidth": 2e6, "buffers": Buffers(weight_slots=1, host_weight_slots=3)}
    results = []
    for options in places:
        with Session(build("llama"), device="cpu", lr=1e-2, micro_batch=4, max_grad_norm=0.0 if optimizer == "eager" else 0.5,
                     optimizer=optimizer, ssd=[ssd_dir], **options) as session:
            losses = [session.step(batch).loss for batch in batches("llama", 4)]
            results.append((losses, session.state_dict()))
    assert_same(*results)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_the_first_failure_is_the_one_that_is_told() -> None:
    """What fails next fails because of it, as a rule."""
    exchange = Exchange()
    exchange.fail(OSError("the drive is gone"), "the reader thread")
    exchange.fail(RuntimeError("nothing was read"), "the updater thread")
    with pytest.raises(WorkerError, match="the reader thread failed: the drive is gone") as caught:
        exchange.check()
    assert isinstance(caught.value.__cause__, OSError)
