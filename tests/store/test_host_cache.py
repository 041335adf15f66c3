"""DRAM slots of weights: who shares one, who waits for one, and for whom one is left."""

import threading
from pathlib import Path

import pytest
import torch

from ratel.errors import DamagedError, WorkerError
from ratel.memory.jobs import in_thread
from ratel.planner.work import Buffers
from tests.support.patience import patience, wait_until
from tests.support.stores import GRAIN, PLAIN, Parts, parts, random_plane, small_spec

pytestmark = pytest.mark.native

FOUR = small_spec((100, 0), *[(3000, 0)] * 4, (100, 0))


def fill(p: Parts) -> dict[int, torch.Tensor]:
    values = {u.index: random_plane(torch.bfloat16, u.num_elements, u.index) for u in p.plan.spec.units}
    for unit in p.plan.spec.units:
        p.transfer.write(unit, "hi", values[unit.index])
    return values


def slots(count: int) -> Buffers:
    return Buffers(chunk_elements=GRAIN, host_weight_slots=count)


def test_what_is_asked_for_is_read_and_shared_until_the_last_release(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred") as p:
        values = fill(p)
        slot = p.cache.acquire(1, refs=2)
        p.cache.ready(slot)
        assert (slot.unit, slot.refs) == (1, 2) and torch.equal(p.cache.views(slot)["hi"], values[1])
        assert p.cache.shared_bytes == 0
        again = p.cache.acquire(1)
        assert again is slot and slot.refs == 3 and p.cache.shared_bytes == p.plan.host_weight_bytes(FOUR.units[1])
        for _ in range(2):
            p.cache.release(slot)
        assert p.cache.acquire(1) is slot
        for _ in range(2):
            p.cache.release(slot)
        assert slot.refs == 0
        before = p.engine.stats()["bytes_read"]
        new = p.cache.acquire(1)
        p.cache.ready(new)
        assert p.engine.stats()["bytes_read"] - before == 2 * FOUR.units[1].num_elements, "nothing is kept after the last release"
        assert torch.equal(p.cache.views(new)["hi"], values[1])
        p.cache.release(new)
        with pytest.raises(AssertionError, match="more often than acquired"):
            p.cache.release(new)


def test_who_finds_no_slot_waits_for_a_release(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, buffers=slots(2)) as p:
        fill(p)
        held = [p.cache.acquire(unit) for unit in (1, 2)]
        p.cache.acquire(0)  # the ends have slots of their own
        waiting = in_thread("waiter", p.cache.acquire, 3)
        assert not waiting._done.wait(0.1)
        p.cache.acquire(1)  # is held already: no slot is needed
        p.cache.release(held[1])
        assert waiting.result() is held[1] and held[1].unit == 3
        p.exchange.close()


def test_a_slot_is_left_to_units_that_are_read_before(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred", buffers=slots(2)) as p:
        fill(p)
        p.cache.expect_forward([2])
        first = p.cache.acquire_ahead(3)
        assert (first.unit, first.refs) == (3, 1)
        waiting = in_thread("waiter", p.cache.acquire_ahead, 4)  # the last slot is for unit 2, which is read before
        assert not waiting._done.wait(0.1)
        slot = p.cache.acquire(2)
        assert not waiting._done.wait(0.1)
        p.cache.release(slot)
        assert waiting.result().unit == 4
        p.cache.release(first), p.cache.release(waiting.result())
        p.cache.expect_forward([3])
        held = [p.cache.acquire_ahead(unit) for unit in (1, 2)]  # the pass comes to both before it comes to 3
        for slot in held:
            p.cache.release(slot)
        p.cache.expect_forward([0])  # of another class: its slots are others
        held = [p.cache.acquire_ahead(unit) for unit in (1, 2)]
        for slot in held:
            p.cache.release(slot)
        p.cache.expect_forward([1])
        held = [p.cache.acquire_ahead(2)]
        waiting = in_thread("waiter", p.cache.acquire_ahead, 3)
        assert not waiting._done.wait(0.1)
        p.cache.expect_no_forward()  # there is no next pass
        assert waiting.result().unit == 3
        p.exchange.close()


def test_what_may_be_forgotten_is_read_again_by_who_asks(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred", buffers=slots(3)) as p:
        values = fill(p)
        early = p.cache.acquire(1)
        p.cache.ready(early)
        p.cache.withdraw(early)
        p.cache.views(early)["hi"].zero_()
        other = p.cache.acquire(1)
        p.cache.ready(other)
        assert other is not early and torch.equal(p.cache.views(other)["hi"], values[1])
        p.cache.release(early)  # it is nobody's any more, and frees a slot
        assert p.cache.acquire(1) is other, "the copy that others hold stays the one that is found"
        assert {id(p.cache.acquire(unit)) for unit in (2, 3)} >= {id(early)}


def test_bytes_are_waited_for_once_and_a_damaged_one_ends_the_session(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred") as p:
        fill(p)
        slot = p.cache.acquire(1)
        threads = [threading.Thread(target=p.cache.ready, args=(slot,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(patience(10))
        assert not slot.reads and not p.exchange.failed
        p.store.checksums.trained(0, 2, "hi")[:] = 1
        with pytest.raises(DamagedError, match="unit block.1, plane hi"):
            p.cache.ready(p.cache.acquire(2))
        with pytest.raises(WorkerError, match="reading block.1 failed"):
            p.cache.acquire(3)


def test_a_waiter_is_woken_when_another_shares_its_unit(ssd_dir: Path) -> None:
    """Whoever takes what was expected to be read makes room for updates that were kept waiting."""
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred", buffers=slots(3)) as p:
        fill(p)
        p.cache.expect_forward([1])
        held = p.cache.acquire(2)
        p.cache.acquire_ahead(3)
        waiting = in_thread("waiter", p.cache.acquire_ahead, 4)
        assert not waiting._done.wait(0.1)
        p.cache.release(held)  # two are free, one of them for unit 1
        assert waiting.result().unit == 4
        wait_until(lambda: waiting._done.is_set())
        assert len(p.cache._free["block"]) == 1
        p.exchange.close()


def test_views_are_the_planes_that_live_on_ssd_one_after_the_other(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=PLAIN, optimizer="eager") as p:
        slot = p.cache.acquire(1)
        views, cursor = p.cache.views(slot), slot.buffer.data_ptr()
        assert list(views) == list(p.plan.weights_from_ssd(PLAIN.units[1]))
        for name, view in views.items():
            plane = p.store.plane(1, name)
            assert (view.data_ptr(), view.dtype, view.numel()) == (cursor, plane.dtype, plane.num_elements)
            cursor += plane.num_bytes
        assert cursor <= slot.buffer.data_ptr() + slot.buffer.numel()


def test_what_backward_leaves_to_an_update_is_taken_once(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR) as p:
        fill(p)
        slot = p.cache.acquire(1, refs=2)
        assert p.cache.take_left(1) is None
        p.cache.leave(1, slot)
        p.cache.release(slot)  # the gather's own hold
        assert p.cache.take_left(2) is None and p.cache.take_left(1) is slot and p.cache.take_left(1) is None
        assert slot.refs == 1


def test_an_updated_copy_is_kept_for_a_forward_pass_that_is_expected(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred", buffers=slots(2)) as p:
        fill(p)
        slot = p.cache.acquire(1)
        p.cache.keep_for_forward(slot)
        assert slot.refs == 1, "no pass is expected"
        p.cache.expect_forward([])
        p.cache.keep_for_forward(slot)
        p.cache.release(slot)  # the update is over
        assert slot.refs == 1
        p.cache.took_over(2)
        assert p.cache.acquire(1) is slot and slot.refs == 2
        p.cache.took_over(1)
        assert slot.refs == 1
        p.cache.took_over(1)
        assert slot.refs == 1, "it was taken over once"


def test_what_is_kept_for_a_pass_that_does_not_come_is_given_back(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred", buffers=slots(2)) as p:
        fill(p)
        p.cache.expect_forward([])
        kept = [p.cache.acquire_ahead(unit) for unit in (1, 2)]
        for slot in kept:
            p.cache.keep_for_forward(slot)
            p.cache.release(slot)
        waiting = in_thread("waiter", p.cache.acquire, 3)
        assert not waiting._done.wait(0.1)
        p.cache.expect_no_forward()
        assert waiting.result() in kept and sum(slot.refs for slot in kept) == 1
        p.cache.keep_for_forward(waiting.result())
        assert waiting.result().refs == 1


def test_nothing_is_changed_while_another_thread_has_the_lock(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred", buffers=slots(4)) as p:
        fill(p)
        held = {unit: p.cache.acquire(unit, refs=3) for unit in (1, 2, 3)}
        calls = [lambda: p.cache.acquire(4), lambda: p.cache.acquire_ahead(1), lambda: p.cache.expect_forward([]),
                 lambda: p.cache.leave(1, held[1]), lambda: p.cache.take_left(1), lambda: p.cache.keep_for_forward(held[2]),
                 lambda: p.cache.took_over(2), p.cache.expect_no_forward, lambda: p.cache.release(held[3]),
                 lambda: p.cache.withdraw(held[3])]
        for number, call in enumerate(calls):
            with p.exchange.lock:
                job = in_thread("other", call)
                assert not job._done.wait(0.03), f"call {number} did not take the lock"
            job.result()


def test_one_thread_at_a_time_waits_for_the_reads_of_a_slot(ssd_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred") as p:
        fill(p)
        slot, waited, inside, may_go = p.cache.acquire(1), [], threading.Event(), threading.Event()
        wait = p.io.wait

        def slowly(read: object) -> None:
            waited.append(read)
            inside.set()
            assert may_go.wait(patience(10))
            wait(read)

        monkeypatch.setattr(p.io, "wait", slowly)
        first = in_thread("first", p.cache.ready, slot)
        assert inside.wait(patience(10))
        second = in_thread("second", p.cache.ready, slot)
        assert not second._done.wait(0.05)
        may_go.set()
        first.result(), second.result()
        assert len(waited) == 1 and not slot.reads


def test_an_update_goes_on_when_the_pass_has_come_to_what_was_read_before(ssd_dir: Path) -> None:
    with parts(ssd_dir, "ssd", spec=FOUR, optimizer="deferred", buffers=slots(3)) as p:
        fill(p)
        p.cache.acquire(1), p.cache.acquire(2)
        p.cache.expect_forward([1])
        waiting = in_thread("update", p.cache.acquire_ahead, 4)
        assert not waiting._done.wait(0.1)
        p.cache.acquire(1)
        assert waiting.result().unit == 4


def test_planes_that_share_a_slot_lie_beside_each_other(ssd_dir: Path) -> None:
    """Sessions in fp32 gather both halves of the master."""
    with parts(ssd_dir, "ssd", spec=FOUR, dtype="fp32") as p:
        values = {name: random_plane(p.store.plane(1, name).dtype, FOUR.units[1].num_elements, seed) for seed, name in enumerate(("hi", "lo"))}
        for name, plane in values.items():
            p.transfer.write(FOUR.units[1], name, plane)
        slot = p.cache.acquire(1)
        p.cache.ready(slot)
        assert {name: torch.equal(view, values[name]) for name, view in p.cache.views(slot).items()} == {"hi": True, "lo": True}
