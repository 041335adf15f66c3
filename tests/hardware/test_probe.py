"""The probe as a whole: what it measures, of what and with how much memory. Small sizes; no rate is
judged here."""

import json
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ratel import native
from ratel.errors import RatelError
from ratel.hardware import probe, ssd_rates, timing
from ratel.hardware.probe import Effort, Probe
from ratel.hardware.probe_report import render
from ratel.hardware.rates import AdamwRates
from ratel.memory.resident import peak_bytes, reset_peak
from ratel.startup import known_hardware as known
from ratel.startup.known_hardware import BRIEF
from ratel.units import GIB, MIB
from tests.support.probes import CPU, SMALL, cache, invented, tiny  # noqa: F401


@pytest.mark.native
def test_a_machine_is_measured(ssd_dir: Path, cache: Path) -> None:
    """On the CPU device, with two directories on one drive, which are slower together than twice
    one of them."""
    names = [str(ssd_dir / "a"), str(ssd_dir / "b")]
    found = probe.probe(directories=names, model=tiny(), device="cpu", effort=SMALL)
    hardware = found.hardware
    assert hardware.source == "measured" and hardware.name.endswith("CPU device") and len(hardware.ssds) == 2
    rates = {name: value for name, value in asdict(hardware).items() if name.endswith(("_bps", "_per_s", "flops"))}
    assert len(rates) == 8 and all(rate is None or rate > 1e6 for rate in rates.values()), rates
    assert all(rate > 1e6 for ssd in hardware.ssds for rate in asdict(ssd).values())
    assert 0 < hardware.adam_elsewhere <= 1
    assert hardware.gpu_half_tokens >= 0 and hardware.gpu_bytes == hardware.dram_bytes > 0
    assert [rows for rows, *_ in found.block_seconds] == [1, 2] and found.block_model == "llama"
    assert [list(Path(name).iterdir()) for name in names] == [[], []], "files are left behind"
    kept = [json.loads(file.read_text()) for file in cache.iterdir()]
    assert len([entry for entry in kept if "ssds" in json.dumps(entry["result"])]) == 1  # beside what was found out about the model
    assert str(found.block_seq_len) in render(found) and "SSD 2" in render(found)


@pytest.mark.unit
def test_a_session_measures_briefly_but_not_in_the_cache() -> None:
    assert BRIEF.rate_s < Effort().rate_s and BRIEF.ssd_s < Effort().ssd_s
    assert (BRIEF.adam_params, BRIEF.dram_bytes) == (Effort().adam_params, Effort().dram_bytes)
    assert BRIEF.adam_params & (BRIEF.adam_params - 1)  # no power of two


@pytest.mark.unit
def test_the_optimizer_is_measured_on_as_much_memory_as_a_session_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(threads: int, free_bytes: int, dram_bytes: int | None = None) -> int:
        monkeypatch.setattr(probe, "available_memory", lambda: free_bytes)
        return 14 * probe.adam_params(threads, probe.room(dram_bytes), Effort())

    monkeypatch.setattr(probe, "resident_bytes", lambda: 1 * GIB)
    assert 40e9 < taken(15, 200 * GIB) <= taken(64, 1000 * GIB) < 50e9
    assert taken(15, 30 * GIB) <= 10 * GIB and taken(2, 200 * GIB) < 6e9
    assert 4.9 * GIB < taken(15, 200 * GIB, 16 * GIB) <= 5 * GIB and taken(15, 3 * GIB, 16 * GIB) <= 1 * GIB
    assert 50 * MIB < taken(15, 200 * GIB, 1 * MIB) < 100 * MIB  # rates there must be


@pytest.mark.native
def test_measuring_keeps_to_the_budget(cache: Path) -> None:
    effort = replace(SMALL, dram_bytes=Effort().dram_bytes, adam_params=Effort().adam_params)
    reset_peak()
    before = peak_bytes()
    found = probe.measure((), tiny(), CPU, effort, dram_bytes=before + GIB)
    assert peak_bytes() < before + GIB and found.adam_params * 14 > 0.2 * GIB


@pytest.mark.unit
def test_what_a_small_budget_found_is_measured_again_for_a_large_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[int | None] = []

    def measure(directories: tuple[str, ...], model: Any, device: torch.device, effort: Effort, *,
                dram_bytes: int | None) -> Probe:
        budgets.append(dram_bytes)
        rate = 10.0 + len(budgets)
        return invented(hardware=replace(invented().hardware, adam_params_per_s=rate),
                        adam_params=probe.adam_params(16, probe.room(dram_bytes), effort))

    monkeypatch.setattr(probe, "measure", measure)
    monkeypatch.setattr(probe, "available_memory", lambda: 120 * GIB)
    monkeypatch.setattr(known, "worker_cores", lambda: 16)
    rates = [known._this_machine(CPU, (), dram).adam_params_per_s for dram in (16 * GIB, 24 * GIB, 100 * GIB, 16 * GIB, None)]
    assert budgets == [16 * GIB, 100 * GIB] and rates == [11.0, 11.0, 12.0, 12.0, 12.0]
    probe.store(probe.key_of(CPU, (), None), asdict(invented()))  # by `ratel doctor --probe`: taken as it is
    assert known._this_machine(CPU, (), None).adam_params_per_s == 11.0 and len(budgets) == 2


@pytest.mark.native
def test_an_update_elsewhere_leaves_what_it_reads() -> None:
    with AdamwRates(2, 1000) as rates:
        before = [plane.clone() for plane in rates._planes]
        assert rates.elsewhere(0.0) > 0
        half = 1000 // 2 // 64 * 64
        assert all(torch.equal(now[:half], then[:half]) for now, then in zip(rates._planes, before))
        assert all(not torch.equal(now[half:], then[half:]) for now, then in list(zip(rates._planes, before))[3:])
        assert rates.in_place(0.0) > 0
        assert not torch.equal(rates._planes[3][:half], before[3][:half])


@pytest.mark.native
def test_no_directory_is_no_ssd(cache: Path) -> None:
    hardware = probe.probe(model=tiny(), device="cpu", effort=SMALL).hardware
    assert hardware.ssds == () and hardware.ssd_limit_bps is None


@pytest.mark.native
def test_a_directory_without_direct_io_is_refused(monkeypatch: pytest.MonkeyPatch, ssd_dir: Path) -> None:
    real = native.nvme_ds.Engine

    def without_direct(**options: Any) -> Any:
        engine = real(**options)
        engine.inject(no_direct=True)
        return engine

    monkeypatch.setattr(native.nvme_ds, "Engine", without_direct)
    with pytest.raises(RatelError, match="--ssd: its speed cannot be measured.*O_DIRECT"):
        ssd_rates.measure_ssds((str(ssd_dir),), 32 * MIB, 0.01)
    assert list(ssd_dir.iterdir()) == []


@pytest.mark.native
def test_an_error_beside_a_measurement_is_not_hidden() -> None:
    """A thread that keeps the link busy fails: the measurement beside it is not a measurement."""
    def fail() -> None:
        raise OSError("the link is gone")

    with pytest.raises(OSError, match="the link is gone"), timing.repeated_beside(fail):
        time.sleep(0.05)
    assert "ratel-probe" not in [thread.name for thread in threading.enumerate()]
