"""What tests of the I/O engine share: both backends, sizes, and directories for stripes. No tests here."""

from pathlib import Path

import pytest

from nvme_ds import native

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(params=["io_uring", "threads"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "io_uring" and native.library().uring_probe(8) != 0:
        pytest.skip("io_uring is forbidden or missing on this machine")
    return request.param


def directories(root: Path, count: int) -> list[str]:
    paths = [root / f"disk{i}" for i in range(count)]
    for path in paths:
        path.mkdir()
    return [str(path) for path in paths]
