"""Measurements of a machine: brief ones, and invented ones. No tests here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ratel.hardware.probe import Effort, Probe
from ratel.planner.machine.hardware import Hardware, Ssd
from ratel.units import KIB, MIB

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
