"""Counts what is spilled. No tests here."""

from collections.abc import Callable
from typing import Any

import pytest

from ratel.runtime.blocks.spiller import Spiller


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many storages have left the GPU, and how many have come back."""
    counts = {"_send": 0, "_fetch": 0}

    def counting(name: str) -> Callable:
        real = getattr(Spiller, name)

        def call(self: Spiller, what: Any) -> Any:
            counts[name] += 1
            return real(self, what)

        return call

    for name in counts:
        monkeypatch.setattr(Spiller, name, counting(name))
    return counts
