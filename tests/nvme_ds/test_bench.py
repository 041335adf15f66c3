"""The benchmark: that it measures what it says. Speed itself is not asserted, machines differ."""

import json
import os
from pathlib import Path

import pytest

import nvme_ds
from nvme_ds import AlignedBuffer, Engine, bench, native
from nvme_ds.reference import METHODS, reference_io
from tests.support.engines import KIB, MIB

pytestmark = pytest.mark.native


def available_methods() -> list[str]:
    return [method for method in METHODS if method == "threads" or native.library().uring_probe(8) == 0]


@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_a_small_run(backend: str, ssd_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ssd_dir / "result.json"
    folders = [ssd_dir / "a", ssd_dir / "b"]
    for folder in folders:
        folder.mkdir()
    bench.main([*map(str, folders), "--mib", "32", "--file-mib", "64", "--repeats", "2", "--backend", backend,
                "--json", str(target)])
    printed = capsys.readouterr().out
    result = json.loads(target.read_text())
    assert [row["pattern"] for row in result["results"]] == ["read", "write", "mixed"]
    for row in result["results"]:
        assert set(row["all_bps"]) == {"engine", *available_methods()}
        assert row["percent"] == pytest.approx(100 * row["engine_bps"] / row["reference_bps"])
        assert f"{row['percent']:.1f}%" in printed
    assert all(os.listdir(folder) == [] for folder in folders)


@pytest.mark.parametrize("method", available_methods())
@pytest.mark.parametrize("pattern, changed", [
    ("read", (False, False)), ("write", (True, True)), ("mixed", (False, True)),
])
def test_the_reference_covers_its_region(method: str, pattern: str, changed: tuple[bool, bool], ssd_dir: Path) -> None:
    with Engine() as engine:
        volume, memory = engine.create_volume([ssd_dir], "v", 4 * MIB, direct="on"), AlignedBuffer(4 * MIB)
        memory.view[:2 * MIB], memory.view[2 * MIB:] = b"L" * (2 * MIB), b"U" * (2 * MIB)
        engine.wait(engine.submit_write(volume, 0, memory.address, 4 * MIB, nvme_ds.WRITEBACK))
        seconds = reference_io(volume.paths, pattern, num_bytes=4 * MIB, region_bytes=4 * MIB, request_bytes=64 * KIB,
                               depth=4, memory_bytes=MIB, method=method)
        engine.wait(engine.submit_read(volume, 0, memory.address, 4 * MIB, nvme_ds.WEIGHT))
        for half, letter, expected in zip((0, 2 * MIB), (b"L", b"U"), changed):
            pages = range(half, half + 2 * MIB, 4096)
            assert {memory.view[page:page + 8] != letter * 8 for page in pages} == {expected}
    assert seconds > 0


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="file_bytes"):
        bench.IoBenchSpec(directories=("d",), file_bytes=100 * MIB)
