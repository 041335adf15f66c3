"""What a run waits for longest, begun before PyTorch is imported: reading the weights, mapping
memory for states, and the GPU's context."""

from pathlib import Path

from ratel import probe_cache
from ratel.config import TrainConfig, planned_options
from ratel.hardware.host import available_memory, worker_cores
from ratel.memory.anonymous import region_bytes
from ratel.planner.formats import EXACT, EXACT_TRAINED_BYTES
from ratel.startup import arena_ahead
from ratel.startup import context_ahead
from ratel.startup import readahead
from ratel.units import GIB

_NVIDIA = Path("/dev/nvidiactl")
"""Where there is no such device the model computes on the CPU, and what a block takes is measured
in the process's memory."""

_STATES_PER_WEIGHT = EXACT_TRAINED_BYTES // EXACT["bf16"].compute.num_bytes(1)
"""Bytes of states and gradient for those of a bf16 weight. What the plan puts elsewhere is given
back."""

_PROCESS_BYTES = 4 * GIB
"""Left of the budget: Python, PyTorch and CUDA, and what they may grow by, take 1.5 to 2 GiB."""


def begin_ahead(config: TrainConfig) -> None:
    """In the background, once. A run that continues takes its weights from its state."""
    has_gpu = config.device != "cpu" and _NVIDIA.exists()
    if has_gpu:
        context_ahead.begin()
    files = [] if config.model is None else readahead.weight_files(config.model)
    if not files or config.resume:
        return
    free_bytes = available_memory()
    is_new = readahead.begin(files, free_bytes // 2)
    if is_new and config.tier in ("auto", "dram") and has_gpu:
        _begin_mapping(config, files, most=int(0.9 * free_bytes))


def _begin_mapping(config: TrainConfig, files: list[Path], most: int) -> None:
    """What the arena took in an earlier start; else what states may take at most."""
    threads = worker_cores()
    num_bytes = probe_cache.load(_key(config), lambda content: int(content["arena_bytes"]))
    if num_bytes is not None and region_bytes(num_bytes) <= most:
        arena_ahead.begin(region_bytes(num_bytes), threads, pins=True)
        return
    weight_bytes = sum(file.stat().st_size for file in files if file.is_file())
    budget = min(config.dram or most, most) - _PROCESS_BYTES  # a budget may be larger than the machine
    arena_ahead.begin(min(_STATES_PER_WEIGHT * weight_bytes, budget), threads)


def begin_kernels(config: TrainConfig) -> None:
    """Once PyTorch is imported, and before anything else is: the GPU's libraries load beside what
    follows. Not where their choice of kernels is to be restricted, which they ask about when they
    are first called."""
    if config.device != "cpu" and _NVIDIA.exists() and not config.deterministic:
        from ratel.startup import kernels_ahead

        kernels_ahead.begin("cuda:0")


def await_kernels() -> None:
    """A session must not meet them: it measures the GPU's memory."""
    from ratel.startup import kernels_ahead

    kernels_ahead.wait()


def remember_arena(config: TrainConfig, num_bytes: int) -> None:
    """For the next start with the same options."""
    probe_cache.store(_key(config), {"arena_bytes": num_bytes})


def _key(config: TrainConfig) -> probe_cache.Key:
    """The options that a plan depends on. With one that is missing, the arena would be taken for
    larger or smaller than it gets."""
    return {"arena of": {name: getattr(config, name) for name in planned_options(TrainConfig)}}


def end_ahead() -> None:
    """What nobody has taken is not wanted: the run is over, or was refused."""
    arena_ahead.drop()
    readahead.end()
