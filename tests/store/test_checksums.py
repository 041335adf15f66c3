"""Checksums against zlib, grain by grain; and that one wrong bit is named with its place."""

import zlib

import numpy as np
import pytest
import torch

from ratel import native
from ratel.errors import DamagedError
from ratel.planner.slot_layout import segments
from ratel.store.checksums import Checksums
from tests.support.stores import FROZEN, GRAIN, PLAIN, random_plane, small_spec

pytestmark = pytest.mark.native

MIXED = 1
"""The unit of FROZEN of which a part is trained."""


@pytest.fixture
def pool() -> "native.op_ds.Pool":
    with native.op_ds.Pool(1) as threads:
        yield threads


def made(pool: "native.op_ds.Pool", spec=FROZEN, num_slots: int = 2, enabled: bool = True) -> Checksums:
    checksums = Checksums(spec, pool, grain=GRAIN, num_slots=num_slots, enabled=enabled)
    for unit in spec.units:
        checksums.add(unit.index, "hi", unit.num_elements)
    return checksums


def sums(values: torch.Tensor) -> list[int]:
    return [zlib.crc32(part.contiguous().view(torch.uint8).numpy()) for part in values.split(GRAIN)]


def never_asked(element: int) -> tuple[str, int]:
    raise AssertionError("nothing is wrong")


def test_sums_are_zlibs_and_grains_end_with_the_trained_part(pool) -> None:
    spec = small_spec((100, 0), (3000, 0), (100, 0))
    unit = spec.units[1]
    values = random_plane(torch.bfloat16, unit.num_elements, 0)
    found = made(pool, spec).compute(1, 0, values)
    assert found.tolist() == sums(values) and found.dtype == np.uint32 and len(found) == 2
    mixed = FROZEN.units[MIXED]
    values = random_plane(torch.bfloat16, mixed.num_elements, 1)
    trained, frozen = values[:mixed.num_trainable], values[mixed.num_trainable:]
    assert made(pool).compute(MIXED, 0, values).tolist() == sums(trained) + sums(frozen)
    assert made(pool).compute(MIXED, mixed.num_trainable, frozen).tolist() == sums(frozen)
    assert made(pool).compute(MIXED, GRAIN, values[GRAIN:]).tolist() == sums(trained[GRAIN:]) + sums(frozen)


def test_what_was_recorded_is_verified_in_its_slot_alone(pool) -> None:
    checksums, unit = made(pool, PLAIN), PLAIN.units[1]
    values = random_plane(torch.bfloat16, unit.num_elements, 2)
    checksums.record(1, 1, "hi", 0, values)
    checksums.verify(1, 1, "hi", 0, values, never_asked)
    checksums.verify(1, 1, "hi", GRAIN, values[GRAIN:], never_asked)
    assert checksums.trained(1, 1, "hi").tolist() == sums(values) and not checksums.trained(0, 1, "hi").any()
    with pytest.raises(DamagedError):
        checksums.verify(0, 1, "hi", 0, values, lambda element: ("file", element))


def test_a_part_is_recorded_where_it_begins(pool) -> None:
    checksums, unit = made(pool, PLAIN), PLAIN.units[1]
    values = random_plane(torch.bfloat16, unit.num_elements, 3)
    checksums.record(0, 1, "hi", 2 * GRAIN, values[2 * GRAIN:])
    checksums.record(0, 1, "hi", 0, values[: 2 * GRAIN])
    assert checksums.trained(0, 1, "hi").tolist() == sums(values)


@pytest.mark.parametrize("element", [0, GRAIN - 1, GRAIN, 3 * GRAIN - 1, 3 * GRAIN, 4 * GRAIN + 7])
def test_a_flipped_bit_is_named_with_unit_plane_chunk_and_place(element: int, pool) -> None:
    """The unit's frozen part begins at its fourth grain."""
    checksums, unit = made(pool), FROZEN.units[MIXED]
    values = random_plane(torch.bfloat16, unit.num_elements, 4)
    checksums.record(0, MIXED, "hi", 0, values)
    written = int(checksums.compute(MIXED, 0, values)[element // GRAIN])
    values.view(torch.int16)[element] ^= 1
    begin, asked = element // GRAIN * GRAIN, []

    def where(first: int) -> tuple[str, int]:
        asked.append(first)
        return "planes.0", 2 * first

    with pytest.raises(DamagedError) as caught:
        checksums.verify(0, MIXED, "hi", 0, values, where)
    assert asked == [begin]
    found = sums(values[begin : begin + GRAIN])[0]
    message = str(caught.value)
    assert f"damaged at byte {2 * begin}: unit block.0, plane hi, chunk {element // GRAIN} has checksum {found:08x}" in message
    assert f"{written:08x} was written" in message and "planes.0" in message
    begin_of_part = GRAIN if element >= GRAIN else 0
    with pytest.raises(DamagedError, match=f"chunk {element // GRAIN} has"):
        checksums.verify(0, MIXED, "hi", begin_of_part, values[begin_of_part:], where)


def test_zeros_are_right_in_every_slot_before_anything_is_written(pool) -> None:
    checksums = made(pool)
    for unit in FROZEN.units:
        checksums.record_zeros(unit.index, "hi", torch.bfloat16)
        zeros = torch.zeros(unit.num_elements, dtype=torch.bfloat16)
        for slot in range(2):
            for begin, end in segments(unit, unit.num_elements):
                checksums.verify(slot, unit.index, "hi", begin, zeros[begin:end], never_asked)


def test_an_earlier_runs_sums_are_of_what_is_trained_and_of_its_slot(pool) -> None:
    checksums, unit = made(pool), FROZEN.units[MIXED]
    values = random_plane(torch.bfloat16, unit.num_trainable, 5)
    checksums.restore(1, MIXED, "hi", checksums.compute(MIXED, 0, values))
    assert checksums.trained(1, MIXED, "hi").tolist() == sums(values) and not checksums.trained(0, MIXED, "hi").any()
    checksums.verify(1, MIXED, "hi", 0, values, never_asked)
    assert len(checksums.trained(0, 2, "hi")) == 0  # all of it is frozen


def test_what_is_frozen_has_one_place_whatever_the_slot(pool) -> None:
    checksums, unit = made(pool), FROZEN.units[MIXED]
    trained, frozen = (random_plane(torch.bfloat16, count, 6) for count in (unit.num_trainable, unit.num_elements - unit.num_trainable))
    checksums.record(1, MIXED, "hi", 0, trained)
    checksums.record(1, MIXED, "hi", unit.num_trainable, frozen)
    for slot in range(2):
        checksums.verify(slot, MIXED, "hi", unit.num_trainable, frozen, never_asked)
    assert not checksums.trained(0, MIXED, "hi").any()
    with pytest.raises(DamagedError):
        checksums.verify(0, MIXED, "hi", 0, trained, lambda element: ("file", element))


def test_switched_off_nothing_is_computed_or_compared(pool, monkeypatch: pytest.MonkeyPatch) -> None:
    checksums = made(pool, PLAIN, enabled=False)
    monkeypatch.setattr(checksums, "compute", lambda *_: pytest.fail("computed"))
    values = torch.ones(PLAIN.units[1].num_elements, dtype=torch.bfloat16)
    checksums.record(0, 1, "hi", 0, values)
    checksums.record_zeros(1, "hi", torch.bfloat16)
    checksums.verify(0, 1, "hi", 0, values, never_asked)
    assert not checksums.trained(0, 1, "hi").any()
