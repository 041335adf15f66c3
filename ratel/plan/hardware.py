"""A machine in numbers, measured by the probe or written down from data sheets. Rates are bytes, FLOPs or parameters per second."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ssd:
    """One directory's device. ``mixed_bps`` is the sum of both directions while it reads and writes at once."""

    read_bps: float
    write_bps: float
    mixed_bps: float


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """``source`` says where the numbers come from: ``measured``, ``data sheet`` or ``paper``."""

    name: str
    source: str
    gpu_bytes: int
    gpu_flops: float
    """Attained in bf16 on transformer blocks that fill the GPU."""
    gpu_half_tokens: float
    """Tokens of a micro-batch at which a block attains half of that rate."""
    gpu_bps: float
    """GPU memory."""
    h2d_bps: float
    d2h_bps: float
    duplex_bps: float
    """Each way while both run."""
    dram_bytes: int
    dram_bps: float
    """Reads and writes together, whoever makes them."""
    cores: int
    adam_params_per_s: float
    """The CPU optimizer alone, with states in DRAM."""
    ssds: tuple[Ssd, ...] = ()
    ssd_limit_bps: float | None = None
    """What all SSDs together can move in both directions, where something (a controller, PCIe) limits their sum."""
