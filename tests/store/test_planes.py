"""Where planes are, and that what was written to a place is what is read from it, on every tier."""

import os
from pathlib import Path

import pytest
import torch

from ratel import native
from ratel.errors import DamagedError
from ratel.planner.plan import Plan
from ratel.store.encodings import DTYPES
from ratel.store.planes import Plane
from tests.support.stores import FROZEN, GRAIN, PLAIN, Parts, parts, random_plane

pytestmark = pytest.mark.native

MIXED = {"*": "ssd", "pre": "gpu", "post": "dram"}


def names_of(plan: Plan, index: int) -> tuple[str, ...]:
    return ("hi",) if not plan.spec.units[index].num_trainable else ("hi", "lo", "m", "v")


def test_each_plane_is_where_the_plan_placed_it(ssd_dir: Path) -> None:
    with parts(ssd_dir, MIXED, spec=FROZEN, optimizer="deferred", durable="step") as p:
        expected = {"pre": "gpu", "block.0": "ssd", "block.1": "ssd", "post": "dram"}
        for unit in FROZEN.units:
            for name in names_of(p.plan, unit.index):
                plane = p.store.plane(unit.index, name)
                trained = name in ("lo", "m", "v")
                assert (plane.name, plane.tier) == (name, expected[unit.name])
                assert plane.num_elements == (unit.num_trainable if trained else unit.num_elements)
                assert (plane.tensor is None) == (plane.tier == "ssd")
                assert plane.tensor is None or (plane.tensor.dtype == plane.dtype and plane.tensor.numel() == plane.num_elements
                                                and not plane.tensor.any())
                assert plane.num_bytes == plane.num_elements * (4 if name in ("m", "v") else 2)
        assert not p.store.has(2, "lo") and not p.store.has(2, "g") and p.store.has(1, "g")
        assert p.store.grad_dtype == torch.bfloat16 and DTYPES["int16"] == torch.int16


def test_places_on_ssd_do_not_overlap_and_are_in_their_slot(ssd_dir: Path) -> None:
    gradients = {"*": {"hi": "ssd", "lo": "ssd", "m": "ssd", "v": "ssd", "g": "ssd"}}
    with parts(ssd_dir, gradients, optimizer="deferred", durable="step") as p:
        store, slot_bytes = p.store, p.plan.slot_layout.num_bytes
        for volume, slots, names in ((store.volume, range(2), ("hi", "lo", "m", "v")), (store.grad_volume, range(1), ("g",))):
            begins = [(store.offset(slot, u.index, name), store.plane(u.index, name).num_bytes)
                      for slot in slots for u in PLAIN.units for name in names]
            taken = sorted((begin, begin + num_bytes) for begin, num_bytes in begins)
            assert all(end <= begin for (_, end), (begin, _) in zip(taken, taken[1:])) and taken[-1][1] <= volume.num_bytes
            assert all(begin % 4096 == 0 for begin, _ in taken)
            assert all(store.volume_of(u.index, name) is volume for name in names for u in PLAIN.units)
        assert store.offset(1, 0, "hi") == slot_bytes and store.offset(0, 0, "hi", GRAIN) == 2 * GRAIN
        path, position = store.where(1, 1, "m", GRAIN)
        assert path in store.volume.paths and position == store.offset(1, 1, "m", GRAIN)  # one directory: one file
        assert store.where(0, 1, "g", 0)[0] in store.grad_volume.paths


def write_and_read(p: Parts, unit: int, name: str, seed: int) -> None:
    plane: Plane = p.store.plane(unit, name)
    values = random_plane(plane.dtype, plane.num_elements, seed)
    p.engine.wait(p.io.write(unit, name, 0, values, native.nvme_ds.OPTIMIZER))
    back = random_plane(plane.dtype, plane.num_elements, seed + 1)
    read = p.io.read(unit, name, 0, back, native.nvme_ds.WEIGHT)
    p.io.wait(read)
    assert torch.equal(back.view(torch.int16), values.view(torch.int16))


def test_bytes_come_back_and_a_wrong_one_is_said(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", optimizer="deferred") as p:
        for seed, (unit, name) in enumerate((u.index, name) for u in PLAIN.units for name in ("hi", "lo", "m", "v", "g")):
            write_and_read(p, unit, name, seed)
        path, position = p.store.where(0, 1, "v", GRAIN)
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, position)[0] ^ 1]), position)
            os.fsync(file.fileno())
        plane = p.store.plane(1, "v")
        read = p.io.read(1, "v", 0, random_plane(plane.dtype, plane.num_elements, 0), native.nvme_ds.WEIGHT)
        with pytest.raises(DamagedError, match="unit block.0, plane v, chunk 1 "):
            p.io.wait(read)


def test_a_read_is_of_the_version_that_was_current_when_it_began(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", durable="step") as p:
        count = p.store.plane(1, "hi").num_elements
        first, second = (random_plane(torch.bfloat16, count, seed) for seed in (1, 2))
        p.engine.wait(p.io.write(1, "hi", 0, first, 0))
        p.store.versions.advance(1)
        p.store.versions.include(1)
        p.store.versions.commit()
        p.engine.wait(p.io.write(1, "hi", 0, second, 0))  # to the other slot
        back = random_plane(torch.bfloat16, count, 3)
        read = p.io.read(1, "hi", 0, back, 0)
        p.store.versions.advance(1)
        p.io.wait(read)
        assert torch.equal(back, first)
        read = p.io.read(1, "hi", GRAIN, back[GRAIN:], 0)
        p.io.wait(read)
        assert torch.equal(back[GRAIN:], second[GRAIN:])
        p.engine.wait(p.io.write(1, "hi", 0, first, 0, slot=0))
        assert p.store.checksums.trained(0, 1, "hi").tolist() == p.store.checksums.compute(1, 0, first).tolist()


def test_a_trace_says_what_reading_and_checksums_took(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratel.memory.tracing.SHORTEST_S", 0.0)
    with parts(ssd_dir, "ssd") as p:
        values = random_plane(torch.bfloat16, p.store.plane(1, "hi").num_elements, 0)
        p.exchange.tracing.start()
        p.engine.wait(p.io.write(1, "hi", 0, values, 0))
        p.io.wait(p.io.read(1, "hi", 0, values, 0))
        assert sorted(span.name for span in p.exchange.tracing.stop()) == ["SSD read block.0", "checksum block.0", "checksum block.0"]


def test_an_early_update_that_is_kept_becomes_the_plane(ssd_dir: Path) -> None:
    with parts(ssd_dir, "dram", optimizer="speculative", early_units=2) as p:
        unit = next(iter(p.plan.early))
        assert p.store.second(unit, "g") is None
        old = {name: p.store.plane(unit, name).tensor for name in ("hi", "lo", "m", "v")}
        new = {name: p.store.second(unit, name) for name in old}
        assert not {t.data_ptr() for t in old.values()} & {t.data_ptr() for t in new.values()}
        p.store.keep_second(unit)
        for name in old:
            assert p.store.plane(unit, name).tensor is new[name] and p.store.second(unit, name) is old[name]


def test_frozen_parts_are_in_both_places(ssd_dir: Path) -> None:
    with parts(ssd_dir, "dram", spec=FROZEN, optimizer="speculative", early_units=3) as p:
        unit = 1
        assert unit in p.plan.early
        hi, trained = p.store.plane(unit, "hi").tensor, FROZEN.units[unit].num_trainable
        hi.fill_(3)
        p.store.complete_seconds()
        second = p.store.second(unit, "hi")
        assert second[trained:].eq(3).all() and not second[:trained].any() and len(second) > trained
