"""How long a thing takes when it is done again and again."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_GROUP_S = 0.02
_LARGEST_GROUP = 50
_LAUNCHES = 5


def median_seconds(action: Callable[[], object], *, limit_s: float, settle: Callable[[], object] = lambda: None,
                   between: Callable[[], object] | None = None) -> float:
    """Seconds of one call among many; ``settle`` waits for what the calls have started.

    Calls of a group follow each other without waiting, as in training, where the next kernel is
    launched while the last one runs. With ``between`` each call is timed by itself, after a call of
    that. The first call warms up and does not count. If the second takes ``limit_s`` by itself, it
    is the result; else at least two groups are timed, and then until ``limit_s``. The result is the
    median over the later half of them: a GPU takes a moment to reach its power limit, and from then
    on its clock is lower (an H200's by a tenth to a sixth).
    """
    action()
    settle()
    is_apart, between = between is not None, between or (lambda: None)
    between()
    second_s = _group_seconds(action, 1, settle)
    if second_s >= limit_s:
        return second_s
    calls = 1 if is_apart else max(1, min(_LARGEST_GROUP, int(_GROUP_S / max(second_s, 1e-9))))
    begin, found = time.perf_counter(), []
    while len(found) < 2 or time.perf_counter() - begin < limit_s:
        between()
        found.append(_group_seconds(action, calls, settle) / calls)
    return statistics.median(found[len(found) // 2 :])


def launch_seconds(action: Callable[[], object], *, settle: Callable[[], object]) -> float:
    """Seconds of the processor for one call that gives a device work: the median over pairs of
    calls that nothing waits for. Two calls in a row, so that a device's queue has room for both."""
    found = []
    for _ in range(_LAUNCHES):
        settle()
        begin = time.perf_counter()
        action()
        action()
        found.append((time.perf_counter() - begin) / 2)
    settle()
    return statistics.median(found)


def _group_seconds(action: Callable[[], object], calls: int, settle: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        action()
    settle()
    return time.perf_counter() - begin


@contextmanager
def repeated_beside(action: Callable[[], object]) -> Iterator[None]:
    """``action`` runs again and again in a thread of its own while the block runs; its error is
    raised at the end."""
    over, failures = threading.Event(), []

    def repeat() -> None:
        try:
            while not over.is_set():
                action()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=repeat, name="ratel-probe", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]
