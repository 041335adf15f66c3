"""Whole units between their tiers and ordinary memory: every element, in pieces, in every version
that needs it."""

from pathlib import Path

import pytest
import torch

from ratel import native
from ratel.memory import arena
from ratel.planner.formats import FORMATS
from ratel.store import encodings, transfer
from tests.support.stores import FROZEN, GRAIN, PLAIN, Parts, aligned, parts, random_plane, small_spec

pytestmark = pytest.mark.native

TIERS = {"*": "ssd", "pre": "gpu", "post": "dram"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PIECE_ELEMENTS", 2 * GRAIN)


def master_of(num_elements: int, seed: int) -> torch.Tensor:
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed))


def version(p: Parts, slot: int, unit: int, name: str) -> torch.Tensor:
    """What is trained, as it is on SSD."""
    back = random_plane(p.store.plane(unit, name).dtype, p.unit(unit).num_trainable, 99)
    p.engine.wait(p.engine.submit_read(p.store.volume, p.store.offset(slot, unit, name), back.data_ptr(), back.numel() * back.element_size(), 0))
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
            assert torch.equal(found[trained:], bf16(expected[trained:]))
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


def test_what_is_trained_is_imported_into_one_version_and_what_is_frozen_has_one_place(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FROZEN, durable="step") as p:
        unit = FROZEN.units[1]
        p.transfer.start_at_zero(unit, "hi")
        p.transfer.write_weights(unit, master_of(unit.num_elements, 7))
        assert version(p, 0, 1, "hi").any() and not version(p, 1, 1, "hi").any()
        before = p.transfer.read(unit, "hi")
        p.store.versions.restore([1] * 4)
        after, trained = p.transfer.read(unit, "hi"), unit.num_trainable
        assert torch.equal(after[trained:], before[trained:]) and not after[:trained].any()


def test_weights_are_written_from_a_segment_on(ssd_dir: Path) -> None:
    with parts(ssd_dir, TIERS, spec=FROZEN) as p:
        unit, trained = FROZEN.units[1], FROZEN.units[1].num_trainable
        first, second = (master_of(unit.num_elements, seed) for seed in (1, 2))
        p.transfer.write_weights(unit, first)
        p.transfer.write_weights(unit, second, first=trained)
        found = p.transfer.read_weights(unit)
        assert torch.equal(found[:trained], first[:trained]) and torch.equal(found[trained:], bf16(second[trained:]))


def bf16(values: torch.Tensor) -> torch.Tensor:
    """Rounded half up on the bits."""
    return (values.view(torch.int32) + 0x8000 & ~0xFFFF).view(torch.float32)


def test_frozen_pieces_are_what_is_frozen_in_order(ssd_dir: Path) -> None:
    for tier in ("ssd", "dram"):
        with parts(ssd_dir, tier, spec=FROZEN) as p:
            for unit in FROZEN.units:
                p.transfer.write_weights(unit, master_of(unit.num_elements, unit.index))
                pieces = [piece.clone() for piece in p.transfer.frozen_pieces(unit, "hi")]
                assert all(piece.numel() <= 2 * GRAIN for piece in pieces)
                assert torch.equal(torch.cat([torch.empty(0, dtype=torch.bfloat16), *pieces]), p.transfer.read(unit, "hi")[unit.num_trainable :])


def test_moments_are_stored_as_the_plane_is(ssd_dir: Path) -> None:
    with parts(ssd_dir, TIERS) as p:
        for unit in PLAIN.units:
            values = random_plane(torch.float32, unit.num_trainable, unit.index)
            p.transfer.write_moment(unit, "v", values)
            assert torch.equal(p.transfer.read(unit, "v").float(), values.to(p.store.plane(unit.index, "v").dtype).float())


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


def test_what_begins_at_zero_is_zero_and_right(ssd_dir: Path) -> None:
    with parts(ssd_dir, TIERS) as p:
        for unit in PLAIN.units:
            p.transfer.start_at_zero(unit, "m")
            assert not p.transfer.read(unit, "m").any()


def test_aligned_memory_is_of_the_size_that_was_asked_for() -> None:
    for count in (1, 4096, 5000):
        memory = transfer.aligned_empty(count, torch.float32)
        assert memory.data_ptr() % 4096 == 0 and memory.numel() == count and memory.dtype == torch.float32


@pytest.mark.parametrize("tier", ["ssd", "dram", "gpu"])
@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_moments_in_fewer_bytes_are_converted_in_pieces(states: str, tier: str, ssd_dir: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans set aside four bytes an element for the numbers, and nothing for a plane beside them."""
    spec, piece, steps = small_spec((300_000, 0), (5000, 0)), FORMATS[states]["bf16"].page_elements, []
    store_fp32 = encodings.store_fp32
    monkeypatch.setattr(transfer, "PIECE_ELEMENTS", piece)
    monkeypatch.setattr(encodings, "RECODED_ELEMENTS", GRAIN)
    monkeypatch.setattr(encodings, "store_fp32", lambda values, *rest: (steps.append(values.numel()), store_fp32(values, *rest)))
    sizes, aligned_empty = [], transfer.aligned_empty
    monkeypatch.setattr(transfer, "aligned_empty", lambda count, dtype: (sizes.append(count), aligned_empty(count, dtype))[1])
    with parts(ssd_dir, tier, spec=spec, states=states) as p:
        for unit in spec.units:
            for name in ("m", "v"):
                encoding = p.store.plane(unit.index, name).encoding
                values = aligned(master_of(unit.num_elements, unit.index).square_() * 1e-4)
                p.transfer.write_moment(unit, name, values)
                found = p.transfer.read_moment(unit, name)
                whole = torch.empty(encoding.place(unit.num_elements), dtype=encodings.DTYPES[encoding.name])
                store_fp32(values, encoding, whole)
                assert torch.equal(found, encodings.to_fp32(whole, encoding)) and found.dtype == torch.float32
                assert max(sizes) <= encoding.place(piece) and max(steps) == GRAIN
                sizes.clear()
                assert torch.equal(p.transfer.read(unit, name), whole)
                sizes.clear()


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


@pytest.mark.parametrize("direction", ["read", "write"])
def test_memory_that_a_stalled_disk_may_still_use_is_kept(direction: str, ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []

    def stalls(*_: object, **__: object) -> None:
        raise native.nvme_ds.StallError.__new__(native.nvme_ds.StallError)

    with parts(ssd_dir, "ssd") as p:
        unit = PLAIN.units[1]
        values = random_plane(torch.bfloat16, unit.num_elements, 1)
        p.transfer.write(unit, "hi", values)
        with monkeypatch.context() as patch:
            patch.setattr(arena, "_never_freed", kept)
            patch.setattr(type(p.engine), "wait", stalls)
            patch.setattr(type(p.io), "wait", stalls)
            with pytest.raises(native.nvme_ds.StallError):
                p.transfer.write(unit, "hi", values) if direction == "write" else p.transfer.read(unit, "hi")
    assert len(kept) == 1 and kept[0].dtype is torch.bfloat16


def test_memory_that_is_not_aligned_is_a_mistake_of_the_program(ssd_dir: Path) -> None:
    spec = small_spec((100, 0), (100, 0), (100, 0))
    with parts(ssd_dir, "ssd", spec=spec) as p, pytest.raises(AssertionError):
        memory = aligned(torch.zeros(spec.units[1].num_elements + 8, dtype=torch.bfloat16))
        p.transfer.write(spec.units[1], "hi", memory[8:])
