"""The machine as a session's planner takes it: measured before, named by the user, or measured now,
briefly."""

from dataclasses import asdict

import torch

from ratel.hardware import probe
from ratel.hardware.host import worker_cores
from ratel.planner.machine.hardware import Hardware, load_hardware, with_cap, with_ssds
from ratel.probe_cache import load, store
from ratel.startup import arena_ahead
from ratel.startup import readahead

BRIEF = probe.Effort(rate_s=0.15, copy_bytes=128 << 20, ssd_file_bytes=256 << 20, ssd_s=0.5, all_ssds_s=4.0, cuda_rows=(2, 8))
"""Some seconds, once per machine and directories, where nobody has run `ratel doctor --probe`. It
spares time, not memory: an optimizer on states of 0.5 GB was measured in the processor's cache, at
twice what steps attain (docs/log.md)."""

AUTO, NONE = "auto", "none"


def hardware_for(given: "str | Hardware", device: torch.device, directories: tuple[str, ...], cap_bps: float | None,
                 dram_bytes: int | None) -> Hardware | None:
    """``given``: a machine, its name or file; ``auto``: this one; ``none``: plan by the simple
    rule, without predicting. ``dram_bytes``: the run's budget, which measuring keeps to.

    On a CPU device, where nothing is transferred, ``auto`` is ``none``. Raises RatelError for a
    name that is not known, and a machine without SSDs where directories are given.
    """
    if given == NONE or (given == AUTO and device.type != "cuda"):
        return None
    if given == AUTO:
        found = _this_machine(device, directories, dram_bytes)
    else:
        found = given if isinstance(given, Hardware) else load_hardware(given)
        found = with_ssds(found, len(directories)) if len(found.ssds) != len(directories) else found
    return with_cap(found, cap_bps)


def _this_machine(device: torch.device, directories: tuple[str, ...], dram_bytes: int | None) -> Hardware:
    key = probe.key_of(device, directories, None)
    found = load(key, probe.Probe.from_json)
    if found is not None:
        return found.hardware
    brief = {**key, "effort": "brief", "ssd": [drive for _, *drive in key["ssd"]]}  # another folder is the same drive
    found = load(brief, probe.Probe.from_json)
    if found is None or _is_small(found, dram_bytes):
        readahead.wait()  # what is measured beside it would be kept for every later run
        arena_ahead.drop()  # it may fill the budget, and is mapped again in less time than measuring takes
        found = probe.measure(directories, None, device, BRIEF, dram_bytes=dram_bytes)
        store(brief, asdict(found))
    return found.hardware


def _is_small(found: probe.Probe, dram_bytes: int | None) -> bool:
    """A run with a small budget found it, and this one may measure on more than twice the
    memory."""
    with arena_ahead.paused() as ahead_bytes:
        room_bytes = probe.room(dram_bytes) + ahead_bytes
    return 2 * found.adam_params < probe.adam_params(worker_cores(), room_bytes, BRIEF)
