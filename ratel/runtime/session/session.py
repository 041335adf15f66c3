"""The session: a model under a plan, one step at a time."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ratel import interrupt, models
from ratel.config import read_options
from ratel.errors import DamagedError, RatelError, WorkerError
from ratel.hardware.device import require_device
from ratel.hardware.host import worker_cores
from ratel.memory.exchange import Exchange
from ratel.models.calls.tasks import Task
from ratel.models.checkpoints.other_state import pack, refuse_unreadable
from ratel.ownership.apart import contains
from ratel.planner.activation_policy import Activations
from ratel.planner.forecast.cost import Prediction
from ratel.planner.formats import EXACT
from ratel.planner.hardware import Hardware
from ratel.planner.placement import Forced
from ratel.planner.plan import Buffers, Plan
from ratel.planner.shape import UnitSpec
from ratel.planner.stripes import Weights
from ratel.runtime.blocks.batch import Micro
from ratel.runtime.blocks.batch import causal_batch, count_rows, count_targets, cut, nothing_to_learn, refuse_documents, split
from ratel.runtime.blocks.compiled import CompiledBlocks
from ratel.runtime.blocks.loss import with_labels
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.planning.prepare import Budgets, Planned, Shape, Wishes, make_plan
from ratel.runtime.planning.requested import bytes_or_none, directories_of, durability_of, is_compiled, learning_rate, optimizer_of
from ratel.runtime.session.build import build, own_files, own_stripes
from ratel.runtime.session.entrance import Entrance, entered
from ratel.runtime.session.machinery import Machinery
from ratel.runtime.session.meter import Meter
from ratel.runtime.session.recording import Recording
from ratel.runtime.session.result import StepResult
from ratel.runtime.session.training_step import Training
from ratel.runtime.states.commits import remove_leftovers
from ratel.runtime.states.durable_files import check_state_target, replaceable
from ratel.runtime.states.format import OtherState
from ratel.runtime.states.moments import check_moments, export_moments, open_moments
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.saver import Target, raise_failure
from ratel.runtime.states.targets import CommitTarget, DirectoryTarget
from ratel.runtime.updates.jobs import Hyper
from ratel.startup.known_hardware import hardware_for
from ratel.store.volumes import IoOptions
from ratel.trace import phases

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Session:
    """Trains every parameter of a model whose states live on GPU, in DRAM and on SSD.

    ``model``: Hugging Face directory, preset name, configuration, PreTrainedModel, or any nn.Module
    with repeated blocks and a ``loss_fn(model, batch)``. ``gpu_memory``, ``dram``: budgets
    (``"24GiB"`` or bytes); by default what is free. ``ssd``: directories to stripe over.
    ``max_grad_norm`` 0 or None: no clipping. ``tier`` forces all states into one tier,
    ``placement`` single units or planes (`ratel.planner.placement.forced_placements`),
    ``activations`` what is kept of the inside of blocks (`ratel.planner.activation_policy`). None
    of these, nor ``buffers`` and the thread counts, change a result. ``compile``: ``on`` fuses the
    operations of blocks by `torch.compile`, which rounds otherwise and keeps nothing of their
    inside. ``optimizer_state``: a file or directory with the moments and the step count to start
    from (docs/state_format.md). ``durable``: ``step`` keeps two versions of everything on SSD, so
    that ``commit`` can make a step last without copying what is there; its records go to the
    directory ``commits``. ``auto`` takes that where it pays and fits, else ``checkpoint``: copies
    by ``save``. ``checksums`` of what is on SSD: on or off. ``hardware``: the rates to plan with
    (`ratel.startup.known_hardware.hardware_for`). ``loss_fn(model, batch)`` returns the mean over
    the rows of what it is given, a scalar: it is called for each micro-batch, whose size the plan
    chooses, and the results are averaged by rows (a mean over tokens of which rows have unlike
    numbers depends on that size; ``micro_batch`` fixes it). ``task``: ``classify``, ``tokens`` or
    ``masked-lm`` train a model of transformers with that head on batches with ``labels`` (a
    `ratel.Task` also says the labels' names); no ``loss_fn`` then. ``router_aux_loss``: ``auto``
    adds the loss of routers to that of a causal language model if its configuration has
    ``output_router_logits``, ``off`` never, a number always, with that coefficient. Raises
    RatelError for what cannot work, before anything is reserved.
    """

    def __init__(self, model: Any, *, gpu_memory: str | int | None = None, dram: str | int | None = None,
                 ssd: "str | os.PathLike | list | tuple | None" = None, device: str = "auto", dtype: str = "bf16",
                 lr: float = 1e-5, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, max_grad_norm: float | None = 1.0, optimizer: str = "auto",
                 optimizer_state: "str | os.PathLike | None" = None, micro_batch: int | str = "auto", seed: int = 0,
                 loss_fn: Callable[[Any, Any], Any] | None = None, task: str | Task = "next-token",
                 router_aux_loss: float | str = "auto", tier: str = "auto", placement: Forced | None = None,
                 checkpoint_tier: str = "auto", activations: Activations = "auto",
                 ssd_bandwidth: str | float | None = None, io_backend: str = "auto", direct: str = "auto",
                 optimizer_threads: int | str = "auto", attention: str = "auto", compile: str = "off",
                 buffers: Buffers = Buffers(),
                 durable: str = "off", commits: "str | os.PathLike | None" = None, checksums: str = "on",
                 hardware: "str | Hardware" = "auto") -> None:
        self._entrance = Entrance()
        computes_in, task = _dtype_of(dtype), _task_of(task, loss_fn)
        given = read_options(betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm or 0.0,
                             optimizer=optimizer, micro_batch=micro_batch, seed=seed, tier=tier,
                             checkpoint_tier=checkpoint_tier, io_backend=io_backend, direct=direct,
                             activations="auto" if isinstance(activations, dict) else activations, compile=compile,
                             router_aux_loss=router_aux_loss,
                             ssd_bandwidth=ssd_bandwidth, optimizer_threads=optimizer_threads, checksums=checksums)
        self.device = require_device(device)
        self._io = IoOptions(directories=directories_of(ssd), backend=io_backend, direct=direct,
                             bandwidth_bps=given["ssd_bandwidth"], checksums=checksums == "on")
        self._reads = [(name, used) for name, used in (("model", model), ("optimizer_state", optimizer_state))
                       if isinstance(used, (str, os.PathLike)) and os.path.exists(used)]
        durable, self._commits = durability_of(durable, commits, self._io)
        if durable in ("auto", "step"):
            self._apart(self._commits, "commits")
        self._clip = given["max_grad_norm"]
        self._wishes = Wishes(
            formats=EXACT[dtype], optimizer=optimizer_of(optimizer, self._clip), directories=self._io.directories,
            micro_batch=given["micro_batch"],
            budgets=Budgets(gpu=bytes_or_none(gpu_memory, "gpu_memory"), dram=bytes_or_none(dram, "dram")),
            forced=placement if placement is not None else (None if tier == "auto" else tier),
            checkpoint_tier=checkpoint_tier, buffers=buffers, durable=durable,
            activations=activations if isinstance(activations, dict) else given["activations"])
        self._compiles = is_compiled(compile, activations)
        self._hardware = hardware
        self.machine: Hardware | None = None
        self.prediction: Prediction | None = None
        """What a step was predicted to take; like ``machine``, there is one where the plan was made
        with a machine's rates."""
        self._hyper = dict(zip(("beta1", "beta2"), given["betas"]), eps=given["eps"], weight_decay=given["weight_decay"])
        self.lr, self.seed, self.dtype = learning_rate(lr), given["seed"], dtype
        self._threads = worker_cores() if optimizer_threads == "auto" else given["optimizer_threads"]
        self._machinery: Machinery | None = None
        self._plan: Plan | None = None
        self._meter: Meter | None = None
        self._closed = False
        self._broken: BaseException | None = None
        """What ended the session before its time."""
        self._gives_back = isinstance(model, torch.nn.Module)
        self._attempts, self._saved_at = 0, -1
        self._saved: SavedState | None = None
        self.accuracy: float | None = None
        """The share of targets of the last evaluation whose most likely label is right, for tasks
        that choose a label."""
        with phases.phase("model in outline"):
            self.parts = models.load(model, dtype=computes_in, device=self.device, seed=seed, loss_fn=loss_fn,
                                     attention=attention, task=task)
        try:
            self._add_router_loss(given["router_aux_loss"])
            self.parts.check_source()
            refuse_unreadable(self.parts.other_state())
            self._moments = open_moments(optimizer_state)
            self._updates_made = self._moments.step if self._moments is not None else 0
            check_moments(self._moments, self.parts)
        except BaseException:
            self.parts.close()
            raise

    def _add_router_loss(self, asked: float | str) -> None:
        self.parts.add_router_loss(asked)
        if self.parts.routing is not None and self._compiles:
            raise RatelError("does not go together with the loss of routers, which looks into blocks", field="compile", value="on",
                             remedy="Use --compile off, or --router-aux-loss off")

    # --- preparing ----------------------------------------------------------------------------------------------

    @entered
    def prepare(self, rows: int, seq_len: int) -> Plan:
        """Plan for batches of this shape, reserve everything, import the weights. The first step
        does it otherwise."""
        if not self.parts.probed:
            raise RatelError("a model with its own loss is prepared by its first batch", field="prepare",
                             remedy="Call step(batch)")
        self._check_usable()
        if self._machinery is not None:
            raise RatelError("the session is prepared already", field="prepare",
                             value=f"{self._shape.rows} rows of {self._shape.positions}", remedy="Make a new session")
        return self._prepare(self.parts.sample(rows, seq_len))

    @entered
    def plan_for(self, rows: int, seq_len: int) -> Planned:
        """What `prepare` would decide. Blocks are tried out, nothing is reserved. Raises RatelError
        for what does not fit."""
        self._check_usable()
        batch = self.parts.sample(rows, seq_len)
        self._check_length(seq_len)
        return self._make_plan(self._block_runs(), batch)

    def _block_runs(self) -> BlockRuns:
        return BlockRuns(self.parts, CompiledBlocks(self.parts) if self._compiles else None)

    def _make_plan(self, blocks: BlockRuns, batch: Any) -> Planned:
        directories = self._io.directories
        with phases.phase("rates of the machine"):
            machine = hardware_for(self._hardware, self.device, directories, self._io.bandwidth_bps,
                                   self._wishes.budgets.dram)
        on_disk, even = own_stripes(self._saved, self._commits, directories), (1,) * len(directories)
        stripes = on_disk or (even if machine is None else machine.stripe_weights)
        with phases.phase("trial of blocks and plan"):
            try:
                return self._plan_striped(blocks, batch, machine, stripes)
            except RatelError as error:
                if error.field != "ssd" or on_disk or stripes == even:
                    raise
                return self._plan_striped(blocks, batch, machine, even)  # a fast drive may be the one with little space

    def _plan_striped(self, blocks: BlockRuns, batch: Any, machine: Hardware | None, stripes: Weights) -> Planned:
        self.machine = None if machine is None else replace(machine, stripes=stripes)
        self._io = replace(self._io, stripes=stripes)
        wishes = replace(self._wishes, hardware=self.machine, stripes=stripes, micro_before=self._micro_before(batch),
                         own_files=own_files(self._saved, self._commits))
        return make_plan(blocks, batch, wishes, self.device)

    def _micro_before(self, batch: Any) -> int | None:
        """The rows of a micro-batch of the run whose state was loaded, if its steps had as many
        rows."""
        before = self._saved.training.get("micro_batches", {}) if self._saved else {}
        return before.get("rows_of_one") if before.get("rows") == count_rows(batch) else None

    def _prepare(self, batch: Any) -> Plan:
        _check_gradients_can_be()
        self._shape = Shape.of(batch, count_rows(batch))
        if not self.parts.probed:
            self.parts.probe(batch)
            check_moments(self._moments, self.parts)
        self._check_length(self._shape.positions)
        blocks = self._block_runs()
        remove_leftovers(self._commits, self._io.directories)  # before it is asked how much space there is
        planned = self._make_plan(blocks, batch)
        plan, self.prediction = planned.plan, planned.prediction
        self._machinery = build(self.parts, plan, self.device, threads=self._threads, io=self._io, commits=self._commits,
                                saved=self._saved, moments=self._moments)
        self._plan, m = plan, self._machinery
        self._training = Training(blocks, plan, m, seed=self.seed, clip=self._clip)
        self._meter = Meter(m.lanes, m.updates, m.engine)
        return plan

    @property
    def plan(self) -> Plan:
        if self._plan is None:
            raise RatelError("there is no plan before the shape of a batch is known", field="plan",
                             remedy="Call prepare(rows, seq_len) or step(batch) first")
        return self._plan

    @property
    def hardware(self) -> dict[str, Any]:
        """What was chosen on this machine."""
        facts = {"device": str(self.device), "optimizer_threads": self._threads}
        if self._machinery is not None:
            facts["isa"] = self._machinery.pool.isa
            facts["io_backend"] = self._machinery.engine.backend if self._machinery.engine else None
            facts["ssd_stripes"] = dict(zip(self._io.directories, self._io.stripes))
        return facts

    # --- training -----------------------------------------------------------------------------------------------

    @entered
    def step(self, batch: Any, *, lr: float | None = None, trace: bool = False) -> StepResult:
        """Forward, backward and update on one batch; see docs/architecture.md for what happens
        when.

        ``trace`` records what every resource and thread did (``timeline``, which `Timeline.write`
        draws), and waits for the device at the end; it changes no result.
        """
        begun = perf_counter()
        _check_gradients_can_be()
        lr = self.lr if lr is None else learning_rate(lr)
        batch = self._ready(batch)
        targets = count_targets(self.parts, batch)
        if targets == 0:
            raise nothing_to_learn()
        tokens = _count_tokens(batch)
        micros = self._split(batch, targets)
        hyper = Hyper(lr=lr, step=self._updates_made + 1, **self._hyper)
        recording = Recording(self._machinery) if trace else None  # last: what is refused must not leave it on
        self._meter.begin()
        with self._protected():
            done = self._training.step(micros, targets=targets, attempt=self._attempts, hyper=hyper)
            self._attempts += 1  # here, since an interrupt between a step and its counting must end the session, too
            self._updates_made += done.applied
        usage = self._meter.read()
        seconds = perf_counter() - begun
        return StepResult(step=self._attempts, loss=done.loss, grad_norm=done.grad_norm, lr=lr, tokens=tokens,
                          seconds=seconds, bound_s=usage.bound_s, bound_by=usage.bound_by, skipped=not done.applied,
                          early_units=done.early_units, redone_units=done.redone_units, usage=usage,
                          timeline=recording.finish(self._attempts, begun) if recording else None)

    # --- beside training ----------------------------------------------------------------------------------------

    @entered
    def evaluate(self, batches: Iterable[Any]) -> float:
        """Mean loss per target token (per row for a model with its own loss), without dropout.
        Batches of more rows than a step's are taken in pieces."""
        if not isinstance(batches, Iterable):
            raise RatelError("is not an iterable of batches", field="evaluate", value=type(batches).__name__, remedy="Give a list of them")
        total, weight = 0.0, 0
        self.parts.set_training(False)
        try:
            for batch in interrupt.each_outside(batches):
                for part in self._rows_of(batch):
                    self.flush()
                    count = count_targets(self.parts, part)
                    if count:
                        with self._protected():
                            total += self._training.evaluate(self._split(part, count), targets=count) * count
                        weight += count
        finally:
            self.parts.set_training(True)
            self.accuracy = self.parts.task_runner.take_accuracy() if self.parts.task else None
            if self._meter is not None:
                self._meter.read()  # an evaluation's work is not the next step's
        if weight == 0:
            raise RatelError("there is no target token to evaluate on", field="eval_data")
        return total / weight

    @entered
    def flush(self) -> None:
        """Complete pending updates: afterwards every plane on its tier is that of the last step."""
        self._check_usable()
        if self._machinery is not None:
            with self._noticing():
                self._machinery.updates.flush()
                self._machinery.lanes.synchronize()  # updates on the GPU may run on another stream than the caller's

    @entered
    def read_master(self, unit: UnitSpec) -> torch.Tensor:
        """The unit's fp32 master weights, 1-D in its layout, on the CPU."""
        self.flush()
        return self._machinery.transfer.read_weights(unit)

    @entered
    def read_state(self, unit: UnitSpec, plane: str) -> torch.Tensor:
        """A copy of one plane (``hi``, ``lo``, ``m``, ``v``) on the CPU."""
        self.flush()
        return self._machinery.transfer.read(unit, plane)

    @entered
    def state_dict(self) -> dict[str, Any]:
        """All master weights by parameter name, fp32 on the CPU, and what else the model's state
        dict has. Whole in memory: for models that fit there."""
        result: dict[str, Any] = self.parts.other_state()
        for unit in self.plan.spec.units:
            flat = self.read_master(unit)
            result.update({p.name: flat[p.offset : p.end].view(p.shape).clone() for p in unit.params})
        return result

    @entered
    def save(self, path: "str | os.PathLike", *, extra: dict[str, Any] | None = None, wait: bool = True) -> Path:
        """Write the complete training state as a directory; ``extra`` (JSON, copied now) is handed
        back by `load`.

        An older state of that name is replaced only by a complete one; what else was in the
        directory stays. Without ``wait`` it is written while training goes on, and an error is
        raised by a later call.
        """
        if self._machinery is None:
            raise RatelError("there is nothing to save before the first step", field="save")
        other = self._other_state()
        target = self._apart(replaceable(Path(path), "save"), "save")
        check_state_target(target, "save")
        self._save(DirectoryTarget(target, self.plan, self._machinery.engine, other), other, extra, wait)
        return Path(path)

    @entered
    def commit(self, *, extra: dict[str, Any] | None = None, wait: bool = False) -> None:
        """Make the last step last (``durable="step"``): after a crash at any time, `load` of
        ``commits`` continues from the newest commit that was complete. Training goes on meanwhile,
        unless ``wait``.
        """
        if self._machinery is None or not self.plan.commits:
            raise RatelError("the session does not commit in place", field="durable", value=self._wishes.durable,
                             remedy='Make it with durable="step" and commits=DIR, and take a step')
        other = self._other_state()
        self._save(CommitTarget(self._machinery.log, self._machinery.engine, other), other, extra, wait)

    def _other_state(self) -> OtherState | None:
        state = self.parts.other_state()
        return OtherState(content=pack(state)) if state else None

    def _save(self, target: Target, other: OtherState | None, extra: dict[str, Any] | None, wait: bool) -> None:
        self._check_usable()
        training = {"steps": self._attempts, "updates": self._updates_made, "seed": self.seed, "dtype": self.dtype,
                    "hyper": self._hyper, "max_grad_norm": self._clip, "extra": _as_of_now(extra),
                    "micro_batches": {"rows": self.plan.work.rows, "rows_of_one": self.plan.work.micro_rows},
                    **({"buffers": other.describe()} if other else {})}
        if self.parts.task is not None:
            training["task"] = self.parts.task_runner.known_task.to_json()
        self.wait_saved()
        with self._protected():  # an interrupt between holding updates back and asking the saver would hold them for ever
            self._machinery.saver.request(target, training)
            self._saved_at = self._attempts
        if wait:
            self.wait_saved()
            self._meter.read()  # what saving reads is not the next step's

    @entered
    def wait_saved(self) -> None:
        """Block until a save or commit under way, if any, is complete."""
        self._check_usable()
        if self._machinery is not None:
            if self._saved_at == self._attempts:
                self.flush()  # updates kept for a forward pass that may not come would be waited for for ever
            with self._noticing():
                save = self._machinery.saver.wait()
            raise_failure(save)

    @entered
    def load(self, path: "str | os.PathLike") -> dict[str, Any]:
        """Continue from a saved state: weights, moments, step counts. Returns the ``extra`` it was
        saved with.

        Comes before the first step. Tiers, budgets, devices and the number of SSD directories may
        differ. Raises RatelError for a state that is incomplete, damaged or of another model; then
        nothing has changed.
        """
        self._check_usable()
        if self._machinery is not None:
            raise RatelError("the session has begun already", field="load", remedy="Load before prepare() and step()")
        saved = SavedState(Path(path), self._io.directories)
        saved.check_files()
        if self.parts.probed:
            saved.check_model(self.parts.spec)
        if saved.training["seed"] != self.seed:
            raise RatelError(f"the state was made with seed {saved.training['seed']}", field="seed", value=self.seed,
                             remedy=f"Give seed {saved.training['seed']}: dropout depends on it")
        other = saved.other_state()
        if other is not None:
            self.parts.set_other_state(other)
        self._saved, self._moments = saved, None  # the state has moments of its own
        self._attempts, self._updates_made = saved.training["steps"], saved.training["updates"]
        return saved.training["extra"]

    @property
    def reads_a_copy(self) -> bool:
        """The state that was loaded is a copied directory, whose planes are in the SSD files of
        another one: these are read, and left alone."""
        return self._saved is not None and self._saved.is_foreign

    @entered
    def export(self, path: "str | os.PathLike", *, dtype: str = "bf16", optimizer: bool = False,
               beside: Callable[[Path], None] | None = None) -> Path:
        """Write a directory that ``transformers`` loads (a plain module: its state dict), one unit
        in memory at a time, with what lay beside the weights that it began with. ``beside`` writes
        further files into the directory that it is given.

        An older export is replaced only by a complete one that is on disk; what else was in the
        directory stays. A model there that is no export of Ratel is refused. ``optimizer``: with
        the moments, as `ratel.load_adamw_state` reads them; in bf16 the weights beside are rounded.
        """
        if self._machinery is None:
            raise RatelError("there is nothing to export before the first step", field="export")
        from ratel.runtime.states.export import export_model

        def further(directory: Path) -> None:
            if optimizer:
                export_moments(self.plan.spec, self.read_state, self._updates_made, directory)
            if beside is not None:
                beside(directory)

        self.flush()
        target = self._apart(replaceable(Path(path), "export"), "export")
        return export_model(self.parts, self._machinery.transfer.weight_pieces, target, _dtype_of(dtype), further)

    def _apart(self, path: Path, field: str) -> Path:
        """A directory that is replaced may not hold what the session reads or works on."""
        for name, used in (*(("ssd", folder) for folder in self._io.directories), *self._reads):
            if contains(path, Path(used)):
                raise RatelError(f"{name} ({used}) is in it, which the session uses", field=field, value=path,
                                 remedy="Give another directory")
        return path

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Complete pending updates, give a module its trained weights back, release everything.
        Idempotent.

        After an error a module has the weights that it came with. An error that no call has raised
        yet is raised here.
        """
        if self._entrance.is_foreign:
            self._closed = True
        elif not self._closed or self._machinery is not None:  # or an earlier call was ended in the middle
            self._close()

    @entered
    def _close(self) -> None:
        try:
            if self._machinery is not None and self._broken is None and not self._closed:
                self.flush()
                self.wait_saved()
                if self._gives_back:
                    self._give_back()
        finally:
            self._closed = True
            if self._machinery is not None:
                self._machinery.close()
                self._machinery.pool.close()
                self._machinery = self._training = self._meter = None  # the planes go now, not at the next collection
            self.parts.close()
            if self.device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)  # the budget was this session's

    def _give_back(self) -> None:
        try:
            self.parts.restore(self.read_master)
        except (OSError, DamagedError) as error:
            raise WorkerError(f"the model has only a part of its trained weights, the rest as they were: {error}") from error

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._broken = self._broken or error
        self.close()

    # --- checks -------------------------------------------------------------------------------------------------

    def _ready(self, batch: Any) -> Any:
        """The batch, checked; the session prepared for it."""
        batch = self._prepared(batch)
        self._shape.check(batch)
        return batch

    def _rows_of(self, batch: Any) -> Iterator[Any]:
        """The batch, checked, in pieces that the session has room for."""
        batch = self._prepared(batch)
        for part in cut(batch, self._shape.rows):
            self._shape.check(part)
            yield part

    def _split(self, batch: Any, targets: int) -> list[Micro]:
        # A task's loss is a sum over targets, a user's a mean over rows.
        return split(batch, self.plan.work.micro_rows, self.device, 1 / targets if self.parts.task else None)

    def _prepared(self, batch: Any) -> Any:
        self._check_usable()
        if self.parts.is_causal_lm:
            batch = with_labels(causal_batch(batch, self.parts.spec, keeps_mask=self.parts.routing is not None))
            if not self.parts.isolates_documents:
                refuse_documents(batch)
        elif self.parts.task:
            batch = self.parts.task_runner.checked(batch, self.parts.spec.vocab_size)
        if self._machinery is None:
            self._prepare(batch)
        if self.parts.is_causal_lm:
            self.parts.begin(batch)
        return batch

    def _check_length(self, positions: int) -> None:
        limit = self.parts.spec.max_seq_len
        if (self.parts.is_causal_lm or self.parts.task) and limit is not None and positions > limit:
            raise RatelError(f"the model handles sequences of at most {limit} tokens", field="seq_len", value=positions,
                             remedy=f"Use --seq-len {limit} or less")

    def _check_usable(self) -> None:
        if self._closed:
            raise RatelError("the session is closed", field="session", remedy="Make a new one")
        if self._broken is not None:
            raise RatelError(f"the session ended with an earlier error ({type(self._broken).__name__}: {self._broken})",
                             field="session", remedy="Make a new one") from self._broken
        if self._machinery is not None:
            with self._noticing():
                self._exchange.check()
            raise_failure(self._machinery.saver.ended())

    @property
    def _exchange(self) -> Exchange:
        return self._machinery.exchange

    def _protected(self) -> "_Protected":
        return _Protected(self, BaseException)

    def _noticing(self) -> "_Protected":
        """Unlike a step, waiting for updates can be interrupted and done again."""
        return _Protected(self, Exception)


class _Protected:
    """What does not come to its end because of an error leaves the session unusable, but
    closable."""

    def __init__(self, session: Session, kind: type[BaseException]) -> None:
        self._session, self._kind = session, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self._kind):
            self._session._broken = error
            self._session._machinery.exchange.close()


def _check_gradients_can_be() -> None:
    """`torch.no_grad` a session overrides; this it cannot."""
    if torch.is_inference_mode_enabled():
        raise RatelError("is on, and what is made in it has no gradients", field="torch.inference_mode",
                         remedy="Leave it before you train")


def _task_of(task: "str | Task", loss_fn: Any) -> Task | None:
    found = Task.of(task)
    if found is not None and loss_fn is not None:
        raise RatelError("has a loss of its own, which contradicts loss_fn", field="task", value=found.name,
                         remedy="Give one of them")
    return found


def _dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise RatelError("not a type of computation", field="dtype", value=name, remedy="Use bf16 or fp32")
    return DTYPES[name]


def _as_of_now(extra: dict[str, Any] | None) -> dict[str, Any]:
    """A copy, as JSON has it: it is written in the background, while the caller may go on with the
    original."""
    try:
        return json.loads(json.dumps(extra or {}))
    except (TypeError, ValueError) as error:
        raise RatelError(f"cannot be written as JSON: {error}", field="extra",
                         remedy="Give numbers, strings, lists and dictionaries of them") from error


def _count_tokens(batch: Any) -> int:
    """Positions of a language batch without its padding; rows of any other."""
    if isinstance(batch, dict) and isinstance(batch.get("attention_mask"), torch.Tensor):
        return int((batch["attention_mask"] != 0).sum())
    return batch["input_ids"].numel() if isinstance(batch, dict) and "input_ids" in batch else count_rows(batch)


