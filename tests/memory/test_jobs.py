"""Threads beside the main one: order, results, errors, and an end that leaves undone what nobody
has begun."""

import threading
import weakref

import pytest

from ratel import interrupt
from ratel.memory import jobs
from ratel.memory.jobs import Crew, Job, crew, in_thread
from tests.support.patience import patience

pytestmark = pytest.mark.unit


def test_a_result_or_what_it_failed_with() -> None:
    assert in_thread("adds", lambda a, b: a + b, 1, 2).result() == 3
    job = in_thread("fails", lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            job.result()
    names = [entry.name for entry in caught.traceback]
    assert names[-1] == "<lambda>" and "_outcome" not in names


def test_a_job_runs_in_a_daemon_with_its_name() -> None:
    thread = in_thread("ratel-x", threading.current_thread).result()
    assert thread.name == "ratel-x" and thread.daemon


def test_a_job_that_is_over_holds_nothing() -> None:
    class Held:
        def act(self) -> None: ...

    held = Held()
    alive, job = weakref.ref(held), Job(held.act)
    job.run()
    job.wait()
    del held
    assert alive() is None and job.result() is None


def test_a_wait_for_a_result_hears_signals_and_a_wait_for_an_end_does_not() -> None:
    may_end = threading.Event()
    job = in_thread("slow", may_end.wait, patience(30))
    with interrupt.watching():
        timer = threading.Timer(0.1, signal_itself)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            job.result()
        timer.join()
    assert not job._done.is_set()
    threading.Timer(0.1, may_end.set).start()
    job.wait()
    assert job._done.is_set() and job.result()


def signal_itself() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGINT)


def test_a_crew_takes_jobs_in_order_and_gives_results_in_order() -> None:
    taken: list[int] = []
    with crew(1, "ratel-crew") as threads:
        assert list(threads.map(lambda n: taken.append(n) or n * n, range(5))) == [0, 1, 4, 9, 16] and taken == list(range(5))
        assert threads.submit(threading.current_thread).result().name == "ratel-crew-0"


def test_all_of_a_crew_work_at_once() -> None:
    together = threading.Barrier(3)
    with crew(3, "ratel-crew") as threads:
        names = {name for name in threads.map(lambda _: together.wait(patience(10)) is not None and threading.current_thread().name, range(3))}
    assert names == {f"ratel-crew-{number}" for number in range(3)} and all(thread.daemon for thread in threads._threads)


def test_the_end_waits_for_what_was_begun_and_leaves_the_rest() -> None:
    begun, may_end, done = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        assert may_end.wait(patience(30))
        done.append("slow")

    threads = Crew(1, "ratel-crew")
    threads.submit(slow)
    never = threads.submit(done.append, "never")
    assert begun.wait(patience(10))
    threading.Timer(0.1, may_end.set).start()
    threads.close()
    assert done == ["slow"] and not never._done.is_set()
    assert not any(thread.is_alive() for thread in threads._threads)


def test_a_job_that_hangs_is_left_alone_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PATIENCE_S", 0.05)
    release, begun = threading.Event(), threading.Event()
    with crew(1, "ratel-crew") as threads:
        threads.submit(lambda: (begun.set(), release.wait(patience(30))))
        assert begun.wait(patience(10))
    assert threads._threads[0].is_alive()
    release.set()
