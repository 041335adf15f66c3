"""Planning without training: a model in outline, a machine in numbers, and the search between
them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ratel.config import TrainConfig, resolve
from ratel.errors import RatelError
from ratel.models.calls.tasks import Task
from ratel.models.presets import PRESETS, family, preset_blocks, preset_config
from ratel.planner.activation_policy import AUTO, SPILL, forced_kept
from ratel.planner.forecast.cost import Prediction
from ratel.planner.forecast.wear import parse_endurance, wear
from ratel.planner.formats import EXACT
from ratel.planner.hardware import Hardware
from ratel.planner.plan import Plan, Work
from ratel.planner.report.advice import advise
from ratel.planner.report.report import Report
from ratel.planner.search.choose import Request
from ratel.planner.search.largest import fits_somewhere, largest_count, with_depth
from ratel.planner.search.micro_sizes import COMPARED, SATURATING_TOKENS, micro_sizes
from ratel.planner.search.search import Choice, search
from ratel.planner.shape import ModelSpec
from ratel.runtime.planning.machine import PROCESS_BYTES, Machine, machine_for
from ratel.runtime.planning.outline import MicroOutline, Outline
from ratel.runtime.planning.requested import optimizer_of
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

    def __init__(self, model: Any, config: TrainConfig, machine: Machine) -> None:
        self.config, self.machine = config, machine
        computes_in = "fp32" if config.dtype == "fp32" else "bf16"  # of a machine with a GPU, where `auto` is bf16
        self._formats = EXACT[computes_in]
        dtype = torch.float32 if computes_in == "fp32" else torch.bfloat16
        self._outline = Outline(model, dtype=dtype, max_seq_len=config.seq_len, attention=config.attention,
                                task=Task.of(config.task))
        self._micros: dict[tuple[int, int, bool], MicroOutline] = {}

    @property
    def spec(self) -> ModelSpec:
        return self._outline.spec

    @property
    def num_blocks(self) -> int:
        return sum(stage.kind == "block" for stage in self.spec.stages)

    def close(self) -> None:
        self._outline.close()

    def plan(self, *, advice: bool = True, endurance_bytes: float | None = None) -> PlanResult:
        """The best plan. Raises RatelError that says which budget is short, and by how much."""
        chosen, requests = self._choose()
        machine = self.machine
        worn = None if machine.ssd_budget is None else wear(
            chosen.plan, chosen.prediction, weights=machine.hardware.stripe_weights, capacities=machine.capacities,
            endurance_bytes=endurance_bytes, save_every=self.config.save_every)
        gains = tuple(advise(requests, machine.hardware, chosen)) if advice else None
        report = Report(plan=chosen.plan, prediction=chosen.prediction, hardware=machine.hardware,
                        ssd_budget=machine.ssd_budget, wear=worn, gains=gains, notes=machine.notes,
                        save_every=self.config.save_every)
        return PlanResult(plan=chosen.plan, prediction=chosen.prediction, report=report)

    def _choose(self) -> tuple[Choice, list[Request]]:
        """As a session does: of a few sizes of micro-batches the best one, smaller ones only where
        none fits, and at last the smallest with what its second runs save in DRAM."""
        config, spills = self.config, self.config.activations == SPILL
        sizes = micro_sizes(config.batch_size, config.seq_len) if config.micro_batch == "auto" else [config.micro_batch]
        tried = [(sizes[begin : begin + COMPARED], spills) for begin in range(0, len(sizes), COMPARED)]
        tried += [(sizes[-1:], True)] if self._may_spill else []
        for rows, spills in tried:
            requests = [self.request(size, spills=spills) for size in rows]
            try:
                return search(requests, self.machine.hardware), requests
            except RatelError as error:
                failure = error
                if error.field != "gpu_memory":
                    raise
        raise failure

    @property
    def _may_spill(self) -> bool:
        """Unasked."""
        return self.config.activations == AUTO and self.config.compile == "off"

    def request(self, micro_rows: int, *, rows: int | None = None, seq_len: int | None = None,
                depth: int | None = None, spills: bool = False) -> Request:
        """``depth``: with so many blocks instead of the model's. ``spills``: what second runs save
        goes to DRAM."""
        config, machine = self.config, self.machine
        rows, seq_len = rows or config.batch_size, seq_len or config.seq_len
        micro = self._micro(micro_rows, seq_len, spills)
        spec = self.spec if depth is None else with_depth(self.spec, depth)
        blocks = sum(stage.kind == "block" for stage in spec.stages)
        profiles = (micro.profiles + micro.profiles[-1:] * blocks)[:blocks]
        work = Work(rows=rows, seq_len=seq_len, micro_rows=micro_rows, hidden_bytes=micro.hidden_bytes)
        summed = () if self._formats.merges else tuple(cls.name for cls in spec.slot_classes) if work.num_micro > 1 else micro.accumulators
        kept = () if config.activations == AUTO and not spills else forced_kept(profiles, config.activations)
        return Request(
            spec=spec, formats=self._formats, optimizer=optimizer_of(config.optimizer, config.max_grad_norm), work=work,
            gpu_budget=machine.gpu_budget, dram_budget=machine.dram_budget, ssd_budget=machine.ssd_budget,
            process_bytes=PROCESS_BYTES, import_element_bytes=self._outline.import_element_bytes,
            workspace_bytes=micro.workspace_bytes, accumulators=summed, profiles=profiles, kept=kept, spill=micro.spill,
            forced=None if config.tier == "auto" else config.tier, checkpoint_tier=config.checkpoint_tier,
            durable=config.durable if config.save_every else "off")

    def _micro(self, rows: int, seq_len: int, spills: bool) -> MicroOutline:
        key = rows, seq_len, spills
        if key not in self._micros:
            self._micros[key] = self._outline.micro(rows, seq_len, spills=spills)
        return self._micros[key]

    # --- the largest ------------------------------------------------------------------------------------------------

    def fits(self, *, rows: int | None = None, seq_len: int | None = None, depth: int | None = None) -> bool:
        """With any size of micro-batch: all at once needs no sums of gradients, one row the least
        activations, least of all with what its second runs save in DRAM."""
        rows = rows or self.config.batch_size
        given = self.config.micro_batch
        sizes = [min(given, rows)] if given != "auto" else [1, rows] if rows * (seq_len or self.config.seq_len) <= (
            SATURATING_TOKENS) else [1]
        tried = [(size, False) for size in sizes] + ([(sizes[0], True)] if self._may_spill else [])
        return any(fits_somewhere(self.request(size, rows=rows, seq_len=seq_len, depth=depth, spills=spills))
                   for size, spills in tried)

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
    config = resolve({**options, "hardware": "auto" if given else hardware,
                      "model": str(model) if isinstance(model, (str, Path)) else None})
    space = None if ssd_space is None else parse_bytes(ssd_space, field="ssd_space")
    rated = None if endurance is None else parse_endurance(endurance, "endurance")
    machine = machine_for(config, hardware=given, ssds=ssds, ssd_space=space)
    with _planner(model, config, machine) as planner:
        return planner.plan(advice=advice, endurance_bytes=rated)
