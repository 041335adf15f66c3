"""Planning without training: a model in outline, a machine in numbers, and the search between
them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ratel.config import TrainConfig, resolve
from ratel.lora.adaptation import Adaptation
from ratel.lora.request import adapter_request, described
from ratel.models.calls.tasks import Task
from ratel.models.presets import PRESETS, family, preset_blocks, preset_config
from ratel.planner.forecast.cost import Prediction
from ratel.planner.forecast.wear import parse_endurance, wear
from ratel.planner.formats import FORMATS
from ratel.planner.machine.hardware import Hardware
from ratel.planner.plan import Plan
from ratel.planner.report.advice import advise
from ratel.planner.report.report import Report
from ratel.planner.report.state_choices import compare_states, in_formats
from ratel.planner.search.largest import fits_somewhere, largest_count, with_depth
from ratel.planner.search.micro_batches import SATURATING_TOKENS, best_plan, may_spill
from ratel.planner.search.options import SessionOptions
from ratel.planner.search.request import BlockFacts, Budgets, Request, request_for
from ratel.planner.shape import ModelSpec
from ratel.runtime.planning.machine import Machine, machine_for
from ratel.runtime.planning.outline import Outline
from ratel.units import parse_bytes

SMALL_DEPTH = 2
"""Blocks of a model that stands for deeper ones of its width."""


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """What `ratel.plan` returns."""

    plan: Plan
    prediction: Prediction
    report: Report

    def describe(self) -> str:
        """The table that `ratel plan` prints."""
        return self.report.describe()

    def to_json(self) -> dict[str, Any]:
        return self.report.to_json()


class Planner:
    """One model on one machine; shapes are found out once for each size of a micro-batch."""

    on_host = False

    def __init__(self, model: Any, config: TrainConfig, machine: Machine) -> None:
        self.config, self.machine = config, machine
        dtype, request = torch.float32 if self.options.fp32 else torch.bfloat16, adapter_request(config)
        adaptation = None if request is None else Adaptation(request, seed=config.seed, dtype=dtype)
        self._outline = Outline(model, dtype=dtype, max_seq_len=config.seq_len, attention=config.attention, task=Task.of(config.task),
                                additions=adaptation)
        self._facts: dict[tuple[int, int, bool], BlockFacts] = {}

    @property
    def options(self) -> SessionOptions:
        return SessionOptions.of(self.config, dtype="fp32" if self.config.dtype == "fp32" else "bf16")

    @property
    def budgets(self) -> Budgets:
        return self.machine.budgets

    @property
    def rows(self) -> int:
        return self.config.batch_size

    @property
    def positions(self) -> int:
        return self.config.seq_len

    @property
    def spec(self) -> ModelSpec:
        return self._outline.spec

    @property
    def packs(self) -> bool:
        return self._outline.packs

    @property
    def num_blocks(self) -> int:
        return sum(stage.kind == "block" for stage in self.spec.stages)

    def close(self) -> None:
        self._outline.close()

    def facts(self, rows: int, seq_len: int) -> BlockFacts:
        """What is known of micro-batches of so many rows, whose second runs save nothing in
        DRAM."""
        return self._facts_of(rows, seq_len, spills=False)

    def plan(self, *, advice: bool = True, endurance_bytes: float | None = None) -> PlanResult:
        """The best plan. Raises RatelError that says which budget is short, and by how much."""
        machine = self.machine
        chosen = best_plan(self, machine.hardware)
        worn = None if machine.ssd_budget is None else wear(
            chosen.plan, chosen.prediction, weights=machine.hardware.stripe_weights, capacities=machine.capacities,
            endurance_bytes=endurance_bytes, save_every=self.config.save_every)
        report = Report(plan=chosen.plan, prediction=chosen.prediction, hardware=machine.hardware,
                        ssd_budget=machine.ssd_budget, wear=worn, gains=tuple(advise(chosen, machine.hardware)) if advice else None,
                        states=tuple(compare_states(chosen, machine.hardware)) if advice else (),
                        notes=machine.notes, save_every=self.config.save_every)
        return PlanResult(plan=chosen.plan, prediction=chosen.prediction, report=report)

    def request(self, micro_rows: int, spills: bool = False, *, rows: int | None = None, seq_len: int | None = None,
                depth: int | None = None) -> Request:
        """``depth``: with so many blocks instead of the model's."""
        rows, seq_len = rows or self.rows, seq_len or self.positions
        facts = self._facts_of(micro_rows, seq_len, spills)
        spec = self.spec if depth is None else with_depth(self.spec, depth)
        blocks = sum(stage.kind == "block" for stage in spec.stages)
        facts = replace(facts, profiles=(facts.profiles + facts.profiles[-1:] * blocks)[:blocks])
        return request_for(spec, self.options, self.budgets, facts, rows=rows, seq_len=seq_len, micro_rows=micro_rows)

    def _facts_of(self, rows: int, seq_len: int, spills: bool) -> BlockFacts:
        key = rows, seq_len, spills
        if key not in self._facts:
            self._facts[key] = self._outline.facts(rows, seq_len, spills=spills)
        return self._facts[key]

    # --- the largest ------------------------------------------------------------------------------------------------

    def fitting_states(self) -> list[str]:
        """Formats of states, other than the one asked for, in which the batch would fit."""
        return [states for states in FORMATS if states != self.options.states and self.fits(states=states)]

    def fits(self, *, rows: int | None = None, seq_len: int | None = None, depth: int | None = None,
             states: str | None = None) -> bool:
        """With any size of micro-batch: all at once needs no sums of gradients, one row the least
        activations, least of all with what its second runs save in DRAM."""
        rows, given = rows or self.rows, self.options.micro_batch
        sizes = [min(given, rows)] if given != "auto" else [1, rows] if rows * (seq_len or self.positions) <= (
            SATURATING_TOKENS) else [1]
        tried = [(size, False) for size in sizes] + ([(sizes[0], True)] if may_spill(self.options) else [])
        requests = (self.request(size, spills, rows=rows, seq_len=seq_len, depth=depth) for size, spills in tried)
        return any(fits_somewhere(in_formats(request, states or self.options.states)) for request in requests)

    def largest_batch(self) -> int:
        return largest_count(lambda rows: self.fits(rows=rows))

    def largest_seq_len(self) -> int:
        most = self.spec.max_seq_len or 1 << 20
        return largest_count(lambda seq_len: self.fits(seq_len=seq_len), least=2, most=most)

    def largest_depth(self, least: int = SMALL_DEPTH, most: int = 4096) -> int:
        return largest_count(lambda depth: self.fits(depth=depth), least=least, most=most)


@dataclass(frozen=True, kw_only=True)
class LargestModel:
    like: str
    """The preset, or the model given, whose width it has."""
    blocks: int
    usual_blocks: int
    num_params: int


def largest_model(config: TrainConfig, machine: Machine, model: Any) -> LargestModel | None:
    """The largest of the model's family: up the ladder of its presets to the last that fits, then
    with more blocks of that width, as long as it stays below the next preset, or with fewer of the
    next one's. A model that is no preset is made deeper or less deep. None if even two blocks do
    not fit."""
    rungs = family(model) if isinstance(model, str) and model in PRESETS else []
    if not rungs:
        with _planner(model, config, machine) as planner:
            return _of_depth(planner, str(config.model), planner.num_blocks, planner.largest_depth())
    fitting: str | None = None
    for name in rungs:
        with _planner(preset_config(name, num_blocks=SMALL_DEPTH), config, machine) as planner:
            usual = preset_blocks(name)
            if not planner.fits(depth=usual):
                shorter = _of_depth(planner, name, usual, planner.largest_depth(most=usual - 1))
                ceiling = with_depth(planner.spec, usual).num_params
                found = (shorter, _deepened(fitting, config, machine, ceiling) if fitting else None)
                return max((f for f in found if f), key=lambda f: f.num_params, default=None)
            fitting = name
    return _deepened(fitting, config, machine, 0)


def _deepened(name: str, config: TrainConfig, machine: Machine, ceiling: int) -> LargestModel | None:
    """As wide as the preset, with more blocks as long as it is smaller than ``ceiling``: without a
    limit on SSD space any number of blocks fits."""
    with _planner(preset_config(name, num_blocks=SMALL_DEPTH), config, machine) as planner:
        usual = preset_blocks(name)
        most = largest_count(lambda depth: with_depth(planner.spec, depth).num_params < ceiling, least=usual) or usual
        return _of_depth(planner, name, usual, planner.largest_depth(least=usual, most=most))


def _of_depth(planner: Planner, like: str, usual: int, blocks: int) -> LargestModel | None:
    if not blocks:
        return None
    return LargestModel(like=like, blocks=blocks, usual_blocks=usual, num_params=with_depth(planner.spec, blocks).num_params)


@contextmanager
def _planner(model: Any, config: TrainConfig, machine: Machine) -> Iterator[Planner]:
    planner = Planner(model, config, machine)
    try:
        yield planner
    finally:
        planner.close()


def plan(model: Any, *, hardware: "str | Hardware" = "auto", ssds: int | None = None, ssd_space: "str | int | None" = None,
         endurance: str | None = None, advice: bool = True, **options: Any) -> PlanResult:
    """The best plan to train ``model`` within budgets, and what it is predicted to do. Nothing is
    run or allocated.

    ``model``: as `ratel.train` takes it, a causal language model. ``hardware``: ``auto`` for this
    machine, the name or file of another one, or its numbers; then ``ssds`` is how many SSDs it has
    and ``ssd_space`` what they hold in all. ``options`` are those of `ratel.train`: ``gpu_memory``,
    ``dram``, ``ssd``, ``batch_size``, ``seq_len``, ... ``endurance``: of one drive, as ``3500TBW``.
    ``advice``: also plan with more of each resource.

    Raises RatelError for what cannot be trained, and for budgets that are short, with by how much.
    """
    given = hardware if isinstance(hardware, Hardware) else None
    config = resolve({**options, "lora": described(options.get("lora")), "hardware": "auto" if given else hardware,
                      "model": str(model) if isinstance(model, (str, Path)) else None})
    space = None if ssd_space is None else parse_bytes(ssd_space, field="ssd_space")
    rated = None if endurance is None else parse_endurance(endurance, "endurance")
    machine = machine_for(config, hardware=given, ssds=ssds, ssd_space=space)
    with _planner(model, config, machine) as planner:
        return planner.plan(advice=advice, endurance_bytes=rated)
