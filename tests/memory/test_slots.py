"""Buffers that are lent, and threads that give them back when what used them is over."""

import threading

import pytest
import torch

from ratel.errors import WorkerError
from ratel.memory.exchange import Closed, Exchange
from ratel.memory.jobs import in_thread
from ratel.memory.lanes import Event
from ratel.memory.retire import Retirer
from ratel.memory.slots import SlotPool
from tests.support.patience import patience

pytestmark = pytest.mark.unit


def test_slots_go_round_in_the_order_in_which_they_were_given_back() -> None:
    buffers = [torch.zeros(1), torch.ones(1)]
    pool = SlotPool(Exchange(), buffers)
    first, second = pool.acquire("a", "x"), pool.acquire("b", "y")
    assert [first.buffer, second.buffer] == buffers and first.pool is pool and second.pool is pool
    used = Event()
    pool.release(second, used)
    assert second.pool is None and second.last_use is used
    pool.release(first, Event())
    assert pool.acquire("c", "z") is second and pool.acquire("d", "w") is first


def test_who_finds_none_waits_and_a_trace_says_for_what() -> None:
    exchange = Exchange()
    pool = SlotPool(exchange, [torch.zeros(1)])
    slot = pool.acquire("slot", "a")
    exchange.tracing.start()
    job = in_thread("ratel-taker", pool.acquire, "upload", "block.2")
    assert not job._done.wait(0.05)
    pool.release(slot, Event())
    assert job.result() is slot and slot.pool is pool
    assert [(span.lane, span.name) for span in exchange.tracing.stop()] == [("taker waits", "upload block.2")]
    job = in_thread("taker", pool.acquire, "", "")
    exchange.close()
    with pytest.raises(Closed):
        job.result()


def test_a_retirer_acts_after_the_wait_in_order() -> None:
    exchange, may_end, done = Exchange(), threading.Event(), []
    retirer = Retirer("copies", exchange)
    retirer.when(lambda: may_end.wait(patience(30)) and done.append("waited"), lambda: done.append("first"))
    over = threading.Event()
    retirer.when_event(Event(), lambda: (done.append("second"), over.set()))
    assert not over.wait(0.05) and not done
    assert not retirer.join(0.02)
    may_end.set()
    assert over.wait(patience(10)) and done == ["waited", "first", "second"]
    exchange.close()
    assert retirer.join(patience(10)) and not exchange.failed


def test_an_event_is_waited_for() -> None:
    class Reached(Event):
        synchronized = False

        def synchronize(self) -> None:
            self.synchronized = True

    exchange, event, seen, over = Exchange(), Reached(), [], threading.Event()
    retirer = Retirer("copies", exchange)
    retirer.when_event(event, lambda: (seen.append(event.synchronized), over.set()))
    assert over.wait(patience(10)) and seen == [True]
    exchange.close()
    assert retirer.join(patience(10))


def test_what_a_retirer_fails_with_is_the_sessions_failure() -> None:
    exchange = Exchange()
    retirer = Retirer("writes", exchange)
    retirer.when(lambda: 1 // 0, lambda: pytest.fail("it went on"))
    assert retirer.join(patience(10))
    with pytest.raises(WorkerError, match="the writes thread failed: .*division"):
        exchange.check()
