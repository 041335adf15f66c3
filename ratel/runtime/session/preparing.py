"""Preparing a session: planning for the shape of its batches, reserving what the plan says, and
bringing the states in."""

from dataclasses import replace
from typing import Any

import torch

from ratel.errors import RatelError
from ratel.models import Parts
from ratel.planner.formats import FORMATS
from ratel.planner.machine.hardware import Hardware
from ratel.planner.machine.stripes import Weights
from ratel.planner.search.micro_batches import Planned
from ratel.runtime.blocks.batch import Batch
from ratel.runtime.blocks.compiled import CompiledBlocks
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.planning.prepare import Situation, make_plan
from ratel.runtime.session.build import build, own_files, own_stripes
from ratel.runtime.session.core import Capacity, Core
from ratel.runtime.session.meter import Meter
from ratel.runtime.session.training_step import Training
from ratel.runtime.states.commits import remove_leftovers
from ratel.runtime.states.moments import check_moments
from ratel.startup.known_hardware import hardware_for
from ratel.trace import phases


def ready_for(core: Core, given: Any) -> Batch:
    """The batch, checked; the session prepared for it, if it is the first."""
    core.check_usable()
    batch = Batch.of(core.parts, given)
    if core.machinery is None:
        prepare(core, batch)
    if core.parts.is_causal_lm:
        core.parts.begin(batch.content)
    return batch


def prepare(core: Core, batch: Batch) -> None:
    check_gradients_can_be()
    parts, commits = core.parts, core.options.commits
    core.capacity = Capacity.of(batch)
    if not parts.probed:
        parts.probe(batch.content)
        check_moments(core.moments, parts)
        if core.adaptation is not None:
            core.adaptation.check_base()
    check_length(parts, batch.positions)
    blocks = _block_runs(core)
    remove_leftovers(commits, core.io.directories)  # before it is asked how much space there is
    planned = _make_plan(core, blocks, batch)
    core.machinery = m = build(parts, planned.plan, core.device, threads=core.threads, io=core.io, commits=commits,
                               saved=core.saved, moments=core.moments)
    core.planned = planned
    core.training = Training(blocks, planned.plan, m, seed=core.options.seed, clip=core.options.max_grad_norm)
    core.meter = Meter(m.lanes, m.updates, m.engine)


def plan_for(core: Core, rows: int, seq_len: int) -> Planned:
    core.check_usable()
    batch = Batch.sample(core.parts, rows, seq_len)
    check_length(core.parts, seq_len)
    return _make_plan(core, _block_runs(core), batch)


def check_length(parts: Parts, positions: int) -> None:
    limit = parts.spec.max_seq_len
    if (parts.is_causal_lm or parts.task) and limit is not None and positions > limit:
        raise RatelError(f"the model handles sequences of at most {limit} tokens", field="seq_len", value=positions,
                         remedy=f"Use --seq-len {limit} or less")


def check_gradients_can_be() -> None:
    """`torch.no_grad` a session overrides; this it cannot."""
    if torch.is_inference_mode_enabled():
        raise RatelError("is on, and what is made in it has no gradients", field="torch.inference_mode",
                         remedy="Leave it before you train")


def _block_runs(core: Core) -> BlockRuns:
    return BlockRuns(core.parts, CompiledBlocks(core.parts) if core.options.compiles else None)


def _make_plan(core: Core, blocks: BlockRuns, batch: Batch) -> Planned:
    directories, options = core.io.directories, core.options
    with phases.phase("rates of the machine"):
        machine = hardware_for(options.hardware, core.device, directories, options.ssd_bandwidth, options.dram)
    on_disk, even = own_stripes(core.saved, options.commits, directories), (1,) * len(directories)
    stripes = on_disk or (even if machine is None else machine.stripe_weights)
    with phases.phase("trial of blocks and plan"):
        try:
            return _plan_striped(core, blocks, batch, machine, stripes)
        except RatelError as error:
            if error.field != "ssd" or on_disk or stripes == even:
                raise
            return _plan_striped(core, blocks, batch, machine, even)  # a fast drive may be the one with little space


def _plan_striped(core: Core, blocks: BlockRuns, batch: Batch, machine: Hardware | None, stripes: Weights) -> Planned:
    core.machine = None if machine is None else replace(machine, stripes=stripes)
    core.io = replace(core.io, stripes=stripes)
    formats = FORMATS[core.options.states][core.options.dtype]
    situation = Situation(device=core.device, machine=core.machine, stripes=stripes, micro_before=micro_before(core, batch),
                          own_files=own_files(core.saved, core.options.commits, formats))
    return make_plan(blocks, batch, core.options, situation)


def micro_before(core: Core, batch: Batch) -> int | None:
    """Rows of a micro-batch in the run whose state was loaded, if its steps had as many rows."""
    before = core.saved.training.get("micro_batches", {}) if core.saved else {}
    return before.get("rows_of_one") if before.get("rows") == batch.rows else None
