"""Rates of the machine's pipes with two directions, and of DRAM, which everything shares."""

from dataclasses import dataclass

from ratel.planner.machine.hardware import Hardware
from ratel.planner.machine.stripes import striped


@dataclass(frozen=True, kw_only=True)
class Pipe:
    """Two directions, each with a rate alone and a rate while the other one runs, in bytes per
    second."""

    in_bps: float
    out_bps: float
    in_beside_bps: float
    out_beside_bps: float

    def seconds(self, bytes_in: float, bytes_out: float, *, first_in: float = 0, last_out: float = 0) -> tuple[float, float]:
        """Busy time of each direction where both start at once and the one with less to do is done
        first.

        ``first_in`` and ``last_out``: of these, the bytes that have the pipe for themselves, before
        and after."""
        both = max(min(bytes_in - first_in, bytes_out - last_out), 0)
        return (both / self.in_beside_bps + (bytes_in - both) / self.in_bps,
                both / self.out_beside_bps + (bytes_out - both) / self.out_bps)


def link(hardware: Hardware) -> Pipe:
    """PCIe between DRAM (``in``: to the GPU) and GPU memory."""
    return Pipe(in_bps=hardware.h2d_bps, out_bps=hardware.d2h_bps,
                in_beside_bps=min(hardware.duplex_bps, hardware.h2d_bps),
                out_beside_bps=min(hardware.duplex_bps, hardware.d2h_bps))


@dataclass(frozen=True, kw_only=True)
class SsdRates:
    """All devices together, in bytes per second. The device that is slowest for its share of the
    stripes sets the pace."""

    read_bps: float
    write_bps: float
    mixed_bps: float

    @property
    def pipe(self) -> Pipe:
        """Reads and writes take turns; what one of them cannot use the other one gets."""
        reads = min(self.read_bps, max(self.mixed_bps / 2, self.mixed_bps - self.write_bps))
        return Pipe(in_bps=self.read_bps, out_bps=self.write_bps, in_beside_bps=reads,
                    out_beside_bps=min(self.write_bps, self.mixed_bps - reads))

    def seconds(self, read: float, written: float) -> float:
        """Seconds of reads and writes at once. As long as both have work they share the mixed rate
        by halves; then one goes on alone."""
        both = min(read, written)
        alone = (read - both) / self.read_bps + (written - both) / self.write_bps
        return max(2 * both / self.mixed_bps + alone, read / self.read_bps, written / self.write_bps)


def ssd_rates(hardware: Hardware) -> SsdRates | None:
    if not hardware.ssds:
        return None
    limit = hardware.ssd_limit_bps or float("inf")
    read, write, mixed = (min(striped([getattr(ssd, name) for ssd in hardware.ssds], hardware.stripe_weights), limit)
                          for name in ("read_bps", "write_bps", "mixed_bps"))
    return SsdRates(read_bps=read, write_bps=write, mixed_bps=mixed)
