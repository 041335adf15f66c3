"""What is begun before PyTorch is imported. No tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ratel.startup import ahead
from ratel.startup import arena_ahead
from ratel.startup import readahead
from ratel.units import MIB
from tests.startup.starts import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def asked_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes that runs have wanted mapped, as on a machine with an NVIDIA GPU."""
    asked, begin = [], arena_ahead.begin

    def noting(num_bytes: int, threads: int, *, pins: bool = False) -> None:
        asked.append(num_bytes)
        begin(min(num_bytes, 16 * MIB), threads, pins=pins)

    monkeypatch.setattr(readahead, "_current", None)
    monkeypatch.setattr(ahead, "_NVIDIA", Path("/"))
    monkeypatch.setattr(arena_ahead, "begin", noting)
    yield asked
    readahead.wait()  # it would note its end in the middle of another test
