"""From a model, a batch and budgets to a plan: what the pure planner needs to be told about this
machine."""

import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ratel.errors import RatelError
from ratel.hardware.device import avoid_fragmentation, quiet_first_product
from ratel.hardware.host import available_memory
from ratel.memory.resident import resident_bytes
from ratel.planner.forecast.cost import predict
from ratel.planner.machine.hardware import Hardware
from ratel.planner.machine.stripes import Weights, striped
from ratel.planner.search.micro_batches import Planned, best_plan
from ratel.planner.search.options import SessionOptions
from ratel.planner.search.request import BlockFacts, Budgets, Request, request_for
from ratel.runtime.blocks.batch import Batch
from ratel.runtime.blocks.loss import positions_per_chunk
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.planning import remembered
from ratel.runtime.planning.trial import Trial, try_out
from ratel.startup import arena_ahead
from ratel.units import GIB, MIB, format_bytes

log = logging.getLogger(__name__)

DRAM_MARGIN = 0.90
GPU_MARGIN_BYTES = GIB
PROCESS_MARGIN_BYTES = 256 * MIB
"""What the process may still grow by beside the arena: allocator slack, thread stacks, compiled
kernels."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a plan depends on beside the model, the batch and what was asked."""

    device: torch.device
    machine: Hardware | None = None
    """To predict steps with; None: plan by the simple rule."""
    stripes: Weights = ()
    """How many stripes each SSD directory gets in one round; (): one each."""
    own_files: tuple[Path, ...] = ()
    """In these directories, and to be worked on further: what they take counts as free."""
    micro_before: int | None = None
    """Rows of a micro-batch in the run that is continued: with others its sums would round
    otherwise."""


def make_plan(blocks: BlockRuns, batch: Batch, options: SessionOptions, situation: Situation) -> Planned:
    """Plan for batches of the shape of ``batch``. The memory of activations is measured, not
    guessed."""
    trials, machine = Trials(blocks, batch, options, situation), situation.machine
    if machine is None:
        return best_plan(trials, None, situation.micro_before)
    key = remembered.key_of(situation.device, blocks.parts.spec, torch.are_deterministic_algorithms_enabled(), batch.shapes,
                            options.of_plan, replace(situation, own_files=()))
    planned = _plan_again(trials, remembered.load(key), situation)
    if planned is None:
        planned = best_plan(trials, machine, situation.micro_before)
        remembered.store(key, planned.plan, trials.budgets.ssd)
    return planned


def _plan_again(trials: "Trials", earlier: "remembered.EarlierPlan | None", situation: Situation) -> Planned | None:
    """As it was chosen for the same before; None if it must be searched for."""
    if earlier is None or situation.micro_before not in (None, earlier.micro_rows):
        return None  # of a run that goes on with other micro-batches than before the user is told
    try:
        request = trials.request(earlier.micro_rows, earlier.spills)
    except RatelError:
        return None
    plan = request and earlier.again(request)
    if not plan:
        return None
    log.info("the plan is what was chosen in an earlier start")
    return Planned(plan=plan, prediction=predict(plan, situation.machine))


class Trials:
    """Runs blocks with micro-batches of several sizes, and says what a planner must know of
    each."""

    def __init__(self, blocks: BlockRuns, batch: Batch, options: SessionOptions, situation: Situation) -> None:
        self.options, self.rows, self.positions = options, batch.rows, batch.positions
        self._blocks, self._batch, self._situation, self._device = blocks, batch, situation, situation.device
        self.on_host = self._device.type == "cpu"
        gpu_budget = _gpu_budget(self._device, options.gpu_memory)
        if self._device.type != "cuda":
            arena_ahead.drop()  # here what a block takes is measured in the memory of the process
        self._held_bytes = _held_bytes()
        with arena_ahead.paused() as ahead_bytes:
            free_bytes = available_memory() + ahead_bytes
        self.budgets = Budgets(gpu=gpu_budget, dram=options.dram or int(free_bytes * DRAM_MARGIN) + self._held_bytes,
                               ssd=usable_bytes(options.ssd, situation.own_files, situation.stripes),
                               process_bytes=self._held_bytes + PROCESS_MARGIN_BYTES)
        self._requests: dict[tuple[int, bool], Request | None] = {}

    def request(self, micro_rows: int, spills: bool) -> Request | None:
        """None if a block does not fit on the GPU with so many rows."""
        if (micro_rows, spills) not in self._requests:
            try:
                self._requests[micro_rows, spills] = self._try(micro_rows, spills)
            except torch.OutOfMemoryError:
                self._requests[micro_rows, spills] = None
        return self._requests[micro_rows, spills]

    def _try(self, micro_rows: int, spills: bool) -> Request:
        sizes = dict.fromkeys(size for size in (micro_rows, self.rows % micro_rows) if size)
        trial = try_out(self._blocks, [self._batch.first(size, self._device) for size in sizes], self._device,
                        self.options.activations, timed=self._situation.machine is not None,
                        region_limit=self.budgets.dram - self._held_bytes if spills else None)
        return request_for(self._blocks.parts.spec, self.options, self._budgets_now(), self._facts(micro_rows, trial),
                           rows=self.rows, seq_len=self.positions, micro_rows=micro_rows, on_host=self.on_host,
                           has_rates=self._situation.machine is not None)

    def _facts(self, micro_rows: int, trial: Trial) -> BlockFacts:
        parts = self._blocks.parts
        with torch.no_grad():  # parameters are placeholders: only the shape of the hidden states is of interest
            hidden, _ = parts.head(self._batch.first(1, parts.device).content)
        chunked = parts.is_causal_lm and positions_per_chunk(micro_rows, parts.spec.vocab_size) < self.positions
        return BlockFacts(hidden_bytes=hidden.nbytes * micro_rows, workspace_bytes=trial.workspace_bytes,
                          profiles=trial.profiles, has_chunked_loss=chunked, spill=trial.spill, loss_s=trial.loss_s,
                          import_element_bytes=parts.stored.import_element_bytes)

    def _budgets_now(self) -> Budgets:
        """A compiler's own memory is there to stay; on a CPU device activations, which are not, are
        in the same heap."""
        held = _held_bytes() if self.options.compiles and not self.on_host else 0
        return replace(self.budgets, process_bytes=max(self._held_bytes, held) + PROCESS_MARGIN_BYTES)


def _gpu_budget(device: torch.device, given: int | None) -> int | None:
    """Caps PyTorch's allocator at the budget. On a CPU device, only what the user gives is used as
    a GPU tier."""
    if device.type != "cuda":
        return given
    gc.collect()
    torch.cuda.empty_cache()
    avoid_fragmentation()
    quiet_first_product()
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    if given is not None and given > free:
        raise RatelError(f"the GPU has {format_bytes(free)} free", field="gpu_memory", value=format_bytes(given),
                         remedy="Give less, or end what else uses the GPU")
    budget = given if given is not None else free - GPU_MARGIN_BYTES
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    return budget - torch.cuda.memory_reserved(device)


def _held_bytes() -> int:
    """Resident bytes of this process, without the memory that is mapped ahead for the arena that is
    being planned."""
    with arena_ahead.paused() as ahead_bytes:
        return resident_bytes() - ahead_bytes


def usable_bytes(directories: Sequence[str], own_files: Sequence[Path], weights: Weights) -> int | None:
    """Space for stripes with these weights, ``own_files`` counted as free: the directory that is
    full first decides. None without directories."""
    if not directories:
        return None
    spaces = []
    for directory in directories:
        disk, real = os.statvfs(directory), os.path.realpath(directory)
        own_bytes = sum(path.stat().st_size for path in own_files if os.fspath(path.parent) == real)
        spaces.append(disk.f_bavail * disk.f_frsize + own_bytes)
    return int(striped(spaces, weights or (1,) * len(directories)))
