"""What a session has taken is given back: threads, then the engine, then memory; and memory that a
dead device may write to is kept."""

import os

import pytest

from ratel.memory import holdings
from ratel.memory.exchange import Exchange
from ratel.memory.holdings import Holdings

pytestmark = pytest.mark.unit


class Taken:
    """Stands for all of it, and notes the order."""

    def __init__(self, log: list, *, ends: bool = True, answers: bool = True) -> None:
        self.log, self.ends, self.answers = log, ends, answers

    def join(self, timeout_s: float) -> bool:
        self.log.append(("join", timeout_s > 0))
        return self.ends

    def synchronize(self) -> None:
        self.log.append("synchronize")


class Engine(Taken):
    def close(self) -> None:
        self.log.append("engine closed")
        if not self.answers:
            raise TimeoutError

    def abandon(self) -> None:
        self.log.append("engine abandoned")


class Memory(Taken):
    def close(self) -> None:
        self.log.append("memory closed")

    def abandon(self) -> None:
        self.log.append("memory kept")


def held(log: list, *, ends: bool = True, answers: bool = True) -> Holdings:
    found = Holdings(Exchange())
    found.engine, found.arena, found.lanes = Engine(log, answers=answers), Memory(log), Taken(log)
    found.workers = [Taken(log, ends=ends), Taken(log)]
    return found


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("answers", [True, False])
def test_all_is_given_back_in_order_and_memory_only_where_nothing_writes_to_it(ends: bool, answers: bool) -> None:
    log: list = []
    holding = held(log, ends=ends, answers=answers)
    holding.close()
    expected = ["engine closed", *([] if answers else ["engine abandoned"]), ("join", True), ("join", True), "synchronize",
                "memory closed" if ends and answers else "memory kept"]
    assert log == expected and holding.exchange.closed
    holding.close()
    assert sum("memory" in str(entry) for entry in log) == 1


def test_what_was_not_taken_need_not_be_given_back() -> None:
    holding = Holdings(Exchange())
    holding.close()
    assert holding.exchange.closed


def test_all_threads_have_one_time_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "_PATIENCE_S", 0.0)
    log: list = []
    held(log).close()
    assert log[1:3] == [("join", False)] * 2


def test_a_forked_child_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list = []
    holding = held(log)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    holding.close()
    assert not log and not holding.exchange.closed
