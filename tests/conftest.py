"""What every test shares: one tier marker each, one thread, a real SSD directory, and no GPU test without a GPU.

Tiers are registered in pyproject.toml. ``RATEL_REQUIRE_GPU=1`` turns the missing device from a skip into a failure;
``RATEL_TEST_SSD`` puts the test files on a file system of choice (``/tmp`` may be memory);
``RATEL_TEST_PATIENCE`` scales every time limit (patience.py).
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported anywhere: tests run beside each other on few cores, and subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is measured while tests run beside each other is of no use to anyone later.
_CACHE = tempfile.TemporaryDirectory(prefix="ratel-test-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

import signal

import pytest

from tests.support.patience import patience

# A shell that starts something in the background has it ignore SIGINT, and so would all that is tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TIERS = {"unit", "native", "numerics", "gpu", "e2e"}


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


def _limit_in_proportion(item: pytest.Item) -> None:
    """As much longer as this machine is given for everything that it waits for."""
    if item.config.getoption("timeout", None) is None:
        marked = item.get_closest_marker("timeout")
        seconds = marked.args[0] if marked else float(item.config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    untiered = [item.nodeid for item in items if not TIERS & {mark.name for mark in item.iter_markers()}]
    if untiered:
        raise pytest.UsageError(f"tests without a tier marker ({', '.join(sorted(TIERS))}): {', '.join(untiered[:10])}")
    # The longest tests first: one that begins last keeps a single core busy while the others have nothing left.
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
    for item in items:
        _limit_in_proportion(item)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and os.environ.get("RATEL_REQUIRE_GPU") != "1" and not _cuda_is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _threads_are_put_back() -> Iterator[None]:
    """Two threads of torch in two processes on two cores wait for each other by spinning: all later tests took 12 times
    as long."""
    yield
    torch = sys.modules.get("torch")
    assert torch is None or torch.get_num_threads() == 1, "put torch's threads back"


@pytest.fixture
def ssd_dir() -> Iterator[Path]:
    """An empty directory for store files, under ``RATEL_TEST_SSD`` where that is set."""
    with tempfile.TemporaryDirectory(prefix="ratel-test-", dir=os.environ.get("RATEL_TEST_SSD")) as path:
        yield Path(path)
