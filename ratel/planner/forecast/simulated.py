"""What the simulated engine consists of: the machine's resources, and what its threads hand each
other."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from ratel.planner.forecast.compute import GpuSeconds
from ratel.planner.forecast.events import Clock, Event, Memory, Pool, TwoWay
from ratel.planner.machine.hardware import Hardware
from ratel.planner.machine.pipes import SsdRates, link, ssd_rates
from ratel.planner.plan import Plan
from ratel.planner.shape import UnitSpec
from ratel.planner.traffic import gather_traffic

WEIGHT, ACTIVATION, OPTIMIZER, WRITE_BACK = range(4)
"""The I/O engine's priorities, the most urgent first."""


class Machine:
    """The resources of a simulated machine."""

    def __init__(self, plan: Plan, hardware: Hardware) -> None:
        self.clock = Clock()
        self.memory = Memory(self.clock, hardware.dram_bps)
        self.link = TwoWay(self.clock, self.memory, link(hardware), ("h2d", "d2h"))
        # A machine without SSDs is only given plans that move nothing there.
        rates = ssd_rates(hardware) or SsdRates(read_bps=1.0, write_bps=1.0, mixed_bps=1.0)
        self.ssd = TwoWay(self.clock, self.memory, rates.pipe, ("ssd read", "ssd write"))
        self.gpu = GpuSeconds(plan, hardware)
        self._hardware, self._early, self._formats = hardware, plan.early, plan.formats
        self.step_ends_s: list[float] = []

    def update(self, unit: UnitSpec, params: float) -> tuple[float, float]:
        """Seconds of the CPU, and bytes of DRAM, for ``params`` parameters of the unit."""
        share = self._hardware.update_share(elsewhere=unit.index in self._early)
        rate = share * self._formats.update_speed * self._hardware.adam_params_per_s
        return params / rate, self._formats.update_bytes / share * params

    def read(self, num_bytes: float, name: str, urgency: int) -> Event:
        return self.ssd.move(TwoWay.IN, num_bytes, name, urgency) if num_bytes else Event(done=True)

    def write(self, num_bytes: float, name: str, urgency: int) -> Event:
        return self.ssd.move(TwoWay.OUT, num_bytes, name, urgency) if num_bytes else Event(done=True)


@dataclass(slots=True, eq=False)
class HostSlot:
    """The DRAM copy of a unit whose weights live on SSD; given back by its last holder."""

    unit: int
    holders: int
    filled: Event
    kept: bool = False
    """A deferred update has left it to the next forward pass."""


class CopiesInDram:
    """The DRAM copies of weights on SSD, as ``ratel/store/host_cache.py`` leases them."""

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self._plan, self._machine = plan, machine
        self._slots = pools(plan, plan.host_weight_slot_count)
        self._held: dict[int, HostSlot] = {}

    def acquire(self, unit: int) -> Generator[Event, None, HostSlot | None]:
        """The copy of the unit's weights, read if no one holds it; None: they are not on SSD."""
        num_bytes = gather_traffic(self._plan, unit).ssd_read
        if not num_bytes:
            return None
        if unit not in self._held:
            yield self._slots_for(unit).acquire()
            read = self._machine.read(num_bytes, self._plan.spec.units[unit].name, WEIGHT)
            self._held[unit] = HostSlot(unit, 0, read)
        return self.share(self._held[unit])

    def share(self, slot: HostSlot) -> HostSlot:
        """The same, held once more."""
        slot.holders += 1
        return slot

    def leave(self, slot: HostSlot) -> None:
        """A deferred update holds it until the next gather has taken it over."""
        self.share(slot).kept = True

    def take_over(self, slot: HostSlot) -> None:
        """A gather holds it now, so what was left to it is let go."""
        if slot.kept:
            slot.kept = False
            self.release(slot)

    def release(self, slot: HostSlot) -> None:
        slot.holders -= 1
        if slot.holders == 0:
            del self._held[slot.unit]
            self._slots_for(slot.unit).release()

    def _slots_for(self, unit: int) -> Pool:
        return self._slots[self._plan.spec.classes[unit].name]


def pools(plan: Plan, count_of: Callable[[str], int]) -> dict[str, Pool]:
    """A pool for each class of slots."""
    return {cls.name: Pool(count_of(cls.name)) for cls in plan.spec.slot_classes}


@dataclass(slots=True)
class Update:
    """What the update of one unit in one step waits for, and who waits for it."""

    unit: UnitSpec
    arrived: Event = field(default_factory=Event)
    """The gradient is in DRAM, or on SSD if that is where it waits."""
    updated: Event = field(default_factory=Event)
    persisted: Event = field(default_factory=Event)
    slot: HostSlot | None = None


@dataclass(slots=True)
class Chunk:
    update: Update
    share: float
    """The part of the unit's parameters that this chunk has."""
    read: Event
    is_first: bool
    is_last: bool
