"""The machine that a plan is made for: this one, or one that somebody thinks of buying. Rates and
budgets."""

from dataclasses import dataclass
from shutil import disk_usage

import torch

from ratel.config import TrainConfig
from ratel.errors import RatelError
from ratel.hardware.device import require_device
from ratel.hardware.host import available_memory
from ratel.memory.resident import resident_bytes
from ratel.planner.machine.hardware import Hardware, load_hardware, machine_names, with_cap, with_ssds
from ratel.planner.search.request import Budgets
from ratel.runtime.planning.prepare import DRAM_MARGIN, GPU_MARGIN_BYTES, usable_bytes
from ratel.startup.known_hardware import AUTO, NONE, hardware_for
from ratel.units import GIB, MIB, format_bytes

PROCESS_BYTES = 2 * GIB
"""Python, PyTorch and CUDA's part of the process, with what it may grow by: 1.5 to 1.95 GiB on an
H200."""

CONTEXT_BYTES = 512 * MIB
"""GPU memory of CUDA itself. Assumed: it depends on the GPU and the driver, and is measured only
where a plan is for this machine."""

UNLIMITED = 1 << 60


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Budgets are bytes."""

    hardware: Hardware
    gpu_budget: int
    dram_budget: int
    ssd_budget: int | None
    """``None``: no SSDs."""
    capacities: tuple[int, ...]
    """Bytes of each SSD, as far as known."""
    notes: tuple[str, ...]
    """What was assumed."""

    @property
    def budgets(self) -> Budgets:
        return Budgets(gpu=self.gpu_budget, dram=self.dram_budget, ssd=self.ssd_budget, process_bytes=PROCESS_BYTES)


def machine_for(config: TrainConfig, *, hardware: Hardware | None = None, ssds: int | None = None,
                ssd_space: int | None = None) -> Machine:
    """``config.hardware`` (or ``hardware``) says which: ``auto`` is this machine, a name or a file
    another one. Then ``ssds`` says how many SSDs it has, and ``ssd_space`` how much they hold in
    all (default: enough).

    Raises RatelError where this machine has no GPU to plan for.
    """
    if hardware is None and config.hardware == NONE:
        raise RatelError("without the machine's numbers nothing is predicted", field="--hardware", value=NONE,
                         remedy=f"Name a machine: {', '.join(machine_names())}, or a file")
    if hardware is None and config.hardware == AUTO:
        if ssds is not None or ssd_space is not None:
            raise RatelError("is about a machine that is not this one", field="--ssds" if ssds is not None else "--ssd-space",
                             value=ssds or ssd_space, remedy="Give --ssd DIR[,DIR], or --hardware NAME as well")
        return _this_machine(config)
    return _other_machine(config, hardware or load_hardware(config.hardware), ssds, ssd_space)


def _this_machine(config: TrainConfig) -> Machine:
    device = require_device(config.device)
    if device.type != "cuda":
        raise RatelError("this machine has no GPU to plan for", field="--hardware", value=AUTO,
                         remedy=f"Name a machine: {', '.join(machine_names())}, or a file")
    hardware = hardware_for(AUTO, device, config.ssd, config.ssd_bandwidth, config.dram)
    free, _ = torch.cuda.mem_get_info(device)
    dram = config.dram or int(available_memory() * DRAM_MARGIN) + resident_bytes()
    return Machine(hardware=hardware, gpu_budget=config.gpu_memory or free - GPU_MARGIN_BYTES, dram_budget=dram,
                   ssd_budget=usable_bytes(config.ssd, (), hardware.stripe_weights),
                   capacities=tuple(disk_usage(path).total for path in config.ssd), notes=())


def _other_machine(config: TrainConfig, hardware: Hardware, ssds: int | None, ssd_space: int | None) -> Machine:
    if ssds is not None and config.ssd:
        raise RatelError("says again how many SSDs there are", field="--ssds", value=ssds, remedy="Leave out --ssd")
    count = ssds if ssds is not None else len(config.ssd) or len(hardware.ssds)
    if count != len(hardware.ssds):
        hardware = with_ssds(hardware, count)
    notes = []
    if config.gpu_memory is None:
        notes.append(f"GPU memory: {format_bytes(hardware.gpu_bytes)}, less {format_bytes(GPU_MARGIN_BYTES + CONTEXT_BYTES)} "
                     "for CUDA and as a margin")
    if config.dram is None:
        notes.append(f"DRAM: {DRAM_MARGIN:.0%} of {format_bytes(hardware.dram_bytes)}")
    if count and ssd_space is None:
        notes.append("SSD space: no limit was given, so there is none")
    return Machine(hardware=with_cap(hardware, config.ssd_bandwidth),
                   gpu_budget=config.gpu_memory or hardware.gpu_bytes - GPU_MARGIN_BYTES - CONTEXT_BYTES,
                   dram_budget=config.dram or int(hardware.dram_bytes * DRAM_MARGIN),
                   ssd_budget=(ssd_space or UNLIMITED) if count else None,
                   capacities=(ssd_space // count,) * count if ssd_space and count else (),
                   notes=tuple(notes))
