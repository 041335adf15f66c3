"""What was measured is remembered, for this machine, model and directory alone; and the command that shows it."""

import json
from pathlib import Path
from typing import Any

import pytest

from ratel import cli
from ratel.hardware import probe
from ratel.hardware.probe import Probe
from ratel.planner.machine.hardware import Hardware, Ssd
from tests.support.probes import cache, invented  # noqa: F401


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[tuple]:
    """In place of measurements: what was asked for, and invented numbers."""
    asked: list[tuple] = []

    def measure(directories: tuple[str, ...], model: Any, *_: Any) -> Probe:
        asked.append((directories, model))
        return invented(seconds=float(len(asked)))

    monkeypatch.setattr(probe, "measure", measure)
    return asked


@pytest.mark.unit
def test_what_was_measured_is_taken_again(measured: list[tuple], ssd_dir: Path) -> None:
    first = probe.probe(directories=[str(ssd_dir)], device="cpu")
    assert probe.probe(directories=[str(ssd_dir)], device="cpu") == first == invented(seconds=1.0)
    assert len(measured) == 1
    assert probe.probe(directories=[str(ssd_dir)], device="cpu", refresh=True).seconds == 2.0
    assert probe.probe(directories=[str(ssd_dir)], device="cpu").seconds == 2.0


CHANGES: dict[str, tuple[str, Any]] = {
    "the processor": ("ratel.hardware.probe.describe_cpu", lambda: {"model": "another", "cores": 1}),
    "the GPU": ("ratel.hardware.probe._gpu_name", lambda device: "another"),
    "the memory": ("ratel.hardware.probe._dram_bytes", lambda: 1 << 40),
    "PyTorch": ("torch.__version__", "9.9"),
    "the method": ("ratel.hardware.probe.METHOD", -1),
    "the drive": ("ratel.hardware.storage._mount_of", lambda path: ("/dev/another", "xfs")),
}


@pytest.mark.unit
@pytest.mark.parametrize("name", CHANGES)
def test_another_machine_is_measured(measured: list[tuple], ssd_dir: Path, monkeypatch: pytest.MonkeyPatch,
                                     name: str) -> None:
    probe.probe(directories=[str(ssd_dir)], device="cpu")
    with monkeypatch.context() as change:
        change.setattr(*CHANGES[name])
        probe.probe(directories=[str(ssd_dir)], device="cpu")
    assert len(measured) == 2
    probe.probe(directories=[str(ssd_dir)], device="cpu")
    assert len(measured) == 2, "the first machine was forgotten"


@pytest.mark.unit
def test_another_model_or_directory_is_measured(measured: list[tuple], ssd_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 1}')
    for model in (None, "demo", "llama-1b", str(folder)):
        probe.probe(model=model, device="cpu")
    (folder / "config.json").write_text('{"hidden_size": 2}')
    probe.probe(model=str(folder), device="cpu")
    probe.probe(directories=[str(ssd_dir), str(ssd_dir)], device="cpu")
    assert len(measured) == 6 and measured[-1] == ((str(ssd_dir),), None)


@pytest.mark.unit
@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"key": {}, "result": {}}'])
def test_a_damaged_file_is_measured_over(measured: list[tuple], cache: Path, damage: str) -> None:
    probe.probe(device="cpu")
    (file,) = cache.iterdir()
    file.write_text(damage)
    assert probe.probe(device="cpu").seconds == 2.0 and probe.probe(device="cpu").seconds == 2.0


@pytest.mark.unit
def test_fields_of_another_version_are_measured_over(measured: list[tuple], cache: Path) -> None:
    probe.probe(device="cpu")
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    content["result"]["hardware"]["warp_bps"] = 1.0
    file.write_text(json.dumps(content))
    assert probe.probe(device="cpu").seconds == 2.0


@pytest.mark.unit
def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(measured: list[tuple], tmp_path: Path,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    assert probe.probe(device="cpu").seconds == 1.0 and "cannot be kept" in caplog.text


@pytest.mark.unit
def test_hardware_survives_json() -> None:
    hardware = invented().hardware
    again = Hardware.from_json(json.loads(json.dumps(hardware.to_json())))
    assert again == hardware and isinstance(again.ssds[0], Ssd)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_doctor_prints_what_can_be_read_back(measured: list[tuple], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--probe", "--model", "demo", "--json"]) == 0
    assert Hardware.from_json(json.loads(capsys.readouterr().out)) == invented().hardware
    assert cli.main(["doctor", "--probe", "--model", "demo"]) == 0
    out = capsys.readouterr().out
    assert "2 TFLOP/s on blocks of m, half of it with 4 tokens" in out and "less than their sum" in out
    assert cli.main(["doctor", "--probe", "--model", "demo", "--refresh"]) == 0
    assert measured == [((), "demo")] * 2


@pytest.mark.unit
@pytest.mark.parametrize("flags", [["--model", "demo"], ["--refresh"], ["--probe", "--no-measure"]])
def test_flags_that_do_not_go_together(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *flags]) == 2
    assert "probe" in capsys.readouterr().err
