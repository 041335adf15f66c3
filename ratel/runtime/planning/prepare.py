"""From a model, a batch and budgets to a plan: what the pure planner needs to be told about this
machine."""

import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ratel.errors import RatelError
from ratel.hardware.device import avoid_fragmentation, quiet_first_product
from ratel.hardware.host import available_memory
from ratel.memory.resident import resident_bytes
from ratel.models import Parts
from ratel.planner.activation_policy import AUTO, SPILL, Activations
from ratel.planner.forecast.cost import Prediction, predict
from ratel.planner.formats import StateFormats
from ratel.planner.hardware import Hardware
from ratel.planner.placement import Forced
from ratel.planner.plan import Buffers, Plan, Work
from ratel.planner.search.choose import Request, choose
from ratel.planner.search.micro_sizes import COMPARED, micro_sizes
from ratel.planner.search.search import search
from ratel.planner.shape import outside_blocks
from ratel.planner.stripes import Weights, striped
from ratel.runtime.blocks.batch import count_rows, map_tensors, tensors_of
from ratel.runtime.blocks.loss import positions_per_chunk
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.planning import remembered
from ratel.runtime.planning.trial import try_out
from ratel.startup import arena_ahead
from ratel.trace import phases
from ratel.units import GIB, MIB, format_bytes

log = logging.getLogger(__name__)

DRAM_MARGIN = 0.90
GPU_MARGIN_BYTES = GIB
PROCESS_MARGIN_BYTES = 256 * MIB
"""What the process may still grow by beside the arena: allocator slack, thread stacks, compiled
kernels."""


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What the user allows, in bytes; ``None``: what the machine has free, less a margin."""

    gpu: int | None
    dram: int | None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The largest batch that the session has room for."""

    rows: int
    positions: int

    @classmethod
    def of(cls, batch: Any, rows: int) -> "Shape":
        return cls(rows=rows, positions=max(t.numel() // rows for t in tensors_of(batch)))

    def check(self, batch: Any) -> None:
        given = Shape.of(batch, count_rows(batch))
        if given.rows > self.rows or given.positions > self.positions:
            raise RatelError(f"the session was prepared for {self.rows} rows of {self.positions} at most", field="batch",
                             value=f"{given.rows} rows of {given.positions}",
                             remedy="Give a batch of the largest shape first, or call Session.prepare(rows, seq_len) with "
                                    "it before the first step")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was asked of the plan; what else it needs is found out here."""

    formats: StateFormats
    optimizer: str
    budgets: Budgets
    directories: tuple[str, ...] = ()
    stripes: Weights = ()
    """How many stripes each SSD directory gets in one round; (): one each."""
    own_files: tuple[Path, ...] = ()
    """In these directories, and to be worked on further: what they take counts as free."""
    micro_batch: int | str = "auto"
    micro_before: int | None = None
    """Rows of a micro-batch in the run that is continued: with others its sums would round
    otherwise."""
    forced: Forced | None = None
    checkpoint_tier: str = "auto"
    activations: Activations = "auto"
    buffers: Buffers = Buffers()
    durable: str = "off"
    hardware: Hardware | None = None
    """The machine's rates, to predict steps with; None: plan by the simple rule."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    plan: Plan
    prediction: Prediction | None


def make_plan(blocks: BlockRuns, batch: Any, wishes: Wishes, device: torch.device) -> Planned:
    """Plan for batches of the shape of ``batch``. The memory of activations is measured, not
    guessed."""
    trials = _Trials(blocks, batch, wishes, device)
    if wishes.hardware is None:
        return _search(trials, blocks, batch, wishes, device)
    shapes = [(tuple(t.shape), t.dtype) for t in tensors_of(batch)]
    key = remembered.key_of(device, blocks.parts.spec, blocks.compiles, torch.are_deterministic_algorithms_enabled(), shapes,
                              replace(wishes, own_files=()))
    planned = _plan_again(trials, remembered.load(key), wishes)
    if planned is None:
        planned = _search(trials, blocks, batch, wishes, device)
        remembered.store(key, planned.plan, trials.ssd_budget)
    return planned


def _plan_again(trials: "_Trials", earlier: "remembered.EarlierPlan | None", wishes: Wishes) -> Planned | None:
    """As it was chosen for the same before; None if it must be searched for."""
    if earlier is None or wishes.micro_before not in (None, earlier.micro_rows):
        return None  # of a run that goes on with other micro-batches than before the user is told
    try:
        request = trials.request(earlier.micro_rows, earlier.spills)
    except RatelError:
        return None
    plan = request and earlier.again(request)
    if not plan:
        return None
    log.info("the plan is what was chosen in an earlier start")
    return Planned(plan=plan, prediction=predict(plan, wishes.hardware))


def _search(trials: "_Trials", blocks: BlockRuns, batch: Any, wishes: Wishes, device: torch.device) -> Planned:
    """Among sizes of micro-batches, a few at a time, until one fits."""
    sizes = _candidates(count_rows(batch), batch, wishes.micro_batch)
    together = 1 if wishes.hardware is None else COMPARED
    groups = [sizes[begin : begin + together] for begin in range(0, len(sizes), together)]
    if wishes.micro_before is not None and wishes.micro_batch == AUTO:
        groups.insert(0, [wishes.micro_before])
    for group in groups:
        try:
            return _plan_for(trials, group, wishes, spills=wishes.activations == SPILL)
        except RatelError as error:
            failure = error
            if error.field not in ("gpu_memory", "dram" if device.type == "cpu" else ""):
                raise
            if group == [wishes.micro_before]:
                log.warning("micro-batches of %d, as before, do not fit any more: with others sums round otherwise", *group)
    if wishes.activations == AUTO and failure.field == "gpu_memory" and not blocks.compiles:
        return _plan_for(trials, sizes[-1:], wishes, spills=True)
    raise failure


def _plan_for(trials: "_Trials", sizes: list[int], wishes: Wishes, *, spills: bool) -> Planned:
    """The best plan with one of these micro-batches. ``spills``: what second runs save goes through
    DRAM."""
    requests = [request for request in (trials.request(size, spills) for size in sizes) if request is not None]
    if not requests:
        raise RatelError(f"a micro-batch of {sizes[-1]} does not pass a block within the budget"
                         + (", though what backward needs of it goes through DRAM" if spills else ""), field="gpu_memory",
                         value=trials.gpu_budget, remedy="Give a larger --gpu-memory or a smaller --seq-len")
    if wishes.hardware is None:
        return Planned(plan=choose(requests[0]), prediction=None)
    with phases.phase("search for a plan"):
        chosen = search(requests, wishes.hardware)
    return Planned(plan=chosen.plan, prediction=chosen.prediction)


class _Trials:
    """Runs blocks with micro-batches of several sizes, and says what a planner must know of
    each."""

    def __init__(self, blocks: BlockRuns, batch: Any, wishes: Wishes, device: torch.device) -> None:
        self._blocks, self._batch, self._wishes, self._device = blocks, batch, wishes, device
        self.gpu_budget = _gpu_budget(device, wishes.budgets.gpu)
        if device.type != "cuda":
            arena_ahead.drop()  # here what a block takes is measured in the memory of the process
        self._held_bytes = _held_bytes()
        with arena_ahead.paused() as ahead_bytes:
            free_bytes = available_memory() + ahead_bytes
        self._dram_budget = wishes.budgets.dram or int(free_bytes * DRAM_MARGIN) + self._held_bytes
        self.ssd_budget = usable_bytes(wishes.directories, wishes.own_files, wishes.stripes)
        self._rows = count_rows(batch)
        self._requests: dict[tuple[int, bool], Request | None] = {}

    def request(self, micro_rows: int, spills: bool) -> Request | None:
        """None if a block does not fit on the GPU with so many rows."""
        if (micro_rows, spills) not in self._requests:
            self._requests[micro_rows, spills] = self._try(micro_rows, spills)
        return self._requests[micro_rows, spills]

    def _try(self, micro_rows: int, spills: bool) -> Request | None:
        wishes, parts = self._wishes, self._blocks.parts
        work = _work(parts, self._batch, self._rows, micro_rows)
        sizes = dict.fromkeys(size for size in (micro_rows, self._rows % micro_rows) if size)
        try:
            trial = try_out(self._blocks, [_take_rows(self._batch, size, self._device) for size in sizes], self._device,
                            wishes.activations, timed=wishes.hardware is not None,
                            region_limit=self._dram_budget - self._held_bytes if spills else None)
        except torch.OutOfMemoryError:
            return None
        # A compiler's own memory is there to stay; on a CPU device activations, which are not, are
        # in the same heap.
        held = _held_bytes() if self._blocks.compiles and self._device.type == "cuda" else 0
        is_free = wishes.activations == AUTO and wishes.hardware is not None and not spills
        return Request(spec=parts.spec, formats=wishes.formats, optimizer=wishes.optimizer, work=work,
                       gpu_budget=self.gpu_budget, dram_budget=self._dram_budget,
                       ssd_budget=self.ssd_budget, buffers=wishes.buffers,
                       process_bytes=max(self._held_bytes, held) + PROCESS_MARGIN_BYTES,
                       import_element_bytes=parts.import_element_bytes, workspace_bytes=trial.workspace_bytes,
                       forced=wishes.forced, profiles=trial.profiles, loss_s=trial.loss_s,
                       kept=() if is_free else trial.kept, spill=trial.spill,
                       accumulators=() if wishes.formats.merges else _accumulators(parts, work),
                       checkpoint_tier=wishes.checkpoint_tier, on_host=self._device.type == "cpu",
                       durable=wishes.durable)


def _candidates(rows: int, batch: Any, micro_batch: int | str) -> list[int]:
    """Micro-batch sizes to try: the one given, or from about the smallest that saturates the GPU
    down to one row."""
    if micro_batch != "auto":
        if not 1 <= int(micro_batch) <= rows:
            raise RatelError(f"must be between 1 and the {rows} rows of a batch", field="micro_batch", value=micro_batch)
        return [int(micro_batch)]
    return micro_sizes(rows, max(t.numel() // rows for t in tensors_of(batch)))


def _work(parts: Parts, batch: Any, rows: int, micro_rows: int) -> Work:
    """Parameters are placeholders here: only the shape of the hidden states is of interest."""
    with torch.no_grad():
        hidden, _ = parts.head(_take_rows(batch, 1, parts.device))
    row_bytes = hidden.numel() * hidden.element_size()
    return Work(rows=rows, seq_len=max(t.numel() // rows for t in tensors_of(batch)), micro_rows=micro_rows,
                hidden_bytes=row_bytes * micro_rows)


def _take_rows(batch: Any, count: int, device: torch.device) -> Any:
    return map_tensors(lambda t: t[:count].to(device), batch)


def _accumulators(parts: Parts, work: Work) -> tuple[str, ...]:
    """Weight classes whose gradients are sums of several passes, whose rounding in bf16 would add
    up."""
    if work.num_micro > 1:
        return tuple(cls.name for cls in parts.spec.slot_classes)
    chunked = parts.is_causal_lm and positions_per_chunk(work.micro_rows, parts.spec.vocab_size) < work.seq_len
    return outside_blocks(parts.spec) if chunked else ()


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
