"""A model in parts: units of parameters to be gathered, and stages to be run one at a time."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models.calls.caches import Caches
from ratel.models.calls.router import Routing, find_router_loss
from ratel.models.calls.running import CausalLMRunner, LossFn, LossRunner
from ratel.models.calls.tasks import Task, TaskRunner
from ratel.models.checkpoints.beside import Origin
from ratel.models.checkpoints.weights import WeightSource
from ratel.models.checks.family import documents_of
from ratel.models.stored import Stored
from ratel.models.structure import blocks as finder
from ratel.models.structure.additions import Additions
from ratel.models.structure.gates import Gates, Head, RngState, StopForward, Tail
from ratel.models.structure.given import outline_of, refuse_changing, state_of
from ratel.models.structure.guard import Guard
from ratel.models.structure.inputs import BlockCall, BlockInputs
from ratel.models.structure.longrope import LongRope
from ratel.models.structure.parameters import UnitParameters, storage_of
from ratel.models.structure.shadow import Shadow, assignments_undone
from ratel.models.structure.skeleton import Originals
from ratel.models.structure.trace import Trace, trace
from ratel.models.structure.unit_layout import Layout, make_layout
from ratel.planner.shape import ModelSpec, StageSpec, UnitSpec

TRIAL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
"""What a model's own code raises when it meets something it did not expect."""


class Parts:
    """The parts of one model. Made by `ratel.models.load`.

    A stage runs when the units it uses (``spec.stages[s].units``) are attached::

        hidden, inputs = parts.head(batch)                     # units of stage pre
        for i in range(parts.num_blocks):
            hidden = parts.block(i, hidden, inputs)            # units of stage 1 + i
        logits = parts.tail_logits(hidden)                     # units of stage post; or tail_loss(hidden, batch)

    Everything runs in the caller's grad mode, on the caller's stream, from one thread. ``spec``
    exists once the model has been traced: at load for a causal language model or one with a task,
    at ``probe(batch)`` for one with a ``loss_fn``.
    """

    def __init__(self, module: nn.Module, *, name: str, dtype: torch.dtype, device: torch.device, source: WeightSource,
                 originals: Originals, loss_fn: LossFn | None, task: Task | None = None, origin: Origin | None = None,
                 additions: Additions | None = None) -> None:
        self.module, self.name, self.dtype, self.device = module, name, dtype, device
        self.is_causal_lm = loss_fn is None and task is None
        self.task = task
        self._additions = additions
        origin = origin if origin is not None else Origin.of_module(module)
        module.train()
        self._gates = Gates(finder.find_blocks(module))
        self._guard = Guard(module)
        self._longrope = LongRope(module)
        self._caches = Caches(module)
        self._runner: CausalLMRunner | LossRunner | TaskRunner = (
            CausalLMRunner(module, device, dtype) if self.is_causal_lm else TaskRunner(module, task, device, dtype)
            if task is not None else LossRunner(module, loss_fn, device, dtype))
        self.stored = Stored(module, name=name, source=source, originals=originals, origin=origin, additions=additions,
                             guard=self._guard, caches=self._caches, task_runner=self.task_runner)
        self.isolates_documents = False
        """Whether tokens of a causal language model see only their own document when
        ``position_ids`` restart."""
        self.routing: Routing | None = None
        """Where the loss of routers is added."""
        self._trace: Trace | None = None
        self._layout: Layout | None = None
        self._parameters: UnitParameters | None = None
        if self.is_causal_lm or task is not None:
            try:
                self._judge_family()
                self.probe(self._runner.probe_batch() if task is None else self._runner.sample(1, 4))
            except BaseException:
                self.close()
                raise

    # -- shape ---------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        assert self._layout is not None, "probe(batch) comes before spec"
        return self._layout.spec

    @property
    def task_runner(self) -> TaskRunner | None:
        """What knows batches and targets of a task; None for the next token or a ``loss_fn``."""
        return self._runner if self.task is not None else None

    def sample(self, rows: int, seq_len: int) -> dict[str, Tensor]:
        """A batch of that shape that nothing is learned from. However many rows are asked for, it
        is one in memory."""
        if self.task is not None:
            return self._runner.sample(rows, seq_len)
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long).expand(rows, seq_len)}

    @property
    def parameters(self) -> UnitParameters:
        """What the units' weights are attached to."""
        assert self._parameters is not None, "probe(batch) comes before parameters"
        return self._parameters

    @property
    def unused(self) -> UnitSpec | None:
        """Parameters that no stage uses, in a layout of their own. `Stored.read_unit` accepts it."""
        assert self._layout is not None, "probe(batch) comes before unused"
        return self._layout.unused

    @property
    def num_params(self) -> int:
        """Parameters of the model; those that no stage uses are exported, too."""
        return self.spec.num_params + (self.unused.num_params if self.unused else 0)

    @property
    def num_blocks(self) -> int:
        return len(self._traced.stages)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The module that runs each block."""
        return self._traced.stages

    def differentiable_arguments(self, block: int) -> tuple[int, ...]:
        """Which leaves of the block's other arguments need a gradient of their own."""
        return tuple(leaf for index, leaf in self._traced.differentiable if index == block)

    @property
    def probed(self) -> bool:
        return self._layout is not None

    @property
    def _traced(self) -> Trace:
        assert self._trace is not None, "probe(batch) comes first"
        return self._trace

    def probe(self, batch: Any) -> ModelSpec:
        """Trace one forward in outline and lay the parameters out. Idempotent; raises RatelError.

        ``batch`` is what `loss_fn` takes; only shapes matter and nothing large is computed.
        """
        if self._layout is None:
            rng = RngState(self.device)
            try:
                with self._guard.lifted(), assignments_undone(self.module):
                    found = trace(self.module, self._gates, lambda: self._runner.run(batch))
                layout = make_layout(self.module, found, self.name, self._additions.names if self._additions is not None else ())
                if not layout.spec.num_trainable_params:
                    raise RatelError("there is nothing to train: no parameter that the loss depends on requires grad",
                                     field="model", value=self.name, remedy="Set requires_grad on some of them")
                if self._additions is not None:
                    names = [name for name, _ in self.module.named_parameters()]
                    units = [*layout.spec.units, *([layout.unused] if layout.unused is not None else [])]
                    self._additions.laid_out(units, {names[index] for used in found.used for index in used})
                self._layout = layout
                self.stored.laid_out(layout)
                self._trace = found
                with torch.no_grad(), assignments_undone(self.module), Shadow([]):
                    if self.is_causal_lm:
                        self._choose_masks()
                    self._rehearse(batch)
            finally:
                rng.restore()
            self._parameters = UnitParameters(self.module, self._layout.spec.units, self.dtype)
        return self._layout.spec

    def add_router_loss(self, choice: float | str) -> None:
        """Have blocks say what their routers do, if the model has a loss for it; see
        `find_router_loss`."""
        if not self.is_causal_lm:
            if not isinstance(choice, str):
                raise RatelError("is a part of the loss of causal language models only", field="router_aux_loss", value=choice,
                                 remedy="Use auto or off")
            return
        rng = RngState(self.device)
        try:
            with self._guard.lifted(), assignments_undone(self.module), Shadow([]):
                found = find_router_loss(self.module, self._runner.plain_batch(), choice)
        finally:
            rng.restore()
        if found is not None:
            inside = {id(module) for block in self.blocks for module in block.modules()}
            if any(id(module) not in inside for module, _ in found.places):
                raise RatelError("has routers outside its blocks, so their loss cannot be computed one block at a time",
                                 field="router_aux_loss", value=self.name, remedy="Use --router-aux-loss off")
            self.routing = Routing(found)

    def _rehearse(self, batch: Any) -> None:
        """Run head and tail in outline: a model that looks at more of a block's output fails here,
        not later. Twice, as a step does: they must leave nothing behind that changes every time."""
        states = []
        try:
            for _ in range(2):
                hidden = self._run_head(batch, self.num_blocks - 1).hidden
                self.tail_logits(hidden) if self.is_causal_lm else self.tail_loss(hidden, batch)
                states.append(state_of(self.module, outline_of, without=self.blocks))
            refuse_changing(*states, self.module, "its forward changes it every time")
        except RatelError:
            raise
        except TRIAL_ERRORS as error:
            raise RatelError(f"cannot be run one block at a time: with its blocks replaced, its forward fails "
                             f"({type(error).__name__}: {error})", field="model", value=self.name) from error

    def _judge_family(self) -> None:
        """Whether the next token can be learned, and how documents in one row are kept apart."""
        if not self.is_causal_lm:
            return
        self._runner.documents = documents_of(self.module, self.name)
        self.isolates_documents = self._runner.documents is not None

    def _choose_masks(self) -> None:
        """Find out whether the tail can do without masks."""
        runner = self._runner
        runner.skips_mask = True
        try:
            self.tail_logits(self._run_head(runner.probe_batch(), 0).hidden)
        except TRIAL_ERRORS:
            runner.skips_mask = False

    # -- stages --------------------------------------------------------------------------------------------------

    def begin(self, batch: Any) -> None:
        """Before the rows of a batch of a causal language model, in however many pieces: what
        depends on all of them."""
        self._longrope.begin(batch)

    def begin_run(self, stage: StageSpec, step: int, first_row: int) -> None:
        """Before a micro-batch runs through a stage, in whichever direction: what depends on where
        in a run that is. ``first_row``: see `Additions.begin`."""
        if self._additions is not None:
            self._additions.begin(self.blocks[stage.index - 1] if stage.kind == "block" else None, step, first_row)

    def head(self, batch: Any) -> tuple[Tensor, BlockInputs]:
        """Run up to the blocks: what the first takes as hidden states, and every block's other
        arguments.

        None of them is memory of the stage's weights, which others have as soon as the stage is
        over.
        """
        gate = self._run_head(batch, self.num_blocks - 1)
        weights = self.parameters.storages(self.spec.stages[0].units)
        inputs = BlockInputs(gate.calls, self._traced.differentiable)
        # The trace cannot tell: `contiguous` copies there and not here, dropout returns what it is
        # given in evaluation.
        copies = {id(t): t.clone() for t in [gate.hidden, *inputs.tensors] if storage_of(t) in weights}
        return copies.get(id(gate.hidden), gate.hidden), inputs.with_others(copies)

    def pre(self, batch: Any) -> list[Tensor]:
        """The stage before the blocks for its backward: hidden states, then
        ``inputs.differentiable`` in its order."""
        last = max((block for block, _ in self._traced.differentiable), default=0)
        gate = self._run_head(batch, last)
        return [gate.hidden, *BlockInputs(gate.calls, self._traced.differentiable).differentiable]

    def _run_head(self, batch: Any, stop_at: int, **more: Any) -> Head:
        gate = Head(self._traced.stages, self._traced.slots, self._traced.forms, stop_at=stop_at)
        with self._guard.lifted(), self._gates.handled_by(gate):
            try:
                self._runner.run(batch, **more)
            except StopForward:
                return gate
        raise RatelError("the model did not call all of its blocks", field="model", value=self.name,
                         remedy="Turn layer dropping off")

    def block(self, index: int, hidden: Tensor, inputs: BlockInputs, forward: Callable[..., Any] | None = None) -> Tensor:
        """Run one block, by ``forward`` instead of its own."""
        call = self.call_of(index, hidden, inputs)
        with self.routing.watching() if self.routing is not None else nullcontext():
            return self._traced.forms[index].take((forward or self._traced.stages[index])(*call.args, **call.kwargs))

    def call_of(self, index: int, hidden: Tensor, inputs: BlockInputs) -> BlockCall:
        """All arguments of the block."""
        return self._traced.slots[index].put(inputs.calls[index], hidden)

    def own_forward(self, index: int) -> Callable[..., Any]:
        """The ``forward`` of the block's class, without a gate before it."""
        return self._traced.stages[index].forward.__wrapped__

    def has_hooks(self, index: int) -> bool:
        """Whether calling the block does more than its ``forward``."""
        block = self._traced.stages[index]
        return any(getattr(block, name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                                                     "_backward_pre_hooks"))

    def tail_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocab]`` of the last block's output ``[..., hidden_size]``, any number of
        tokens; or of ``[rows, tokens, streams, hidden_size]``, where blocks hand on several streams
        of each token."""
        assert self.is_causal_lm
        # One token per row: whatever the model prepares for attention (masks) is then of one
        # element.
        tokens = hidden.shape[: min(hidden.ndim - 1, 2)]
        rows = hidden.reshape(-1, 1, *hidden.shape[len(tokens) :])
        logits = self._run_tail(rows, lambda: self._runner.run_on_nothing(rows.shape[0]))
        return logits.reshape(*tokens, logits.shape[-1])

    def tail_loss(self, hidden: Tensor, batch: Any) -> Tensor:
        """What ``loss_fn`` or the task makes of the last block's output."""
        assert not self.is_causal_lm
        return self._run_tail(hidden, lambda: self._runner.run(batch))

    def _run_tail(self, hidden: Tensor, run: Callable[[], Tensor]) -> Tensor:
        rng = RngState(self.device) if self.module.training else None
        gate = Tail(self._traced.stages, self._traced.slots, self._traced.forms, hidden=hidden, rng=rng)
        grad_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(grad_enabled and self._traced.begins_early)
        try:
            with self._guard.lifted(), self._gates.handled_by(gate):
                result = run()
        finally:
            torch.set_grad_enabled(grad_enabled)
        if not gate.complete:
            raise RatelError("the model did not call all of its blocks", field="model", value=self.name,
                             remedy="Turn layer dropping off")
        return result

    def set_training(self, training: bool) -> None:
        """Switch dropout and the like on or off."""
        self.module.train(training)

    def close(self) -> None:
        """Take the gates off the blocks and give a module the user gave its parameters, buffers and
        flags back: the trained ones after `Stored.restore`, else those it came with."""
        if self.routing is not None:
            self.routing.remove()
        self._gates.remove()
        self._guard.remove()
        self._longrope.close()
        self._runner.close()
        self._caches.put_back()
        if self._additions is not None:
            self._additions.take_off()
        self.stored.originals.put_back()
