"""One step of the vertical schedule: every micro-batch passes a stage before the next stage starts.

Forward over the stages, loss and its gradient at the turn, backward with recomputation. Weights are
attached to the module only while their stage runs; each unit's gradient leaves when its last stage
(in backward order) is done.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count

import torch
from torch import Tensor

from ratel.memory.lanes import Lanes
from ratel.models.calls.router import Balance
from ratel.models.checks.second_run import FirstStep
from ratel.planner.checkpoints import INPUT
from ratel.planner.placement import GPU
from ratel.planner.plan import Plan
from ratel.planner.schedule import Gather, gathers
from ratel.planner.shape import StageSpec, UnitSpec, closing_stages
from ratel.runtime.blocks.batch import MicroBatch
from ratel.runtime.blocks.loss import chunked_loss, positions_per_chunk, shifted_targets
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.streams.activations import Activations
from ratel.runtime.streams.gradients import Gradients
from ratel.runtime.streams.streamer import Streamer, key_of
from ratel.runtime.streams.weights import WeightSource


class VerticalStep:
    def __init__(self, blocks: BlockRuns, plan: Plan, streamer: Streamer, weights: WeightSource,
                 activations: Activations, gradients: Gradients, lanes: Lanes, *, seed: int,
                 on_gradient: Callable[[UnitSpec, Tensor], None]) -> None:
        self._blocks, self._parts = blocks, blocks.parts
        self._plan, self._streamer, self._weights = plan, streamer, weights
        self._activations, self._gradients, self._lanes = activations, gradients, lanes
        self._seed, self._on_gradient = seed, on_gradient
        self._stages = plan.spec.stages
        self._closing = closing_stages(plan.spec)
        num_blocks = sum(stage.kind == "block" for stage in self._stages)
        blocks.keep([{s.name: s.num_bytes for s in plan.saved_of(block) if s.is_inner} for block in range(num_blocks)])
        self._open: dict[int, Tensor] = {}
        self._first: FirstStep | None = FirstStep()
        """What second runs are compared with, until the first step is over."""
        self._balance: Balance | None = None
        """What this step adds to the loss so that routers use all experts."""

    def train(self, micro_batches: list[MicroBatch], *, targets: int, step: int, updates_follow: bool = True) -> Tensor:
        """Forward, loss, backward; gradients are handed over as they become complete. Returns the
        loss (device). ``updates_follow``: updates follow at once, those that the plan has so."""
        self._streamer.start(gathers(self._plan, training=True, num_micro=len(micro_batches), updates_follow=updates_follow))
        routing = self._parts.routing
        self._balance = None if routing is None else Balance(routing.loss, self._lanes.device)
        with self._own_random_numbers():
            self._forward(micro_batches, step, save=True)
            loss = self._turn(micro_batches, targets, step)
            if self._balance is not None:
                loss += self._balance.value()
            for stage in self._plan.spec.backward_stages[1:]:
                backward = self._backward_block if stage.kind == "block" else self._backward_pre
                backward(stage, micro_batches, step)
        for micro_batch in micro_batches:
            micro_batch.grad = micro_batch.inputs = None
        self._first = None
        return loss

    def evaluate(self, micro_batches: list[MicroBatch], *, targets: int) -> Tensor:
        """The loss without gradients; dropout must be off."""
        self._streamer.start(gathers(self._plan, training=False, num_micro=len(micro_batches)))
        stage = self._stages[-1]
        with self._own_random_numbers(), torch.no_grad():
            self._forward(micro_batches, 0, save=False)
            with self._using(stage):
                return sum(self._loss(stage, micro_batch, targets, 0, backward=False) for micro_batch in micro_batches)

    # --- forward ------------------------------------------------------------------------------------------------

    def _forward(self, micro_batches: list[MicroBatch], step: int, *, save: bool) -> None:
        with torch.no_grad():
            with self._using(self._stages[0]):
                for micro_batch in micro_batches:
                    with self._computing(self._stages[0], micro_batch, step, "forward"):
                        micro_batch.hidden, micro_batch.inputs = self._parts.head(micro_batch.batch)
                    if save and self._first is not None:
                        self._first.note_head(self._parts.blocks)
            for stage in self._stages[1:-1]:
                with self._using(stage):
                    for micro_batch in micro_batches:
                        self._forward_block(stage, micro_batch, step, save)

    def _forward_block(self, stage: StageSpec, micro_batch: MicroBatch, step: int, save: bool) -> None:
        block = stage.index - 1
        if save:
            micro_batch.hidden = micro_batch.hidden.contiguous()
            self._activations.save_input(block, micro_batch.index, micro_batch.hidden)
        with self._computing(stage, micro_batch, step, "forward"):
            micro_batch.hidden = self._run_forward(block, micro_batch, save)
            if save and self._balance is not None:
                self._balance.add(self._parts.routing.take(), micro_batch.batch.get("attention_mask"))
        if save and self._first is not None and micro_batch.index == 0:
            self._first.note(block, micro_batch.hidden)

    def _run_forward(self, block: int, micro_batch: MicroBatch, save: bool) -> Tensor:
        if not save:  # what is compiled was tried in training: an evaluation must not end a run with the compiler's errors
            return self._parts.block(block, micro_batch.hidden, micro_batch.inputs)
        if len(self._plan.saved_of(block)) > 1:
            return self._forward_saving(block, micro_batch)
        return self._blocks.plain(block, micro_batch.hidden, micro_batch.inputs)

    def _forward_saving(self, block: int, micro_batch: MicroBatch) -> Tensor:
        self._activations.begin()
        output = self._blocks.first(block, micro_batch.index, micro_batch.hidden, micro_batch.inputs,
                                    partial(self._activations.save, block, micro_batch.index))
        self._activations.end(block, micro_batch.index)
        return output

    # --- the turn -----------------------------------------------------------------------------------------------

    def _turn(self, micro_batches: list[MicroBatch], targets: int, step: int) -> Tensor:
        stage = self._stages[-1]
        loss = torch.zeros((), dtype=torch.float32, device=self._lanes.device)
        with self._using(stage), self._accumulating(stage):
            for micro_batch in micro_batches:
                loss += self._loss(stage, micro_batch, targets, step, backward=True)
        return loss

    def _loss(self, stage: StageSpec, micro_batch: MicroBatch, targets: int, step: int, *, backward: bool) -> Tensor:
        with self._computing(stage, micro_batch, step, "loss"):
            if self._parts.is_causal_lm:
                loss, micro_batch.grad = self._causal_loss(stage, micro_batch, targets, step, backward)
            else:
                loss, micro_batch.grad = self._own_loss(stage, micro_batch, backward)
        micro_batch.hidden = None
        if backward:
            micro_batch.inputs = micro_batch.inputs.with_leaves()
        return loss

    def _causal_loss(self, stage: StageSpec, micro_batch: MicroBatch, targets: int, step: int,
                     backward: bool) -> tuple[Tensor, Tensor | None]:
        chunk = positions_per_chunk(micro_batch.hidden.shape[0], self._plan.spec.vocab_size)
        rows = count(micro_batch.before, micro_batch.hidden.shape[0] * chunk)

        def tail(hidden: Tensor) -> Tensor:
            self._parts.begin_run(stage, step, next(rows))
            return self._parts.tail_logits(hidden)

        return chunked_loss(tail, micro_batch.hidden, shifted_targets(micro_batch.batch["labels"]), normalizer=targets,
                            chunk=chunk, backward=backward, after_chunk=lambda: self._collect(stage))

    def _own_loss(self, stage: StageSpec, micro_batch: MicroBatch, backward: bool) -> tuple[Tensor, Tensor | None]:
        hidden = micro_batch.hidden.detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            loss = self._parts.tail_loss(hidden, micro_batch.batch) * micro_batch.share
        if backward:
            loss.backward()
            self._collect(stage)
        return loss.detach().float(), hidden.grad

    # --- backward -----------------------------------------------------------------------------------------------

    def _backward_block(self, stage: StageSpec, micro_batches: list[MicroBatch], step: int) -> None:
        with self._using(stage), self._accumulating(stage):
            for micro_batch in micro_batches:
                with self._saved(stage.index - 1, micro_batch) as saved:
                    with self._computing(stage, micro_batch, step, "backward"):
                        if self._first is not None and micro_batch.index == 0:
                            self._compare_runs(stage, micro_batch, saved[INPUT][0], step)
                        hidden = saved[INPUT][0].detach().requires_grad_()
                        with torch.enable_grad():
                            output = self._blocks.second(stage.index - 1, micro_batch.index, hidden, micro_batch.inputs, saved,
                                                         lambda: self._seed_for(stage, micro_batch, step))
                        saved.clear()
                        routed, their_grads = self._routed(micro_batch)
                        torch.autograd.backward([output, *routed], [micro_batch.grad, *their_grads])
                        self._blocks.finish()
                        micro_batch.grad = hidden.grad
                        del output, hidden, routed
                        self._collect(stage)

    def _compare_runs(self, stage: StageSpec, micro_batch: MicroBatch, hidden: Tensor, step: int) -> None:
        block, leaf = stage.index - 1, hidden.detach().requires_grad_()
        self._first.compare(block, self._parts.blocks[block], lambda: self._blocks.plain(block, leaf, micro_batch.inputs))
        self._seed_for(stage, micro_batch, step)

    def _routed(self, micro_batch: MicroBatch) -> tuple[list[Tensor], list[Tensor]]:
        """What the routers of the block that ran last gave their experts, with its gradient."""
        if self._balance is None:
            return [], []
        shown = micro_batch.batch.get("attention_mask")
        routed = [each for each in self._parts.routing.take() if each.requires_grad]
        return routed, self._balance.gradients(routed, shown)

    def _backward_pre(self, stage: StageSpec, micro_batches: list[MicroBatch], step: int) -> None:
        with self._using(stage), self._accumulating(stage):
            for micro_batch in micro_batches:
                with self._computing(stage, micro_batch, step, "backward"):
                    self._backward_head(micro_batch)
                    self._collect(stage)

    def _backward_head(self, micro_batch: MicroBatch) -> None:
        with torch.enable_grad():
            outputs = self._parts.pre(micro_batch.batch)
        grads = [micro_batch.grad, *(leaf.grad for leaf in micro_batch.inputs.differentiable)]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and g is not None]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])

    # --- what a stage needs around it ---------------------------------------------------------------------------

    @contextmanager
    def _using(self, stage: StageSpec) -> Iterator[None]:
        """Weights of the stage's units are attached to the module inside."""
        units = [self._plan.spec.units[index] for index in stage.units]
        for unit in units:
            on_gpu = self._plan.placement(unit).on_gpu
            flat = self._weights.resident(unit.index) if on_gpu else self._streamer.get(("unit", unit.index), unit.name)
            self._parts.parameters.attach(unit.index, flat)
        yield
        for unit in units:
            self._parts.parameters.attach(unit.index, None)
            if not self._plan.placement(unit).on_gpu:
                self._streamer.release(("unit", unit.index))

    @contextmanager
    def _accumulating(self, stage: StageSpec) -> Iterator[None]:
        """Gradients of the stage's units accumulate inside; those of which this was the last stage
        leave after."""
        units = [self._plan.spec.units[i] for i in stage.units if self._plan.spec.units[i].num_trainable]
        for unit in units:
            if unit.index not in self._open:
                self._open[unit.index] = self._gradients.begin(unit)
        yield
        for unit in units:
            if self._closing[unit.index] == stage.index:
                self._on_gradient(unit, self._open.pop(unit.index))

    @contextmanager
    def _saved(self, block: int, micro_batch: MicroBatch) -> Iterator[dict[str, list[Tensor]]]:
        """What forward has saved of the block, by name."""
        saved = {place.name: self._activations.kept(block, micro_batch.index, place.name)
                 for place in self._plan.saved_of(block) if place.tier == GPU}
        gathered = [Gather(saved=(block, micro_batch.index, group.what)) for group in self._plan.groups_of(block)]
        for gather in gathered:
            view = self._streamer.get(key_of(gather), f"{block}.{micro_batch.index}")
            saved |= self._activations.returned(gather.saved, view)
        yield saved
        for gather in gathered:
            self._streamer.release(key_of(gather))

    @contextmanager
    def _computing(self, stage: StageSpec, micro_batch: MicroBatch, step: int, what: str) -> Iterator[None]:
        """Random numbers depend on step, stage and micro-batch alone: recomputation draws what
        forward drew."""
        self._seed_for(stage, micro_batch, step)
        with self._lanes.work("compute", f"{stage.name} {what}"):
            yield

    def _seed_for(self, stage: StageSpec, micro_batch: MicroBatch, step: int) -> None:
        seed_generators(self._lanes.device, mix(self._seed, step, stage.index, micro_batch.index))
        self._parts.begin_run(stage, step, micro_batch.before)

    def _own_random_numbers(self) -> AbstractContextManager:
        """The caller's generators are as they were afterwards."""
        cuda = self._lanes.device.type == "cuda"
        return torch.random.fork_rng(devices=[self._lanes.device] if cuda else [])

    def _collect(self, stage: StageSpec) -> None:
        for index in stage.units:
            if index in self._open:
                grads = self._parts.parameters.take_grads(index)
                self._gradients.collect(self._plan.spec.units[index], self._open[index], grads)


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers (the finalizer of splitmix64, applied after each)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def seed_generators(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
