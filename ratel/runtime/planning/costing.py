"""What whole runs cost on machines that can be rented: a planner's step for each, times the steps
that the data have."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ratel.config import ADAPTERS, TrainConfig, option_of, options_of
from ratel.data.review.lengths import TextLengths
from ratel.errors import RatelError
from ratel.planner.block_profile import BlockProfile
from ratel.planner.forecast.cost import predict
from ratel.planner.plan import Plan
from ratel.planner.pricing.calibration import Calibration, Measured, calibrate, step_work
from ratel.planner.pricing.rented import THIS, Rented
from ratel.planner.pricing.run_cost import ALONE, PACKED, PADDED, Epoch, RunCost, Step
from ratel.planner.search.micro_batches import best_plan
from ratel.runtime.planning.machine import Machine, machine_for
from ratel.runtime.planning.planner import Planner
from ratel.startup.known_hardware import AUTO

_BUDGETS = ("gpu_memory", "dram", "ssd")
_LEAST_LENGTH = 2
"""Tokens: a row of one has nothing to learn."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be compared. ``states`` and ``forms``: side by side; of ``forms``, PACKED is
    ALONE for a model that cannot keep documents apart. ``measured``: steps on the one machine
    asked for."""

    rented: Sequence[Rented]
    epochs: int = 1
    states: Sequence[str] = ("exact",)
    forms: Sequence[str] = (PACKED, PADDED)
    measured: Sequence[Measured] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    costs: tuple[RunCost, ...]
    notes: tuple[str, ...]
    calibration: Calibration | None


def run_costs(model: Any, config: TrainConfig, texts: TextLengths, question: Question) -> Answer:
    """One line for each machine, format of states and form of rows, and where an adapter is asked
    for, the whole model beside it. A step that does not fit is a line that says so.

    Raises RatelError for what cannot be trained or planned for at all.
    """
    costs: list[RunCost] = []
    notes, calibration = [], None
    for way in [config] if config.lora is None else [config, without_adapter(config)]:
        with closing(Planner(model, way, _machine(way, question.rented[0]))) as planner:
            coster = _Coster(planner, texts, question, calibration)
            costs += coster.costs()
            notes, calibration = [*notes, *coster.notes], coster.calibration
    names = [rented.name for rented in question.rented]
    return Answer(costs=tuple(sorted(costs, key=lambda cost: names.index(cost.rented.name))), notes=tuple(dict.fromkeys(notes)),
                  calibration=calibration)


def without_adapter(config: TrainConfig) -> TrainConfig:
    """The same run, of the model itself."""
    plain = TrainConfig()
    return replace(config, **{spec.name: getattr(plain, spec.name) for spec in options_of(TrainConfig) if option_of(spec).group == ADAPTERS})


def _machine(config: TrainConfig, rented: Rented) -> Machine:
    is_this = rented.machine == THIS
    asked = replace(config, hardware=AUTO if is_this else rented.machine, dram=config.dram or rented.dram)
    return machine_for(asked, ssds=None if is_this or config.ssd else rented.ssds)


class _Coster:
    """A planner, which is asked about one machine after another: what was learned of the model's
    blocks does not depend on them."""

    def __init__(self, planner: Planner, texts: TextLengths, question: Question, calibration: Calibration | None) -> None:
        self._planner, self._question, self._config = planner, question, planner.config
        self._rows = texts.lengths.split(self._config.seq_len)
        self._epochs = [self._epoch(form, texts) for form in question.forms]
        self.notes = [f"{texts.bad} lines of the data are no records, and left out"] if texts.bad else []
        self.calibration = calibration
        """What steps were measured of is what is asked for first."""
        self._largest = lru_cache(maxsize=None)(self._largest_batch)

    def costs(self) -> Iterator[RunCost]:
        for rented in self._question.rented:
            machine = self._machine_of(rented)
            self.notes += [f"{rented.name}: {note}" for note in machine.notes]
            for states in self._question.states:
                for epoch in self._epochs:
                    yield self._cost(rented, machine, states, epoch)

    def _epoch(self, form: str, texts: TextLengths) -> Epoch:
        seq_len, rows = self._config.seq_len, self._rows
        if form == PADDED:
            return Epoch(form=PADDED, rows=rows.rows, row_tokens=rows.expected_longest(self._config.batch_size), tokens=rows.tokens)
        if not self._planner.packs:
            return Epoch(form=ALONE, rows=rows.rows, row_tokens=seq_len, tokens=rows.tokens)
        return Epoch(form=PACKED, rows=texts.packed_rows(seq_len), row_tokens=seq_len, tokens=rows.tokens)

    def _machine_of(self, rented: Rented) -> Machine:
        machine = _machine(self._config, rented)
        if not self._question.measured:
            return machine
        self.calibration = self.calibration or self._calibrate(machine)
        return replace(machine, hardware=self.calibration.of(machine.hardware))

    def _calibrate(self, machine: Machine) -> Calibration:
        works = []
        for point in self._question.measured:
            if not _LEAST_LENGTH <= point.length <= self._config.seq_len:
                raise RatelError(f"must be from {_LEAST_LENGTH} to --seq-len {self._config.seq_len}", field="--fit length", value=point.length)
            self._ask(machine, batch_size=point.batch, seq_len=point.length)
            works.append(step_work(best_plan(self._planner, machine.hardware).plan, machine.hardware))
        return calibrate(works, [point.seconds for point in self._question.measured])

    def _cost(self, rented: Rented, machine: Machine, states: str, epoch: Epoch) -> RunCost:
        width = max(_LEAST_LENGTH, self._rows.longest) if epoch.form == PADDED else self._config.seq_len
        self._ask(machine, states=states, seq_len=width)
        try:
            step, problem = self._step(machine, epoch), None
        except RatelError as error:
            if error.field not in _BUDGETS:
                raise
            step, problem = None, str(error)
        basis = machine.hardware.source.partition(":")[0]
        return RunCost(rented=rented, basis=basis, trains=_trained(self._config), states=states, epoch=epoch, epochs=self._question.epochs,
                       batch=self._config.batch_size, largest_batch=self._largest(rented.name, states, width), step=step, problem=problem)

    def _ask(self, machine: Machine, **changes: Any) -> None:
        self._planner.machine, self._planner.config = machine, replace(self._config, **changes)

    def _largest_batch(self, name: str, states: str, width: int) -> int:
        """The planner is asked what the arguments name, and was told so before."""
        return self._planner.largest_batch()

    def _step(self, machine: Machine, epoch: Epoch) -> Step:
        chosen = best_plan(self._planner, machine.hardware)
        plan, prediction = chosen.plan, chosen.prediction
        if epoch.form == PADDED:
            prediction = predict(self._narrowed(plan, epoch), machine.hardware)
        overhead_s = self.calibration.overhead_s if self.calibration else 0.0
        return Step(seconds=prediction.step_s + overhead_s, bound_by=prediction.bound_by, overhead_s=overhead_s, gpu_bytes=plan.gpu_bytes,
                    dram_bytes=plan.dram_bytes, ssd_bytes=plan.ssd_bytes)

    def _narrowed(self, plan: Plan, epoch: Epoch) -> Plan:
        """Placed for the longest rows, it has batches that are as wide as they are on average."""
        seq_len = max(_LEAST_LENGTH, round(epoch.row_tokens))
        facts = self._planner.facts(plan.work.micro_rows, seq_len)
        profiles = tuple(_with_inner_of(narrow, wide, seq_len / plan.work.seq_len) for narrow, wide in zip(facts.profiles, plan.profiles))
        return replace(plan, work=replace(plan.work, seq_len=seq_len, hidden_bytes=facts.hidden_bytes), profiles=profiles)


def _with_inner_of(narrow: BlockProfile, wide: BlockProfile, share: float) -> BlockProfile:
    """What a plan keeps has the names of the width it was made for. A block that goes through its
    tokens one by one has as many operations as tokens, and other names for each width."""
    if [inner.name for inner in narrow.inner] == [inner.name for inner in wide.inner]:
        return narrow
    return replace(narrow, inner=tuple(replace(inner, row_bytes=round(share * inner.row_bytes), row_flops=share * inner.row_flops)
                                       for inner in wide.inner))


def _trained(config: TrainConfig) -> str:
    """In a word or two."""
    return "all" if config.lora is None else f"rank {config.lora}" if isinstance(config.lora, int) else "adapter"
