"""``ratel doctor --probe``: the numbers a planner needs of this machine, measured in under a
minute."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ratel import models, native
from ratel.hardware import block_rates, rates
from ratel.hardware.copies import Link, measure_device_memory, measure_dram
from ratel.hardware.device import choose_dtype, require_device
from ratel.hardware.host import available_memory, describe_cpu, describe_memory, usable_cores, worker_cores
from ratel.hardware.ssd_rates import measure_ssds
from ratel.hardware.storage import describe_directory
from ratel.hardware.timing import repeated_beside
from ratel.memory.resident import resident_bytes
from ratel.planner.formats import EXACT_TRAINED_BYTES, EXACT_UPDATE_BYTES
from ratel.planner.machine.hardware import Hardware
from ratel.probe_cache import Key, load, store
from ratel.reading import read_text
from ratel.units import GIB, MIB

METHOD = 7
"""Raised when what is measured, or how, changes: earlier results are then not used."""

_PARAMS_PER_THREAD = 200_000_000
"""Parameters that each thread of the optimizer updates in a measurement: it takes a second or
less."""

_LEAST_ROOM = 256 * MIB
"""Taken even of a budget that has none left: whether a run fits it is the planner's to say, which
needs rates."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is moved and for how long. Arrays are several times larger than the caches of
    current processors, of which there are half a GB in some. The optimizer's take as much memory as
    a session's might: on a virtual machine 3.8 GB of it were updated at 3.9 to 6.2 G param/s, by
    which they were, and 45 GB at 4.8 (h200_updates). No power of two: planes that begin at equal
    addresses modulo 256 MiB are updated half as fast as others (docs/log.md), and a model's do
    not."""

    rate_s: float = 0.5
    dram_bytes: int = 4 * GIB
    adam_params: int = 3_400_000_000
    """At most: 48 GB of states and gradients."""
    copy_bytes: int = 256 * MIB
    ssd_file_bytes: int = GIB
    ssd_s: float = 2.0
    all_ssds_s: float = 24.0
    """What the patterns of all directories may take; many directories get less than ``ssd_s`` for
    each pattern."""
    cuda_rows: tuple[int, ...] = (1, 2, 8, 16)
    cuda_positions: int = 1024
    cpu_rows: tuple[int, ...] = (1, 2, 4)
    cpu_positions: int = 32

    def rows(self, device: torch.device) -> tuple[tuple[int, ...], int]:
        return (self.cuda_rows, self.cuda_positions) if device.type == "cuda" else (self.cpu_rows, self.cpu_positions)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured: what a planner takes, and what explains it."""

    hardware: Hardware
    adam_beside_copies_params_per_s: float
    """The CPU optimizer while both directions of the link are busy."""
    block_model: str
    block_seq_len: int
    block_seconds: tuple[tuple[int, float, float], ...]
    """The form of ``BlockProfile.seconds``, for the largest block."""
    adam_params: int
    """That the CPU optimizer was measured on."""
    seconds: float
    """Seconds that the measurements took."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Probe":
        points = tuple(tuple(point) for point in content["block_seconds"])
        return cls(**{**content, "hardware": Hardware.from_json(content["hardware"]), "block_seconds": points})


def probe(*, directories: Sequence[str] = (), model: Any = None, device: str = "auto", refresh: bool = False,
          effort: Effort = Effort(), progress: Callable[[str], None] = lambda text: None) -> Probe:
    """Measure this machine, or take what was measured on it before with the same processor, GPU,
    directories, drives, model and versions. ``model``: whose block is timed, as
    ``ratel.models.load`` takes it; by default one of 4096 wide.

    Raises RatelError for a model, directory or device that cannot be used.
    """
    where, directories = require_device(device), tuple(dict.fromkeys(directories))
    key = key_of(where, directories, model)
    found = None if refresh else load(key, Probe.from_json)
    if found is None:
        found = measure(directories, model, where, effort, progress)
        store(key, asdict(found))
    return found


def measure(directories: tuple[str, ...], model: Any, device: torch.device, effort: Effort,
            progress: Callable[[str], None] = lambda text: None, *, dram_bytes: int | None = None) -> Probe:
    """All measurements, one after the other, so that none disturbs another. ``dram_bytes``: what
    the process may take in all; by default what is free."""
    begin, threads = time.perf_counter(), worker_cores()
    progress("blocks")
    block = _measure_block(model, device, effort)
    room_bytes = room(dram_bytes)
    num_params = adam_params(threads, room_bytes, effort)
    progress("memory")
    with _pool(usable_cores()) as pool:
        dram_bps = measure_dram(pool, min(effort.dram_bytes, room_bytes // 8), effort.rate_s)
        gpu_bps = measure_device_memory(device, effort.copy_bytes, effort.rate_s)
        progress("copies and the CPU optimizer")
        link = Link(device, pool, effort.copy_bytes)
        try:
            h2d_bps, d2h_bps, duplex_bps = link.rates(effort.rate_s)
            with rates.AdamwRates(threads, num_params) as optimizer:
                adam, elsewhere = optimizer.in_place(effort.rate_s), optimizer.elsewhere(effort.rate_s)
                with repeated_beside(link.both_to_the_end):
                    adam_beside = optimizer.in_place(effort.rate_s)
        finally:
            link.close()
    progress("SSDs")
    # Its copies through the caches tell less than the optimizer itself: 122 GB/s beside 136 on a
    # Xeon (docs/log.md).
    dram_bps = max(dram_bps, adam * EXACT_UPDATE_BYTES)
    patterns = 3 * len(directories) + 1
    ssds, limit_bps = measure_ssds(directories, effort.ssd_file_bytes, min(effort.ssd_s, effort.all_ssds_s / patterns))
    machine_bytes = _dram_bytes()
    hardware = Hardware(
        name=_name(device), source="measured", gpu_bytes=_gpu_bytes(device, machine_bytes), gpu_flops=block.flops,
        gpu_half_tokens=block.half_tokens, gpu_bps=gpu_bps, h2d_bps=h2d_bps, d2h_bps=d2h_bps, duplex_bps=duplex_bps,
        dram_bytes=machine_bytes, dram_bps=dram_bps, cores=usable_cores(), adam_params_per_s=adam,
        adam_elsewhere=min(1.0, elsewhere / adam), ssds=ssds, ssd_limit_bps=limit_bps)
    return Probe(hardware=hardware, adam_beside_copies_params_per_s=adam_beside, block_model=block.model,
                 block_seq_len=block.seq_len, block_seconds=block.seconds, adam_params=num_params, seconds=time.perf_counter() - begin)


# --- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Block:
    model: str
    seq_len: int
    seconds: block_rates.BlockSeconds
    flops: float
    half_tokens: float


def _measure_block(model: Any, device: torch.device, effort: Effort) -> _Block:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[choose_dtype(device)]
    parts = models.load(_wide_llama() if model is None else model, dtype=dtype, device=device)
    try:
        rows, seq_len = effort.rows(device)
        seq_len = min(seq_len, parts.spec.max_seq_len or seq_len)
        batches = [(count, _tokens(count, seq_len, device)) for count in rows]
        seconds = block_rates.measure_block(parts, batches, device, limit_s=effort.rate_s)
        row_flops = block_rates.forward_flops(parts, batches[0][1], device) / batches[0][0]
    finally:
        parts.close()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the allocator would keep what the largest micro-batch took
    # Forward, forward again for backward, and backward of twice its FLOPs.
    points = [(count * seq_len, forward + backward) for count, forward, backward in seconds]
    flops, half_tokens = block_rates.fit_saturation(points, 4 * row_flops / seq_len)
    return _Block(model="Llama, 4096 wide" if model is None else parts.name, seq_len=seq_len, seconds=seconds,
                  flops=flops, half_tokens=half_tokens)


def _tokens(rows: int, seq_len: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Any token will do: hidden states are drawn at random."""
    return {"input_ids": torch.zeros(rows, seq_len, dtype=torch.long, device=device)}


def _wide_llama() -> Any:
    """A block of 218 M parameters, the size of those of models with 8 B."""
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2,
                       num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)


# --- the machine ----------------------------------------------------------------------------------------------------


@contextmanager
def _pool(threads: int) -> Iterator[Any]:
    pool = native.op_ds.Pool(threads)
    try:
        yield pool
    finally:
        pool.close()


def room(dram_bytes: int | None) -> int:
    """Bytes that this process may still take, of a budget for all of it and of what is free."""
    free_bytes = available_memory()
    return free_bytes if dram_bytes is None else max(min(free_bytes, dram_bytes - resident_bytes()), _LEAST_ROOM)


def adam_params(threads: int, room_bytes: int, effort: Effort = Effort()) -> int:
    """Parameters that the optimizer is measured on: what a third of the room holds at most."""
    return min(effort.adam_params, threads * _PARAMS_PER_THREAD, room_bytes // (3 * EXACT_TRAINED_BYTES))


def _dram_bytes() -> int:
    memory = describe_memory()
    return min(memory["total_bytes"], memory["limit_bytes"] or memory["total_bytes"])


def _gpu_bytes(device: torch.device, dram_bytes: int) -> int:
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else dram_bytes


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU device"


def _name(device: torch.device) -> str:
    return f"{describe_cpu()['model']}, {_gpu_name(device)}"


def key_of(device: torch.device, directories: tuple[str, ...], model: Any) -> Key:
    """What a result depends on. A directory is the same as long as it is on the same device."""
    drives = [describe_directory(path) for path in directories]
    return {**processors_key(device), "dram_bytes": _dram_bytes(),
            "ssd": [[drive["path"], drive["device"], drive["file_system"]] for drive in drives],
            "model": None if model is None else _model_key(model)}


def processors_key(device: torch.device) -> Key:
    """What computation alone depends on."""
    return {"method": METHOD, "torch": str(torch.__version__), "cuda": torch.version.cuda, "cpu": describe_cpu(),
            "gpu": _gpu_name(device)}


def _model_key(model: Any) -> str:
    """Shapes decide: those of the configuration, where there is one on disk."""
    from pathlib import Path

    if not isinstance(model, (str, Path)):
        return repr(model)
    try:
        return read_text(Path(model).expanduser() / "config.json")
    except (OSError, ValueError):  # a preset, or a directory that is refused when it is read
        return str(model)
