"""Drives that are not equally fast get shares of the stripes by their speed: which, what it is
worth, and that nothing else changes."""

import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import nvme_ds
from ratel.errors import RatelError
from ratel.planner.machine.hardware import Hardware, Ssd, load_hardware
from ratel.planner.machine.pipes import ssd_rates
from ratel.planner.machine.stripes import MOST_STRIPES, stripe_weights, striped
from ratel.runtime.planning import prepare
from ratel.runtime.session.session import Session
from ratel.units import MIB

SLOW = Ssd(read_bps=1e9, write_bps=1e9, mixed_bps=1e9)


def machine(*factors: float) -> Hardware:
    """This with drives that are so many times as fast as the first of the file."""
    return replace(load_hardware("4090"), ssds=tuple(
        Ssd(read_bps=f * SLOW.read_bps, write_bps=f * SLOW.write_bps, mixed_bps=f * SLOW.mixed_bps) for f in factors),
        ssd_limit_bps=None)


# --- which shares -----------------------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize(("rates", "expected"), [
    ([], ()), ([3.0], (1,)), ([1.0, 1.0, 1.0], (1, 1, 1)), ([1.0, 1.14], (1, 1)), ([2.0, 1.0], (2, 1)),
    ([7e9, 3.5e9, 3.5e9], (2, 1, 1)), ([3.0, 2.0], (3, 2)), ([100.0, 1.0], (15, 1)),
])
def test_shares_by_hand(rates: list[float], expected: tuple[int, ...]) -> None:
    assert stripe_weights(rates) == expected


@pytest.mark.unit
def test_shares_are_small_and_never_slower_than_equal_ones() -> None:
    for count in (2, 3, 4):
        for rates in product((1.0, 1.3, 2.0, 3.7, 5.1), repeat=count):
            weights = stripe_weights(rates)
            assert min(weights) >= 1 and sum(weights) <= MOST_STRIPES
            assert striped(rates, weights) >= striped(rates, (1,) * count)
            if max(rates) / min(rates) > 1.15:
                assert striped(rates, weights) >= 0.87 * sum(rates), (rates, weights)


@pytest.mark.unit
def test_the_volume_has_exactly_these_shares() -> None:
    for weights in ((2, 1), (8, 7), (15, 1), (5, 3, 2), (1, 1)):
        pattern = nvme_ds.layout.stripe_pattern(weights)
        assert tuple(pattern.count(index) for index in range(len(weights))) == weights


@pytest.mark.unit
def test_the_ssd_bound_follows_the_shares() -> None:
    uneven = machine(3.0, 1.0)
    assert uneven.stripe_weights == (3, 1)
    assert ssd_rates(uneven).read_bps == pytest.approx(4e9)
    assert ssd_rates(replace(uneven, stripes=(1, 1))).read_bps == pytest.approx(2e9)
    assert Hardware.from_json(replace(uneven, stripes=(1, 1)).to_json()) == replace(uneven, stripes=(1, 1))


# --- what they are worth ----------------------------------------------------------------------------------------------


@pytest.mark.native
def test_a_volume_gives_each_drive_its_share(ssd_dir: Path) -> None:
    """Drives of 60 and 20 MB/s: equal stripes give 40 together, three to one 80. How fast they are,
    io_bench measures."""
    folders = [ssd_dir / "fast", ssd_dir / "slow"]
    for folder in folders:
        folder.mkdir()
    caps = {str(folders[0].resolve()): 60e6, str(folders[1].resolve()): 20e6}
    seconds = {}
    for weights in ((1, 1), stripe_weights(list(caps.values()))):
        memory = nvme_ds.AlignedBuffer(48 * MIB)
        with nvme_ds.Engine() as engine:
            volume = engine.create_volume(folders, "volume", 48 * MIB, weights=weights)
            engine.wait(engine.submit_write(volume, 0, memory.address, memory.num_bytes, nvme_ds.WRITEBACK))
            engine.wait(engine.submit_read(volume, 0, memory.address, memory.num_bytes, nvme_ds.WEIGHT))
            moved = engine.stats()["directories"]
            seconds[weights] = max(moved[name]["bytes_read"] / bps for name, bps in caps.items())
            volume.close()
    assert seconds[1, 1] / seconds[3, 1] == pytest.approx(2.0)


# --- that nothing else changes ----------------------------------------------------------------------------------------


def config() -> object:
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, vocab_size=4099,
                       num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False)


def session(folders: list[Path], hardware: "Hardware | str", **options: object) -> Session:
    return Session(config(), device="cpu", dtype="bf16", dram="2GiB", ssd=folders, tier="ssd", hardware=hardware, lr=1e-3,
                   micro_batch=2, **options)


def batch(index: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(4099, (2, 16), generator=torch.Generator().manual_seed(index))}


def sizes(folders: list[Path]) -> list[int]:
    return [sum(file.stat().st_size for file in folder.glob("ratel-states.*")) for folder in folders]


@pytest.fixture
def folders(ssd_dir: Path) -> list[Path]:
    for name in ("a", "b"):
        (ssd_dir / name).mkdir()
    return [ssd_dir / "a", ssd_dir / "b"]


@pytest.mark.e2e
def test_shares_change_where_bytes_are_and_no_bit_of_them(folders: list[Path]) -> None:
    found = {}
    for hardware in (machine(1.0, 1.0), machine(3.0, 1.0)):
        with session(folders, hardware) as training:
            losses = [training.step(batch(index)).loss for index in range(2)]
            found[hardware.stripe_weights] = losses, training.state_dict(), sizes(folders)
            assert training.hardware["ssd_stripes"] == dict(zip(map(os.fspath, folders), hardware.stripe_weights))
    (losses, states, even), (other_losses, other_states, uneven) = found[1, 1], found[3, 1]
    assert losses == other_losses and all(torch.equal(states[name], other_states[name]) for name in states)
    assert abs(even[0] - even[1]) <= MIB and abs(uneven[0] - 3 * uneven[1]) <= 3 * MIB < uneven[0]


@pytest.mark.e2e
def test_commits_keep_their_shares_and_other_directories_get_new_ones(folders: list[Path], tmp_path: Path) -> None:
    commits = tmp_path / "commits"
    with session(folders, "none") as plain:
        expected = [plain.step(batch(index)).loss for index in range(3)], plain.state_dict()
    with session(folders, machine(3.0, 1.0), durable="step", commits=commits) as first:
        first.step(batch(0))
        first.commit(wait=True)
    with session(folders, machine(1.0, 2.0), durable="step", commits=commits) as second:
        second.load(commits)
        second.step(batch(1))
        assert list(second.hardware["ssd_stripes"].values()) == [3, 1]
        second.commit(wait=True)
    with session(folders[::-1], machine(2.0, 1.0), durable="step", commits=commits) as third:
        third.load(commits)
        loss = third.step(batch(2)).loss
        assert list(third.hardware["ssd_stripes"].values()) == [2, 1]
        assert loss == expected[0][2]
        assert all(torch.equal(values, expected[1][name]) for name, values in third.state_dict().items())


@pytest.mark.e2e
def test_equal_shares_are_taken_where_the_fast_drive_is_full(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def space(directories: object, own: object, weights: tuple[int, ...]) -> int:
        asked.append(weights)
        return 1 << 40 if weights == (1, 1) else 1 << 20

    monkeypatch.setattr(prepare, "usable_bytes", space)
    with session(folders, machine(3.0, 1.0)) as training:
        training.prepare(2, 16)
        assert training.hardware["ssd_stripes"] == dict(zip(map(os.fspath, folders), (1, 1)))
    assert list(dict.fromkeys(asked)) == [(3, 1), (1, 1)]
    monkeypatch.setattr(prepare, "usable_bytes", lambda *_: 1 << 20)
    with session(folders, machine(3.0, 1.0)) as training, pytest.raises(RatelError, match="SSD space is short by"):
        training.prepare(2, 16)
