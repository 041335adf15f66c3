"""One lock, one failure, one end: whoever waits is woken, and hears what was first."""

import threading
import time

import pytest

from ratel import interrupt
from ratel.errors import NonFiniteError, WorkerError
from ratel.memory.exchange import Closed, Exchange, Mailbox, Worker, join_all
from ratel.memory.jobs import Job, in_thread
from tests.support.patience import patience, wait_until

pytestmark = pytest.mark.unit


def waiter(exchange: Exchange, condition: threading.Condition, ready=lambda: False) -> Job:
    """A thread that waits, for certain, when this returns."""
    asked = threading.Event()

    def look() -> bool:
        asked.set()
        return ready()

    def wait() -> None:
        with exchange.lock:
            exchange.wait_for(condition, look)

    job = in_thread("waiter", wait)
    assert asked.wait(patience(10))
    with exchange.lock:  # it is free again when the other waits
        return job


def test_a_waiter_goes_on_when_it_is_ready_and_not_before() -> None:
    exchange, state = Exchange(), []
    condition = exchange.condition()
    job = waiter(exchange, condition, lambda: bool(state))
    with exchange.lock:
        condition.notify_all()
    assert not job._done.wait(0.05)
    with exchange.lock:
        state.append(1)
        condition.notify_all()
    job.result()


@pytest.mark.parametrize("how", ["failure", "close"])
def test_everyone_is_woken_by_a_failure_and_by_the_end(how: str) -> None:
    exchange = Exchange()
    jobs = [waiter(exchange, exchange.condition()) for _ in range(3)]
    exchange.fail(ValueError("broken"), "the drill") if how == "failure" else exchange.close()
    for job in jobs:
        with pytest.raises(WorkerError if how == "failure" else Closed) as caught:
            job.result()
        assert how == "close" or ("the drill failed: broken. The session cannot go on" in str(caught.value)
                                  and isinstance(caught.value.__cause__, ValueError))
    assert exchange.failed == (how == "failure") and exchange.closed == (how == "close")


def test_nobody_begins_to_wait_or_goes_on_after_the_end() -> None:
    exchange = Exchange()
    condition = exchange.condition()
    exchange.close()
    with exchange.lock, pytest.raises(Closed):
        exchange.wait_for(condition, lambda: True)
    exchange.fail(ValueError("late"), "a thread")
    assert not exchange.failed, "what fails because of the end is no failure"


def test_the_main_thread_looks_up_from_its_waits_and_others_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, asked = Exchange(), []
    condition = exchange.condition()

    def woken(timeout: float | None = None) -> None:
        asked.append(timeout)

    monkeypatch.setattr(condition, "wait", woken)

    def wait() -> None:
        with exchange.lock:
            before = len(asked)
            exchange.wait_for(condition, lambda: len(asked) > before)

    wait()
    in_thread("other", wait).result()
    assert asked == [interrupt.POLL_S, None]


def test_nobody_is_told_anything_while_another_thread_has_the_lock() -> None:
    exchange = Exchange()
    mail = Mailbox(exchange)
    for call in (exchange.condition, lambda: mail.put(1), mail.take, lambda: exchange.fail(ValueError(), "x"), exchange.close):
        with exchange.lock:
            job = in_thread("other", call)
            assert not job._done.wait(0.03)
        job.result()
    assert exchange.closed and exchange.failed


def test_the_first_failure_is_the_one_that_is_told() -> None:
    exchange = Exchange()
    exchange.fail(NonFiniteError("not finite"), "step")
    exchange.fail(ValueError("a consequence"), "other")
    with pytest.raises(NonFiniteError, match="^not finite$") as caught:
        exchange.check()
    assert isinstance(caught.value.__cause__, NonFiniteError)


def test_a_wait_is_traced_with_its_cause_and_one_for_nothing_is_not() -> None:
    exchange, state = Exchange(), []
    condition = exchange.condition()
    exchange.tracing.start()

    def fill() -> None:
        time.sleep(0.05)
        with exchange.lock:
            state.append(1)
            condition.notify_all()

    for cause in ("slot", ""):
        state.clear()
        filler = in_thread("filler", fill)
        with exchange.lock:
            exchange.wait_for(condition, lambda: bool(state), cause, "block.1")
        filler.result()
    with exchange.lock:
        exchange.wait_for(condition, lambda: True, "nothing to wait for", "x")
    spans = exchange.tracing.stop()
    assert [(span.name, span.cause, span.lane) for span in spans] == [("slot block.1", "slot", "main waits")]
    assert spans[0].end_s - spans[0].begin_s > 0.03


def test_a_lock_left_behind_is_given_back_at_the_end_and_another_threads_is_not_taken() -> None:
    exchange = Exchange()
    exchange.lock.acquire()
    exchange.lock.acquire()
    exchange.close()
    assert in_thread("other", lambda: exchange.lock.acquire(timeout=patience(5))).result()


def test_a_worker_says_what_it_failed_with() -> None:
    exchange = Exchange()

    def fail() -> None:
        raise OSError("the disk is gone")

    worker = Worker("uploader", exchange, fail)
    assert worker.name == "ratel-uploader" and worker.daemon and join_all([worker], patience(5))
    with pytest.raises(WorkerError, match="the uploader thread failed: the disk is gone"):
        exchange.check()


@pytest.mark.parametrize("error", [Closed("end"), WorkerError("another failed")])
def test_an_end_and_anothers_failure_are_not_a_workers_own(error: BaseException) -> None:
    exchange = Exchange()

    def body() -> None:
        raise error

    assert join_all([Worker("x", exchange, body)], patience(5)) and not exchange.failed


def test_a_worker_keeps_nothing_alive_when_it_is_over() -> None:
    import weakref

    class Held:
        def body(self) -> None: ...

    held = Held()
    alive, worker = weakref.ref(held), Worker("x", Exchange(), held.body)
    assert worker.end(time.monotonic() + patience(5))
    del held
    assert alive() is None


def test_threads_are_joined_within_a_time_all_together() -> None:
    exchange, release = Exchange(), threading.Event()
    stuck, over = Worker("stuck", exchange, release.wait), Worker("over", exchange, lambda: None)
    wait_until(lambda: not over.is_alive())
    assert not join_all([stuck, over], 0.05) and join_all([over], 0)
    release.set()
    assert join_all([stuck, over], patience(5))
    ended = []
    itself = Worker("itself", exchange, lambda: ended.append(threading.current_thread().end(time.monotonic() + 1)))
    assert join_all([itself], patience(5)) and ended == [True] and not exchange.failed


def test_mail_is_taken_in_order_and_waited_for() -> None:
    exchange = Exchange()
    mail = Mailbox(exchange)
    mail.put("a", "b")
    mail.put("c")
    assert [mail.take() for _ in range(3)] == ["a", "b", "c"]
    job = in_thread("taker", mail.take)
    assert not job._done.wait(0.05)
    mail.put(None)
    assert job.result() is None
    job = in_thread("taker", mail.take)
    exchange.close()
    with pytest.raises(Closed):
        job.result()
