"""Updates that are made before the norm of the step is known, and what becomes of them when it
is."""

from ratel.planner.plan import Plan
from ratel.planner.shape import UnitSpec
from ratel.runtime.updates.jobs import AGAIN, FORGET, KEEP, Hyper, Job
from ratel.runtime.updates.ledger import Ledger
from ratel.store.planes import Store


class Speculation:
    """Early updates of the step. They write beside what they read; the verdict keeps their result
    or forgets it."""

    def __init__(self, plan: Plan, store: Store, ledger: Ledger) -> None:
        self._plan, self._store, self._ledger = plan, store, ledger
        self._early: list[Job] = []
        self._again: dict[int, Job] = {}

    def begin(self, units: list[UnitSpec], hyper: Hyper) -> list[Job]:
        """Updates with the scale that is likely; ``decide`` must follow. The lock is held."""
        self._early.extend(Job(unit, hyper, number=self._ledger.submit(unit.index), early=True) for unit in units)
        return self._early

    def decide(self, hyper: Hyper | None) -> list[Job]:
        """Give a verdict on all early updates of the step (see `OptimizerPipeline.decide`). The
        lock is held."""
        early, self._early = self._early, []
        for job in early:
            self._judge(job, hyper)
        return early

    def before(self, unit: int) -> Job | None:
        """The early update that the unit's next one makes again, if it does. The lock is held."""
        return self._again.pop(unit, None)

    def note_written(self, job: Job) -> None:
        """An early update has ended, whatever becomes of it. The lock is held."""
        job.written = True
        if job.verdict in (KEEP, FORGET):
            self._conclude(job)
        self._ledger.notify()

    def _judge(self, job: Job, hyper: Hyper | None) -> None:
        job.verdict = FORGET if hyper is None else AGAIN if job.begun and job.hyper != hyper else KEEP
        if job.verdict == KEEP:
            job.hyper = hyper
        if job.verdict == AGAIN:
            self._again[job.unit.index] = job
            self._ledger.submitted[job.unit.index] -= 1  # it is the same update that will be submitted again
        elif job.written:
            self._conclude(job)

    def _conclude(self, job: Job) -> None:
        """An early update is over and decided about: keep it, or leave everything as it was."""
        index = job.unit.index
        if job.verdict == KEEP:
            self._store.keep_second(index)
            self._store.versions.advance(index, job.ssd_slot)
        self._ledger.note_updated(index)
        self._ledger.note_persisted(index)
