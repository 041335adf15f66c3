"""The parts of measuring a machine: curves, blocks, copies, limits that drives share."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ratel import models, native
from ratel.hardware import block_rates, probe, ssd_rates, timing
from ratel.hardware.copies import Link, measure_device_memory, measure_dram
from ratel.planner.machine.hardware import Ssd
from ratel.units import MIB
from tests.support.probes import CPU, SMALL, cache, tiny  # noqa: F401


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
