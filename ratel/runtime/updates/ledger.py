"""The books of the optimizer pipeline: by unit, which updates were submitted, are done, and are on
their tiers."""

from collections.abc import Callable

from ratel.memory.exchange import Exchange
from ratel.planner.plan import Plan
from ratel.runtime.updates.jobs import GradientInFlight


class Ledger:
    """Numbers of updates by unit, from 1, and the gradients that have arrived. One lock and one
    condition for all of it.

    ``submitted``, ``updated`` and ``persisted`` are read and written with ``exchange.lock`` held.
    """

    def __init__(self, plan: Plan, exchange: Exchange) -> None:
        self.exchange, self._units = exchange, plan.spec.units
        self._changed = exchange.condition()
        self.submitted, self.updated, self.persisted, self._required = ([0] * len(self._units) for _ in range(4))
        self._arrivals: dict[int, GradientInFlight] = {}

    def begin_step(self) -> None:
        """What has been submitted so far must be done before this step's forward pass uses it."""
        with self.exchange.lock:
            self._required = list(self.submitted)

    def submit(self, unit: int) -> int:
        """The number of the unit's next update, which is submitted with this."""
        self.submitted[unit] += 1
        return self.submitted[unit]

    def notify(self) -> None:
        """Tell of any change that a thread may wait for. The lock is held."""
        self._changed.notify_all()

    def wait(self, ready: Callable[[], bool], cause: str = "", unit: int | None = None) -> None:
        """Wait as `Exchange.wait_for` does."""
        with self.exchange.lock:
            self.exchange.wait_for(self._changed, ready, cause, "" if unit is None else self._units[unit].name)

    def wait_updated(self, unit: int) -> None:
        """Block until the unit's updates of earlier steps are done."""
        self.wait(lambda: self.updated[unit] >= self._required[unit], "update", unit)

    def wait_persisted(self, unit: int, number: int) -> None:
        """Block until so many updates of the unit are done and on its tier."""
        self.wait(lambda: self.persisted[unit] >= number, "SSD write", unit)

    def arrived(self, unit: int, gradient: GradientInFlight) -> None:
        """The unit's gradient is in DRAM or on SSD, or on its way to DRAM."""
        with self.exchange.lock:
            self._arrivals[unit] = gradient
            self.notify()

    def wait_arrival(self, unit: int) -> GradientInFlight:
        with self.exchange.lock:
            self.wait(lambda: unit in self._arrivals, "gradient", unit)
            return self._arrivals[unit]

    def discard(self, unit: int) -> None:
        """The step is skipped: forget the unit's gradient, which may still be on its way to SSD."""
        with self.exchange.lock:
            gradient = self.wait_arrival(unit)
            del self._arrivals[unit]
        gradient.release()

    def note_updated(self, unit: int) -> None:
        """The unit's gradient has been used. The lock is held."""
        del self._arrivals[unit]
        self.updated[unit] += 1
        self.notify()

    def note_persisted(self, unit: int) -> None:
        """The unit's last update is on its tier. The lock is held."""
        self.persisted[unit] += 1
        self.notify()
