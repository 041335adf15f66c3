"""Whole units between their tiers and ordinary memory: every element, in pieces, in every version
that needs it."""

from pathlib import Path

import pytest
import torch

from ratel import native
from ratel.memory import arena
from ratel.store import transfer
from tests.support.stores import FROZEN, GRAIN, PLAIN, Parts, aligned, parts, random_plane, small_spec

pytestmark = pytest.mark.native

TIERS = {"*": "ssd", "pre": "gpu", "post": "dram"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PIECE_ELEMENTS", 2 * GRAIN)


def master_of(num_elements: int, seed: int) -> torch.Tensor:
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed))


def version(p: Parts, slot: int, unit: int, name: str) -> torch.Tensor:
    """Bytes as they are on SSD."""
    plane = p.store.plane(unit, name)
    back = random_plane(plane.dtype, plane.num_elements, 99)
    p.engine.wait(p.engine.submit_read(p.store.volume, p.store.offset(slot, unit, name), back.data_ptr(), plane.num_bytes, 0))
    return back


@pytest.mark.parametrize("spec", [PLAIN, FROZEN], ids=["plain", "frozen"])
def test_weights_come_back_bit_for_bit_and_frozen_ones_to_bf16(spec, ssd_dir: Path) -> None:
    with parts(ssd_dir, TIERS, spec=spec, durable="step") as p:
        masters = {u.index: master_of(u.num_elements, u.index) for u in spec.units}
        for unit in spec.units:
            p.transfer.write_weights(unit, masters[unit.index])
        for unit in spec.units:
            found, expected = p.transfer.read_weights(unit), masters[unit.index]
            trained = unit.num_trainable
            assert torch.equal(found[:trained], expected[:trained]) and found.dtype == torch.float32
            frozen = expected[trained:].view(torch.int32) + 0x8000 & ~0xFFFF
            assert torch.equal(found[trained:].view(torch.int32), frozen)
            assert torch.equal(p.transfer.read(unit, "hi").float(), p.transfer.read(unit, "hi").float())
            for begin, values in p.transfer.weight_pieces(unit):
                assert torch.equal(values, found[begin : begin + values.numel()]) and values.numel() <= 2 * GRAIN


def test_planes_are_written_and_read_in_pieces(ssd_dir: Path) -> None:
    with parts(ssd_dir, TIERS) as p:
        for unit in PLAIN.units:
            for seed, name in enumerate(("hi", "lo", "m", "v")):
                plane = p.store.plane(unit.index, name)
                values = random_plane(plane.dtype, plane.num_elements, seed)
                p.transfer.write(unit, name, values)
                found = p.transfer.read(unit, name)
                assert torch.equal(found, values) and found.data_ptr() % 4096 == 0 and found.data_ptr() != values.data_ptr()


def test_what_is_frozen_is_imported_into_every_version_and_the_rest_into_one(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FROZEN, durable="step") as p:
        unit = FROZEN.units[1]
        p.transfer.start_at_zero(unit, "hi")
        p.transfer.write_weights(unit, master_of(unit.num_elements, 7))
        now, other = version(p, 0, 1, "hi"), version(p, 1, 1, "hi")
        trained = unit.num_trainable
        assert torch.equal(now[trained:], other[trained:]) and now[trained:].any()
        assert now[:trained].any() and not other[:trained].any()


def test_an_upper_half_is_filled_where_it_is(ssd_dir: Path) -> None:
    with parts(ssd_dir, TIERS) as p:
        for index in range(4):
            unit, given = PLAIN.units[index], []

            def fill(part: torch.Tensor) -> None:
                given.append(part)
                part.fill_(len(given))

            for begin in range(0, unit.num_elements, GRAIN):
                p.transfer.fill_upper_half(unit, begin, begin + GRAIN, fill)
            found = p.transfer.read(unit, "hi")
            assert found.view(-1, GRAIN)[:, 0].tolist() == list(range(1, len(given) + 1)) and found.view(-1, GRAIN).float().std(1).eq(0).all()
            tensor = p.store.plane(index, "hi").tensor
            in_place = [tensor is not None and part.data_ptr() == tensor.data_ptr() + at * 2 * GRAIN for at, part in enumerate(given)]
            assert in_place == [unit.name == "post"] * len(given)


def test_a_copy_that_a_commit_made_is_recalled(ssd_dir: Path) -> None:
    with parts(ssd_dir, TIERS, durable="step") as p:
        for index in (0, 3):
            plane = p.store.plane(index, "m")
            values = random_plane(plane.dtype, plane.num_elements, index)
            p.engine.wait(p.io.write(index, "m", 0, values, native.nvme_ds.OPTIMIZER, slot=1))
            p.store.versions.restore([1] * 4)
            assert not plane.tensor.any()
            p.transfer.recall(PLAIN.units[index], "m")
            assert torch.equal(plane.tensor, values)


def test_frozen_parts_reach_the_versions_that_have_not_seen_them(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FROZEN, durable="step") as p:
        unit = FROZEN.units[1]
        values = random_plane(torch.bfloat16, unit.num_elements, 3)
        p.engine.wait(p.io.write(1, "hi", 0, values, native.nvme_ds.OPTIMIZER, slot=1))
        p.store.versions.restore([1] * 4)
        before = version(p, 0, 1, "hi")
        p.transfer.copy_frozen(unit, "hi")
        after, trained = version(p, 0, 1, "hi"), unit.num_trainable
        assert torch.equal(after[trained:], values[trained:]) and torch.equal(after[:trained], before[:trained])
        p.transfer.copy_frozen(FROZEN.units[0], "hi")  # of a unit that is trained there is nothing to copy
        assert not version(p, 0, 0, "hi").any()
        assert torch.equal(version(p, 1, 1, "hi"), values)


def test_what_begins_at_zero_is_zero_and_right(ssd_dir: Path) -> None:
    with parts(ssd_dir, TIERS) as p:
        for unit in PLAIN.units:
            p.transfer.start_at_zero(unit, "m")
            assert not p.transfer.read(unit, "m").any()


def test_aligned_memory_is_of_the_size_that_was_asked_for() -> None:
    for count in (1, 4096, 5000):
        memory = transfer.aligned_empty(count, torch.float32)
        assert memory.data_ptr() % 4096 == 0 and memory.numel() == count and memory.dtype == torch.float32


def test_memory_of_a_transfer_that_stalled_is_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr(arena, "_never_freed", kept)
    values = torch.zeros(1)
    with pytest.raises(ValueError), transfer.kept_if_stalled(values):
        raise ValueError
    assert kept == []
    stall = native.nvme_ds.StallError
    with pytest.raises(stall), transfer.kept_if_stalled(values):
        raise stall.__new__(stall)
    assert kept == [values]


def test_memory_that_is_not_aligned_is_a_mistake_of_the_program(ssd_dir: Path) -> None:
    spec = small_spec((100, 0), (100, 0), (100, 0))
    with parts(ssd_dir, "ssd", spec=spec) as p, pytest.raises(AssertionError):
        memory = aligned(torch.zeros(spec.units[1].num_elements + 8, dtype=torch.bfloat16))
        p.transfer.write(spec.units[1], "hi", memory[8:])
