"""The session: a model under a plan, one step at a time.

Its five concerns are modules of functions over its `Core`: opening, preparing, stepping, keeping
(saves, commits, exports), ending.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch

from ratel.errors import RatelError
from ratel.lora.request import described
from ratel.models import Parts
from ratel.planner.forecast.cost import Prediction
from ratel.planner.machine.hardware import Hardware
from ratel.planner.plan import Plan
from ratel.planner.search.micro_batches import Planned
from ratel.planner.search.options import SessionOptions, learning_rate
from ratel.planner.shape import UnitSpec
from ratel.runtime.blocks.batch import Batch
from ratel.runtime.session import ending, keeping, preparing, stepping
from ratel.runtime.session.entrance import Entrance, entered
from ratel.runtime.session.machinery import Machinery
from ratel.runtime.session.opening import open_core
from ratel.runtime.session.result import StepResult


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

    def __init__(self, model: Any, *, loss_fn: Callable[[Any, Any], Any] | None = None, **options: Any) -> None:
        self._entrance = Entrance()
        self._core = open_core(model, SessionOptions(**{**options, "lora": described(options.get("lora"))}), loss_fn)

    # --- what it is ---------------------------------------------------------------------------------------------

    @property
    def options(self) -> SessionOptions:
        """The keyword arguments, read."""
        return self._core.options

    @property
    def parts(self) -> Parts:
        return self._core.parts

    @property
    def device(self) -> torch.device:
        return self._core.device

    @property
    def lr(self) -> float:
        return self.options.lr

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def dtype(self) -> str:
        return self.options.dtype

    @property
    def plan(self) -> Plan:
        return self._core.plan

    @property
    def prediction(self) -> Prediction | None:
        """What a step was predicted to take, where the plan was made with a machine's rates."""
        return self._core.planned and self._core.planned.prediction

    @property
    def machine(self) -> Hardware | None:
        """Whose rates the plan was made with."""
        return self._core.machine

    @property
    def accuracy(self) -> float | None:
        """The share of targets of the last evaluation whose most likely label is right, for tasks
        that choose a label."""
        return self._core.accuracy

    @property
    def reads_a_copy(self) -> bool:
        """The state that was loaded is a copied directory, whose planes are in the SSD files of
        another one: these are read, and left alone."""
        return self._core.saved is not None and self._core.saved.is_foreign

    @property
    def hardware(self) -> dict[str, Any]:
        """What was chosen on this machine."""
        core = self._core
        facts = {"device": str(core.device), "optimizer_threads": core.threads}
        if core.machinery is not None:
            facts["isa"] = core.machinery.pool.isa
            facts["io_backend"] = core.machinery.engine.backend if core.machinery.engine else None
            facts["ssd_stripes"] = dict(zip(core.io.directories, core.io.stripes))
        return facts

    @property
    def _machinery(self) -> Machinery | None:
        return self._core.machinery

    # --- preparing ----------------------------------------------------------------------------------------------

    @entered
    def prepare(self, rows: int, seq_len: int) -> Plan:
        """Plan for batches of this shape, reserve everything, import the weights. The first step
        does it otherwise."""
        if not self.parts.probed:
            raise RatelError("a model with its own loss is prepared by its first batch", field="prepare",
                             remedy="Call step(batch)")
        self._core.check_usable()
        if self._core.machinery is not None:
            raise RatelError("the session is prepared already", field="prepare", value=self._core.capacity,
                             remedy="Make a new session")
        preparing.prepare(self._core, Batch.sample(self.parts, rows, seq_len))
        return self.plan

    @entered
    def plan_for(self, rows: int, seq_len: int) -> Planned:
        """What `prepare` would decide. Blocks are tried out, nothing is reserved. Raises RatelError
        for what does not fit."""
        return preparing.plan_for(self._core, rows, seq_len)

    # --- training -----------------------------------------------------------------------------------------------

    @entered
    def step(self, batch: Any, *, lr: float | None = None, trace: bool = False) -> StepResult:
        """Forward, backward and update on one batch; see docs/architecture.md for what happens
        when.

        ``trace`` records what every resource and thread did (``timeline``, which `Timeline.write`
        draws), and waits for the device at the end; it changes no result.
        """
        return stepping.step(self._core, batch, self.lr if lr is None else learning_rate(lr), trace=trace)

    @entered
    def evaluate(self, batches: Iterable[Any]) -> float:
        """Mean loss per target token (per row for a model with its own loss), without dropout.
        Batches of more rows than a step's are taken in pieces."""
        return stepping.evaluate(self._core, batches)

    # --- states -------------------------------------------------------------------------------------------------

    @entered
    def flush(self) -> None:
        """Complete pending updates: afterwards every plane on its tier is that of the last step."""
        self._core.flush()

    @entered
    def read_master(self, unit: UnitSpec) -> torch.Tensor:
        """The unit's fp32 master weights, 1-D in its layout, on the CPU."""
        self.flush()
        return self._core.machinery.transfer.read_weights(unit)

    @entered
    def read_state(self, unit: UnitSpec, plane: str) -> torch.Tensor:
        """A copy of one plane (``hi``, ``lo``, ``m``, ``v``) on the CPU, as it is stored
        (docs/state_format.md)."""
        self.flush()
        return self._core.machinery.transfer.read(unit, plane)

    @entered
    def state_dict(self) -> dict[str, Any]:
        """All master weights by parameter name, fp32 on the CPU, and what else the model's state
        dict has. Whole in memory: for models that fit there."""
        result: dict[str, Any] = self.parts.stored.other_state()
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
        return keeping.save(self._core, Path(path), extra, wait)

    @entered
    def commit(self, *, extra: dict[str, Any] | None = None, wait: bool = False) -> None:
        """Make the last step last (``durable="step"``): after a crash at any time, `load` of
        ``commits`` continues from the newest commit that was complete. Training goes on meanwhile,
        unless ``wait``.
        """
        keeping.commit(self._core, extra, wait)

    @entered
    def wait_saved(self) -> None:
        """Block until a save or commit under way, if any, is complete."""
        keeping.wait_saved(self._core)

    @entered
    def load(self, path: "str | os.PathLike") -> dict[str, Any]:
        """Continue from a saved state: weights, moments, step counts. Returns the ``extra`` it was
        saved with.

        Comes before the first step. Tiers, budgets, devices and the number of SSD directories may
        differ. Raises RatelError for a state that is incomplete, damaged or of another model; then
        nothing has changed.
        """
        return keeping.load(self._core, Path(path))

    @entered
    def export(self, path: "str | os.PathLike", *, dtype: str | None = None, optimizer: bool = False,
               beside: Callable[[Path], None] | None = None) -> Path:
        """Write a directory that ``transformers`` loads (a plain module: its state dict), one unit
        in memory at a time, with what lay beside the weights that it began with. ``beside`` writes
        further files into the directory that it is given. ``dtype``: of the weights, bf16 if not
        given.

        Of a session that trains an adapter it is the adapter, as peft loads it, in fp32 if not
        said otherwise. An older export is replaced only by a complete one that is on disk; what else was in the
        directory stays. A model there that is no export of Ratel is refused. ``optimizer``: with
        the moments, as `ratel.load_adamw_state` reads them; in bf16 the weights beside are rounded.
        """
        return keeping.export(self._core, Path(path), dtype, optimizer, beside)

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Complete pending updates, give a module its trained weights back, release everything.
        Idempotent.

        After an error a module has the weights that it came with. An error that no call has raised
        yet is raised here.
        """
        if self._entrance.is_foreign:
            self._core.closed = True
        elif not self._core.closed or self._core.machinery is not None:  # or an earlier call was ended in the middle
            self._close()

    @entered
    def _close(self) -> None:
        ending.close(self._core)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._core.broken = self._core.broken or error
        self.close()


def _signature() -> Signature:
    """What help and editors show: the options by name, as `SessionOptions` has them."""
    given = [Parameter("model", Parameter.POSITIONAL_OR_KEYWORD), Parameter("loss_fn", Parameter.KEYWORD_ONLY, default=None)]
    return Signature([*given, *(Parameter(spec.name, Parameter.KEYWORD_ONLY, default=spec.default, annotation=spec.type)
                                for spec in fields(SessionOptions))])


Session.__signature__ = _signature()
