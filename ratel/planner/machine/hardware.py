"""A machine in numbers, measured by the probe or written down from data sheets. Rates are bytes,
FLOPs or parameters per second."""

from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.planner.machine.stripes import Weights, stripe_weights
from ratel.reading import JsonError, read_json
from ratel.schema import Check, SchemaError, anything, check, listing, number, shown, text, whole

MACHINES = Path(__file__).parents[1] / "machines"


@dataclass(frozen=True, kw_only=True)
class Ssd:
    """One directory's device. ``mixed_bps`` is the sum of both directions while it reads and writes
    at once."""

    read_bps: float
    write_bps: float
    mixed_bps: float


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """``source`` begins with ``measured``, ``data sheet`` or ``paper`` and says where the numbers
    come from."""

    name: str
    source: str
    gpu_bytes: int
    gpu_flops: float
    """Attained in bf16 on transformer blocks that fill the GPU."""
    gpu_half_tokens: float
    """Tokens of a micro-batch at which a block attains half of that rate."""
    gpu_bps: float
    """Bytes/s of the GPU's memory."""
    h2d_bps: float
    d2h_bps: float
    duplex_bps: float
    """Bytes/s each way while both run."""
    dram_bytes: int
    dram_bps: float
    """Reads and writes together, whoever makes them."""
    cores: int
    adam_params_per_s: float
    """The CPU optimizer alone, with states in DRAM."""
    adam_elsewhere: float = 1.0
    """Share of that rate which it attains where it leaves what it reads and writes to other planes:
    updates that may have to be forgotten."""
    ssds: tuple[Ssd, ...] = ()
    ssd_limit_bps: float | None = None
    """What all SSDs together can move in both directions, where something (a controller, PCIe)
    limits their sum."""
    stripes: Weights = ()
    """Stripes of each SSD in one round, where that is not to be chosen by their speed: states lie
    on them already."""

    def update_share(self, *, elsewhere: bool) -> float:
        """The share of the CPU optimizer's and of DRAM's rate that updates attain, writing to other
        planes (``elsewhere``) or not."""
        return self.adam_elsewhere if elsewhere else 1.0

    @property
    def stripe_weights(self) -> Weights:
        return self.stripes or stripe_weights([ssd.mixed_bps for ssd in self.ssds])

    def __post_init__(self) -> None:
        for name in ("gpu_flops", "gpu_bps", "h2d_bps", "d2h_bps", "duplex_bps", "dram_bps", "adam_params_per_s", "adam_elsewhere"):
            _check_rate(name, getattr(self, name))
        for ssd in self.ssds:
            for name, rate in asdict(ssd).items():
                _check_rate(f"ssds.{name}", rate)
        if self.ssd_limit_bps is not None:
            _check_rate("ssd_limit_bps", self.ssd_limit_bps)
        for name, what in _AMOUNTS.items():
            _check(what, name, getattr(self, name))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ssds": [asdict(ssd) for ssd in self.ssds]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Hardware":
        """The inverse of ``to_json``. Raises RatelError that names a field which is unknown or
        missing."""
        _check_fields(cls, content, "hardware")
        ssds = []
        _check(listing(anything, most=_MOST_SSDS), "ssds", content.get("ssds", ()))
        _check(listing(anything, most=_MOST_SSDS), "stripes", content.get("stripes", ()))
        for ssd in content.get("ssds", ()):
            _check_fields(Ssd, ssd, "hardware.ssds")
            ssds.append(Ssd(**ssd))
        return cls(**{**content, "ssds": tuple(ssds), "stripes": tuple(content.get("stripes", ()))})


def load_hardware(name: str, *, ssds: int | None = None) -> Hardware:
    """A machine by name (``4090``, ``h200-box``, ...) or from a JSON file, with ``ssds`` devices
    like its first.

    Raises RatelError for a name that is neither, an unknown field, and SSDs asked of a machine that
    has none to copy.
    """
    path = MACHINES / f"{name}.json"
    if not path.exists():
        path = Path(name)
    try:
        hardware = Hardware.from_json(read_json(path))
    except OSError as error:
        raise RatelError(f"neither a machine known here nor a file that can be read ({error.strerror})", field="hardware", value=name,
                         remedy=f"Known are {', '.join(machine_names())}") from None
    except JsonError as error:
        raise RatelError(str(error), field="hardware", value=name,
                         remedy="Copy a file of ratel/planner/machines and change it") from None
    except RatelError as error:
        raise RatelError(f"{path}: {error}", field="hardware") from error
    return hardware if ssds is None else with_ssds(hardware, ssds)


def machine_names() -> list[str]:
    return sorted(path.stem for path in MACHINES.glob("*.json"))


def with_ssds(hardware: Hardware, count: int) -> Hardware:
    """The machine with ``count`` devices like its first one."""
    if count < 0 or (count > 0 and not hardware.ssds):
        raise RatelError("cannot be made of this machine's devices", field="ssds", value=count,
                         remedy="Name one device under ssds in the hardware file")
    return replace(hardware, ssds=hardware.ssds[:1] * count, stripes=())


def with_cap(hardware: Hardware, bps: float | None) -> Hardware:
    """The machine with each SSD slowed down to a rate of reads and writes together
    (``--ssd-bandwidth``)."""
    if bps is None:
        return hardware
    ssds = tuple(Ssd(read_bps=min(bps, s.read_bps), write_bps=min(bps, s.write_bps), mixed_bps=min(bps, s.mixed_bps))
                 for s in hardware.ssds)
    return replace(hardware, ssds=ssds)


_LARGEST_RATE = 1e21
_MOST_SSDS = 1024
_AMOUNTS: dict[str, Check] = {
    "name": text(), "source": text(), "gpu_bytes": number(0, 1e18), "gpu_half_tokens": number(0, 1e12), "dram_bytes": number(0, 1e18),
    "cores": whole(1, 1 << 20), "stripes": listing(whole(1, 1024))}


def _check_rate(name: str, rate: float) -> None:
    _check(number(0, _LARGEST_RATE, above=True), name, rate, "Give a rate that is more than nothing, in units per second")


def _check(what: Check, name: str, value: Any, remedy: str = "Copy a file of ratel/planner/machines and change it") -> None:
    try:
        check(value, what)
    except SchemaError as error:
        raise RatelError(str(error).removeprefix("it "), field=f"hardware.{name}", remedy=remedy) from None


def _check_fields(cls: type, content: dict[str, Any], where: str) -> None:
    if not isinstance(content, dict):
        raise RatelError("not an object of named numbers", field=where, value=shown(content),
                         remedy="Copy a file of ratel/planner/machines and change it")
    known = {f.name: f for f in fields(cls)}
    unknown = [name for name in content if name not in known]
    if unknown:
        raise RatelError("no such number is known", field=f"{where}.{shown(unknown[0])[1:-1]}", value=shown(content[unknown[0]]),
                         remedy=f"Known are {', '.join(known)}")
    missing = [name for name, f in known.items() if name not in content and f.default is MISSING]
    if missing:
        raise RatelError("is missing", field=f"{where}.{missing[0]}",
                         remedy="Copy a file of ratel/planner/machines and change it")
