"""The CPU optimizer pipeline: state chunks from SSD, fused AdamW, and back, under the GPU's
computation.

Two threads, each a plain loop over the same sequence of chunks: the *loader* reserves ring slots
and starts reads ahead of need, the *updater* waits for a chunk's bytes and its unit's gradient,
runs AdamW and starts the write-back. One result whatever the mode: *eager* feeds units as their
gradients arrive, *deferred* feeds all of them, in forward order, once the norm of the step is
known. *Speculative* feeds some as their gradients arrive, with the scale that is likely; these
write beside what they read, and when the norm is known their result is kept or forgotten. What is
forgotten is updated once more, like the rest, from the same state.
"""

from collections.abc import Callable

from ratel import native
from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange, Mailbox, join_all
from ratel.memory.retire import Retirer
from ratel.planner.plan import Plan
from ratel.planner.shape import UnitSpec
from ratel.runtime.updates.jobs import AGAIN, KEEP, GradientInFlight, Hyper, Job
from ratel.runtime.updates.ledger import Ledger
from ratel.runtime.updates.loader import Loader
from ratel.runtime.updates.speculation import Speculation
from ratel.runtime.updates.updater import Updater
from ratel.store.host_cache import HostCache
from ratel.store.plane_io import PlaneIO
from ratel.store.planes import Store


class OptimizerPipeline:
    """What the main thread, the reader of weights and the saver ask of the two threads."""

    def __init__(self, plan: Plan, store: Store, cache: HostCache, arena: Arena, exchange: Exchange,
                 pool: "native.op_ds.Pool", engine: "native.nvme_ds.Engine | None", io: PlaneIO, writes: Retirer) -> None:
        self._plan, self._cache, self._exchange = plan, cache, exchange
        self.ledger = Ledger(plan, exchange)
        self._speculation = Speculation(plan, store, self.ledger)
        self._never_updated = [u.index for u in plan.spec.units if not u.num_trainable and plan.weights_from_ssd(u)]
        self._unkept = self._never_updated
        """Units of which no updated copy is left in DRAM: the next forward pass reads them from
        SSD."""
        self._jobs, chunks = Mailbox(exchange), Mailbox(exchange)
        self.loader = Loader(plan, store, cache, arena, io, self.ledger, self._jobs, chunks)
        self._updater = Updater(plan, store, cache, pool, engine, io, writes, self.ledger, self._speculation, self.loader, chunks)

    @property
    def busy_s(self) -> float:
        """Seconds that AdamW ran."""
        return self._updater.busy_s

    def hold_back(self, may_update: Callable[[int, int], None]) -> None:
        """Call this with (unit, number of its update) before each update; it returns once that one
        may overwrite."""
        self._updater.may_update = may_update

    def submitted(self) -> list[int]:
        """By unit, how many updates have been submitted."""
        with self._exchange.lock:
            return list(self.ledger.submitted)

    def submit(self, unit: UnitSpec, hyper: Hyper) -> None:
        """Ask for the unit's update; it starts when its gradient has arrived."""
        with self._exchange.lock:
            self._cache.expect_forward(self._unkept)
            self._jobs.put(Job(unit, hyper, number=self.ledger.submit(unit.index), keep=self._plan.deferred,
                               after=self._speculation.before(unit.index)))

    def submit_early(self, units: list[UnitSpec], hyper: Hyper) -> None:
        """Ask for updates that start when gradients arrive, with the scale that is likely;
        ``decide`` must follow."""
        with self._exchange.lock:
            self._jobs.put(*self._speculation.begin(units, hyper))

    def decide(self, hyper: Hyper | None) -> list[UnitSpec]:
        """The norm is known: ``hyper`` has the right scale; None: the step is skipped, and its
        early updates forgotten.

        Returns units whose early update was begun with another scale; they must be submitted like
        those that were not updated early.
        """
        with self._exchange.lock:
            early = self._speculation.decide(hyper)
            self._unkept = self._never_updated + [job.unit.index for job in early if job.verdict == KEEP
                                                  and self._plan.weights_from_ssd(job.unit)]
            return [job.unit for job in early if job.verdict == AGAIN]

    def arrived(self, unit: UnitSpec, gradient: GradientInFlight) -> None:
        """The unit's gradient is in DRAM or on SSD, or on its way to DRAM."""
        self.ledger.arrived(unit.index, gradient)

    def finish_step(self) -> bool:
        """Eager mode, after backward: wait for this step's updates. False if none was made: all
        skipped, or none submitted."""
        with self._exchange.lock:
            self.ledger.wait(lambda: self.ledger.updated == self.ledger.submitted, "update")
            return self._updater.skipped != max(self.ledger.submitted)

    def flush(self) -> None:
        """Block until every update asked for is done and on its tier."""
        with self._exchange.lock:
            self._cache.expect_no_forward()
            self.ledger.wait(lambda: self.ledger.persisted == self.ledger.submitted)

    def join(self, timeout_s: float) -> bool:
        return join_all([self.loader.worker, self._updater.worker], timeout_s)
