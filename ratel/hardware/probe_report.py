"""A probe as lines of ``label  value``."""

from collections.abc import Iterator

from ratel.hardware.probe import Probe
from ratel.planner.machine.hardware import Hardware
from ratel.units import format_bytes


def render(probe: Probe) -> str:
    rows = [*_device_rows(probe), *_host_rows(probe), *_ssd_rows(probe.hardware)]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _device_rows(probe: Probe) -> Iterator[tuple[str, str]]:
    hardware = probe.hardware
    yield "machine", f"{hardware.name} (measured in {probe.seconds:.0f} s)"
    yield "device computes", (f"{hardware.gpu_flops / 1e12:.3g} TFLOP/s on blocks of {probe.block_model}, "
                              f"half of it with {hardware.gpu_half_tokens:.0f} tokens")
    for rows, forward_s, backward_s in probe.block_seconds:
        yield (f"  {rows} x {probe.block_seq_len} tokens",
               f"forward {forward_s * 1e3:.2f} ms, backward {backward_s * 1e3:.2f} ms")
    yield "device memory", f"{format_bytes(hardware.gpu_bytes)}, {_gb(hardware.gpu_bps)}"
    yield "link", (f"{_gb(hardware.h2d_bps)} down, {_gb(hardware.d2h_bps)} up, "
                   f"{_gb(hardware.duplex_bps)} each way at once")


def _host_rows(probe: Probe) -> Iterator[tuple[str, str]]:
    hardware = probe.hardware
    yield "DRAM", f"{format_bytes(hardware.dram_bytes)}, {_gb(hardware.dram_bps)} with {hardware.cores} cores"
    yield "CPU AdamW", (f"{hardware.adam_params_per_s / 1e9:.2f} G parameters/s, "
                        f"{probe.adam_beside_copies_params_per_s / 1e9:.2f} G while the link is busy, "
                        f"{hardware.adam_elsewhere:.0%} of that rate to other planes")


def _ssd_rows(hardware: Hardware) -> Iterator[tuple[str, str]]:
    for number, ssd in enumerate(hardware.ssds, start=1):
        yield f"SSD {number}", (f"read {_gb(ssd.read_bps)}, write {_gb(ssd.write_bps)}, "
                                f"both at once {_gb(ssd.mixed_bps)} in all")
    if hardware.ssd_limit_bps is not None:
        yield "  together", f"{_gb(hardware.ssd_limit_bps)}: less than their sum"


def _gb(rate_bps: float) -> str:
    return f"{rate_bps / 1e9:.2f} GB/s"
