"""The probe: what it measures, and that it measures again exactly when it must. Small sizes; no
rate is judged here."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ratel import cli, models, native
from ratel.errors import RatelError
from ratel.hardware import block_rates, probe, ssd_rates, timing
from ratel.hardware.copies import Link, measure_device_memory, measure_dram
from ratel.hardware.probe import Effort, Probe
from ratel.hardware.probe_report import render
from ratel.hardware.rates import AdamwRates
from ratel.memory.resident import peak_bytes, reset_peak
from ratel.planner.machine.hardware import Hardware, Ssd
from ratel.startup import known_hardware as known
from ratel.startup.known_hardware import BRIEF
from ratel.units import GIB, KIB, MIB

CPU = torch.device("cpu")
SMALL = Effort(rate_s=0.01, dram_bytes=3 * MIB, adam_params=1 << 16, copy_bytes=256 * KIB, ssd_file_bytes=32 * MIB,
               ssd_s=0.02, cpu_rows=(1, 2), cpu_positions=8)


def tiny() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ratel" / "hardware"


def invented(**changes: Any) -> Probe:
    hardware = Hardware(name="box", source="measured", gpu_bytes=1, gpu_flops=2e12, gpu_half_tokens=3.5, gpu_bps=4.0,
                        h2d_bps=5.0, d2h_bps=6.0, duplex_bps=7.0, dram_bytes=8, dram_bps=9.0, cores=10,
                        adam_params_per_s=11.0, ssds=(Ssd(read_bps=1.5, write_bps=2.5, mixed_bps=2.0),),
                        ssd_limit_bps=12.0)
    return replace(Probe(hardware=hardware, adam_beside_copies_params_per_s=1e9, block_model="m", block_seq_len=8,
                         block_seconds=((1, 0.1, 0.2), (2, 0.15, 0.3)), adam_params=1_000_000, seconds=42.0), **changes)


# --- all of it ------------------------------------------------------------------------------------------------------


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


# --- the cache ------------------------------------------------------------------------------------------------------


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


# --- its parts ------------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_the_curve_is_found_again() -> None:
    flops_per_token, rate, half = 1e9, 4e14, 400.0
    points = [(n, (n + half) * flops_per_token / rate) for n in (512, 1024, 8192, 16384)]
    assert block_rates.fit_saturation(points, flops_per_token) == pytest.approx((rate, half), rel=1e-6)


@pytest.mark.unit
@pytest.mark.parametrize("points", [[(100, 1.0)], [(100, 1.0), (200, 2.1), (400, 4.4)]], ids=["one", "bent upwards"])
def test_without_a_start_the_curve_is_a_line(points: list[tuple[float, float]]) -> None:
    rate, half = block_rates.fit_saturation(points, 1.0)
    assert half == 0.0 and 90 <= rate <= 100


class Work(TorchDispatchMode):
    """Seconds by the numbers that operations make, ten million in each."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = op(*args, **(kwargs or {}))
        self.seconds += sum(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)) / 1e7
        return made


@pytest.mark.unit
def test_a_block_is_timed_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by what is computed."""
    work = Work()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: work.seconds)
    parts = models.load(tiny(), dtype=torch.float32, device=CPU)
    state = torch.get_rng_state()
    batches = [(rows, {"input_ids": torch.zeros(rows, 16, dtype=torch.long)}) for rows in (1, 64)]
    with work:
        (_, small_s, _), (_, large_s, backward_s) = points = block_rates.measure_block(parts, batches, CPU, limit_s=0.1)
    assert [rows for rows, *_ in points] == [1, 64] and 0 < small_s < large_s < backward_s
    assert torch.equal(torch.get_rng_state(), state)
    assert all(grad is None for unit in parts.spec.units for grad in parts.parameters.take_grads(unit.index))
    parts.close()


@pytest.mark.unit
def test_flops_of_a_block_are_those_of_its_matrices() -> None:
    parts = models.load(tiny(), dtype=torch.float32, device=CPU)
    found = block_rates.forward_flops(parts, {"input_ids": torch.zeros(2, 16, dtype=torch.long)}, CPU)
    tokens, matrices = 2 * 16, 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    attention = 2 * 2 * 2 * 16 * 16 * 64  # QK' and PV of two rows, without taking the mask off; not counted everywhere
    assert 2 * tokens * matrices <= found <= 2 * tokens * matrices + attention
    parts.close()


@pytest.mark.unit
def test_sizes_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = models.load(tiny(), dtype=torch.float32, device=CPU)
    batches = [(rows, {"input_ids": torch.zeros(rows, 8, dtype=torch.long)}) for rows in (1, 2, 3)]
    real: Callable[..., Any] = block_rates._time_both

    def time_both(parts: Any, batch: Any, *rest: Any) -> Any:
        if batch["input_ids"].shape[0] >= most:
            raise torch.OutOfMemoryError("full")
        return real(parts, batch, *rest)

    monkeypatch.setattr(block_rates, "_time_both", time_both)
    most = 3
    assert [rows for rows, *_ in block_rates.measure_block(parts, batches, CPU, limit_s=0.001)] == [1, 2]
    most = 1
    with pytest.raises(torch.OutOfMemoryError):
        block_rates.measure_block(parts, batches, CPU, limit_s=0.001)
    parts.close()


@pytest.mark.unit
def test_the_largest_block_is_the_one_that_counts() -> None:
    class Uneven(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Layer(width) for width in (16, 64, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    class Layer(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, width), torch.nn.Linear(width, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x))

    parts = models.load(Uneven(), dtype=torch.float32, device=CPU, loss_fn=lambda model, batch: model(batch).sum())
    batch = torch.zeros(3, 8)
    parts.probe(batch)
    assert block_rates.largest_block(parts) == 1
    assert block_rates.forward_flops(parts, batch, CPU) == 2 * 3 * 2 * 8 * 64
    assert block_rates.forward_flops(parts, batch, CPU, block=0) == 2 * 3 * 2 * 8 * 16
    parts.close()


@pytest.mark.unit
def test_repeats_fill_the_time_and_report_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs by what is done: every call takes a second, one of them a hundred."""
    now, calls = [0.0], [0]

    def action() -> None:
        calls[0] += 1
        now[0] += 100.0 if calls[0] == 4 else 1.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.median_seconds(action, limit_s=105.0) == 1.0
    assert calls[0] >= 5
    assert timing.median_seconds(action, limit_s=0.5) == 1.0


@pytest.mark.native
def test_copies_go_both_ways(tmp_path: Path) -> None:
    with native.op_ds.Pool(2) as pool:
        link = Link(CPU, pool, 1 * MIB)
        assert all(rate > 1e6 for rate in link.rates(0.01))
        link.close()
        assert measure_dram(pool, 3 * MIB, 0.03) > 1e6
    assert measure_device_memory(CPU, MIB, 0.01) > 1e6


@pytest.mark.native
def test_a_limit_that_drives_share_is_found() -> None:
    """Drives that take turns move no more together than one alone; drives that do not have no
    common limit."""
    class Drive:
        """It says how long it took: as long as it has to wait for the other, and then for
        itself."""

        def __init__(self, others: list[float]) -> None:
            self.others = others

        def run(self, pattern: str, num_bytes: int) -> float:
            with lock:
                self.others.append(0.1)
                return sum(self.others)

    lock = threading.Lock()
    ssds = (Ssd(read_bps=1e9, write_bps=1e9, mixed_bps=ssd_rates.TICKET_BYTES * 20.0),) * 2
    turns: list[float] = []
    shared = ssd_rates._shared_limit([Drive(turns), Drive(turns)], ssds, 0.1)
    assert shared is not None and shared < 0.75 * sum(ssd.mixed_bps for ssd in ssds)
    assert ssd_rates._shared_limit([Drive([]), Drive([])], ssds, 0.1) is None


@pytest.mark.gpu
def test_a_gpu_is_measured(cache: Path) -> None:
    found = probe.probe(model="llama-160m", device="cuda", effort=replace(SMALL, cuda_rows=(1, 2), cuda_positions=256))
    hardware = found.hardware
    assert hardware.gpu_bytes == torch.cuda.mem_get_info()[1] and "CPU device" not in hardware.name
    assert hardware.duplex_bps <= 1.2 * max(hardware.h2d_bps, hardware.d2h_bps)
    assert torch.cuda.get_device_name() in hardware.name and hardware.gpu_flops > 1e12


@pytest.mark.unit
def test_flops_of_shared_keys_and_values() -> None:
    """Four query heads on two of keys and values, as `enable_gqa` gives them to the kernel."""
    from torch.utils.flop_counter import FlopCounterMode

    from ratel.hardware.block_rates import _ATTENTION, _attention_flops

    query, key, value = torch.randn(3, 4, 8, 16), torch.randn(3, 2, 8, 16), torch.randn(3, 2, 8, 16)
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_ATTENTION, _attention_flops)) as counter:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1))
    assert counter.get_total_flops() == 4 * 3 * 4 * 8 * 8 * 16
    assert _attention_flops(query.shape, key.shape, value.shape) == 4 * 3 * 4 * 8 * 8 * 16
