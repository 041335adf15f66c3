"""A run with all its parts open: what is done before the loop, around it and after it."""

import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ratel import interrupt
from ratel.config import TrainConfig
from ratel.hardware.doctor import describe_cuda
from ratel.hardware.host import describe_host, library_versions
from ratel.interrupt import Finishing, Interrupted
from ratel.models.checkpoints.settings import settings_of
from ratel.monitor.metrics import MetricsWriter, MissingMetricsError
from ratel.monitor.progress import ProgressDisplay
from ratel.planner.forecast.durability import saving
from ratel.planner.report.plan_text import describe_plan, plan_to_json
from ratel.runtime.session.opening import DTYPES
from ratel.runtime.session.session import Session
from ratel.runtime.states.export import check_room
from ratel.synced import sync_file
from ratel.trace import phases
from ratel.trace.timeline import Timeline
from ratel.training.inputs import Inputs
from ratel.training.loop import Loop, Progress
from ratel.training.options import changes
from ratel.training.output import RunDirectory, exported
from ratel.training.resume import Resumption, amend_last, cut_metrics, naming_an_older, replay, saying_what_next
from ratel.training.schedule import make_schedule
from ratel.training.summary import summarize


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did, from its first step on. ``losses`` has one entry per step, ``eval_losses``
    one per evaluation, by step. ``seconds`` leaves out what came before the run was resumed.
    """

    losses: list[float]
    eval_losses: dict[int, float]
    steps: int
    tokens: int
    seconds: float
    out: Path
    is_interrupted: bool = False


class Attempt:
    """One start of a run, the first or a resumed one."""

    def __init__(self, config: TrainConfig, session: Session, inputs: Inputs, out: RunDirectory,
                 display: ProgressDisplay, earlier: Resumption | None) -> None:
        self.config, self.session, self.inputs, self.out, self.display = config, session, inputs, out, display
        self.earlier = earlier
        self.is_planned = self._has_stepped = False

    def prepare(self) -> None:
        """Whatever can be refused is refused here; then the directory is this run's."""
        with naming_an_older(self.out, self.earlier.state) if self.earlier else nullcontext():
            self._prepare_session()
        if self.is_planned:
            self.display.note(describe_plan(self.session.plan))
            if self.config.save_every:
                self.display.note(saving(self.session.plan, self.session.machine, save_every=self.config.save_every).describe())
            if self.session.device.type == "cpu":
                self.display.note("the model computes on the CPU: \"GPU\" means ordinary memory here")
        self.display.note(self.inputs.description)
        if self.earlier:
            self._note_what_changed(self.earlier)
        self.out.open(keep_results=self.earlier is not None, config=self.config, note=self.display.note)
        if self.earlier:
            # A kill may have left parts of others. What was best is known once the metrics are
            # read.
            self.out.states.prune(sys.maxsize)
        if self.config.save_every and self.inputs.lists is not None:
            self.out.write_json("documents", self.inputs.lists())
        self._write_skipped()
        self.out.write_json("config", {**self.config.to_json(), "out": str(self.out.path), "resume": False})
        if self.is_planned:
            self._write_plan()

    def _write_skipped(self) -> None:
        """A list is a help: a disk that has no room for it does not end the run."""
        with suppress(OSError):
            if self.inputs.skipped:
                self.out.write_json("skipped", self.inputs.skipped.to_json())

    def _check_room(self) -> None:
        """For what the run ends with."""
        if self.config.lora is None:
            check_room(self.session.parts.num_params, self.out.model, DTYPES[self.config.dtype])
        else:
            check_room(self.session.parts.spec.num_trainable_params, self.out.adapter, DTYPES["fp32"])

    def _prepare_session(self) -> None:
        has_known_shape = self.session.parts.probed and self.inputs.tokenizer is not None
        if has_known_shape:
            if self.config.export and not (self.config.overwrite and self.out.holds_run()):  # whose files make room
                self._check_room()
            self.session.prepare(self.config.batch_size, self.config.seq_len)
        elif self.earlier:
            self.session.evaluate([self.inputs.sample])  # brings the state in: damage is found before the start
        self.is_planned = has_known_shape or self.earlier is not None

    def _note_what_changed(self, earlier: Resumption) -> None:
        self.display.note(f"continuing after step {earlier.step} from {earlier.state}")
        if self.session.reads_a_copy:
            self.display.note(f"{earlier.state} is a copy: its planes are in the SSD files of another directory, which are read and "
                              "left as they are; the run goes on in files of its own")
        for line in changes(self.config, earlier.options):
            self.display.note(line)
        for name, version in library_versions().items():
            before = earlier.extra.get("versions", {}).get(name, version)
            if before != version:
                self.display.note(f"{name}: was {before}, is {version}; sums may be rounded differently")
        was, now = earlier.extra["micro_batch"], self.session.plan.work.micro_rows
        if was != now:
            self.display.note(f"sequences in a block at once: was {was}, is {now}; sums are rounded differently")
        if earlier.step >= self.config.steps:
            self.display.note(f"--steps {self.config.steps} is reached: nothing is left to train")

    def complete(self) -> TrainResult:
        start, missing = time.perf_counter(), None
        progress = self._progress_before(self.earlier) if self.earlier else Progress()
        try:
            with interrupt.finishing() as stop, saying_what_next(self.out):
                try:
                    self._loop(progress, stop)
                except MissingMetricsError as error:  # of its end: the states and the model are worth more
                    missing = error
                self._finish(progress)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped in step {progress.steps + 1} of {self.config.steps}; the model was not "
                              f"written, metrics are in {self.out.path}", self._result(progress, start)) from None
        result = self._result(progress, start, is_interrupted=stop.requested)
        self.display.close()
        if progress.steps < self.config.steps and not result.is_interrupted:
            self.display.note(f"the data ended after step {progress.steps} of {self.config.steps}")
        for line in summarize(progress, result.seconds, self.out, exported=exported(self.config)):
            self.display.note(line)
        if missing is not None:
            raise missing
        return result

    def _progress_before(self, earlier: Resumption) -> Progress:
        records = cut_metrics(self.out.metrics, earlier.step)
        if len(records) < earlier.step:
            self.display.note(f"{self.out.metrics} holds {len(records)} of the {earlier.step} steps made so far")
        return replay(records, earlier.step)

    def _loop(self, progress: Progress, stop: Finishing) -> None:
        config = self.config
        schedule = make_schedule(config.schedule, lr=config.lr, steps=config.steps, min_lr=config.min_lr,
                                 warmup_steps=config.num_warmup_steps)
        with MetricsWriter(self.out.metrics, append=self.earlier is not None) as metrics:
            self.display.start(progress.steps)

            def record(entry: dict[str, Any]) -> None:
                if not self._has_stepped:  # before its line: whoever waits for that finds the other file, too
                    self._write_startup(entry)
                metrics.write(entry)
                for line in metrics.news():
                    self.display.note(line)
                self.display.step(entry)

            def save(progress: Progress, *, copies: bool = False) -> None:
                with suppress(MissingMetricsError, OSError):  # a state is worth more than the lines that tell of it
                    metrics.flush()  # else no state knows of steps that metrics.jsonl does not
                    sync_file(self.out.metrics)
                self._save(progress, copies=copies)

            loop = Loop(session=self.session, steps=config.steps, schedule=schedule, record=record, stop=stop,
                        evaluation=self.inputs.evaluation, tries_evaluation=self.inputs.evaluates_own,
                        eval_every=config.eval_every, save_every=config.save_every,
                        save=save if config.save_every else None,
                        save_best=partial(save, copies=True) if config.keep_best else None,
                        traced=self._write_trace if config.trace is not None else None)
            if loop.evaluate_late(progress):  # nothing is written yet: the writer opens the file with its first record
                amend_last(self.out.metrics, loop.evaluated(progress.eval_losses[progress.steps]))
            loop.run(self.inputs.batches, progress)
    def _write_trace(self, timeline: Timeline) -> None:
        """A run is worth more than its trace: one that cannot be written does not end it."""
        try:
            timeline.write(self.config.trace)
        except OSError as error:
            self.display.note(f"--trace: {self.config.trace} cannot be written: {error}")
        else:
            self.display.note(f"{self.config.trace}: trace of step {timeline.step}, {timeline.step_s:.3f} s")

    def _save(self, progress: Progress, *, copies: bool) -> None:
        """In the background: commit in place if the plan says so, or copy everything out."""
        self._write_skipped()
        extra = {"step": progress.steps, "data": self.inputs.position(),
                 "micro_batch": self.session.plan.work.micro_rows,
                 "chat_template": getattr(self.inputs.tokenizer, "chat_template", None),
                 "has_tokenizer": self.inputs.tokenizer is not None, "versions": library_versions(),
                 "model": settings_of(getattr(self.session.parts.module, "config", None))}
        if self.session.plan.commits and not copies:
            self.session.wait_saved()
            self._drop_superseded_copies()  # before the next commit: it may be making directories among those looked at here
            self.session.commit(extra=extra)
            return
        self._prune(progress)
        path = self.out.states.path_of(progress.steps)
        if not path.exists():  # it may be the best one and due as well
            self.session.save(path, extra=extra, wait=False)

    def _prune(self, progress: Progress) -> None:
        """Once the save under way is complete, those that it makes superfluous go."""
        self.session.wait_saved()
        self.out.states.prune(self.config.keep, eval_losses=progress.eval_losses if self.config.keep_best else None)
        self._drop_stale_commits()
        self._drop_superseded_copies()

    def _drop_superseded_copies(self) -> None:
        """Remove the copies of an earlier start of the run once there is a newer commit."""
        states = self.out.states
        if self.session.plan.commits and not self.config.keep_best and states.steps() and states.newest() == states.commits:
            states.prune(0)

    def _drop_stale_commits(self) -> None:
        """Remove the commits in place of an earlier start of the run once there is a newer copy."""
        newest, committed = self.out.states.newest(), self.out.states.committed_step()
        if committed is not None and newest != self.out.states.commits and not self.session.plan.commits:
            self.out.states.drop_commits()

    def _write_startup(self, first: dict[str, Any]) -> None:
        self._has_stepped = True
        phases.note("first step", phases.age_s() - first["step_s"])
        try:
            self.out.write_json("startup", {"phases": phases.phases()})
        except OSError as error:
            self.display.note(f"startup.json cannot be written: {error.strerror}")

    def _write_plan(self) -> None:
        self.out.write_json("plan", plan_to_json(self.session.plan))
        self.out.write_json("hardware", {"host": describe_host(), "cuda": describe_cuda(), **self.session.hardware})

    def _finish(self, progress: Progress) -> None:
        """Complete the updates that still wait, and write what only then is final."""
        self.session.flush()
        self._write_skipped()
        if self.config.save_every:
            self._prune(progress)
        if not self.is_planned:
            self._write_plan()  # batches of the user's own had no shape before the first one was seen
        with suppress(OSError):  # where they cannot be written that has been said
            sync_file(self.out.metrics)
        if self.config.export:
            beside = {} if self.inputs.tokenizer is None else {"beside": self.inputs.write_tokenizer}
            self.session.export(self.out.path / exported(self.config), dtype=self.config.dtype if self.config.lora is None else None, **beside)

    def _result(self, progress: Progress, start: float, *, is_interrupted: bool = False) -> TrainResult:
        return TrainResult(losses=progress.losses, eval_losses=progress.eval_losses, steps=progress.steps,
                           tokens=progress.tokens, seconds=time.perf_counter() - start, out=self.out.path,
                           is_interrupted=is_interrupted)
