"""Training and evaluating under a plan: the vertical step, and what becomes of its gradients."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ratel import native
from ratel.errors import NonFiniteError
from ratel.planner.placement import closed_first
from ratel.planner.plan import Plan
from ratel.planner.shape import UnitSpec, forward_order
from ratel.runtime.blocks.batch import MicroBatch
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.session.machinery import Machinery
from ratel.runtime.streams.step import VerticalStep
from ratel.runtime.updates.arithmetic import UPDATES
from ratel.runtime.updates.jobs import GradientInFlight, Hyper


REMEMBERED_STEPS = 8
"""The next step makes early updates if they would have been right in most of so many steps before
it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one step. ``grad_norm`` is taken before clipping; ``applied``: the update is
    made, now or in the background.

    ``early_units``: updated before the norm was known; ``redone_units``: of these, in vain.
    """

    loss: float
    grad_norm: float
    applied: bool
    early_units: int
    redone_units: int


class Training:
    """Decides about updates: when they are asked for, with which scale, or that a step is left
    out."""

    def __init__(self, blocks: BlockRuns, plan: Plan, machinery: Machinery, *, seed: int, clip: float) -> None:
        self._plan, self._m, self._clip = plan, machinery, clip
        self._guesses: deque[bool] = deque(maxlen=REMEMBERED_STEPS)
        """Whether, in each of the last steps, all gradients were finite and none was scaled."""
        m = machinery
        blocks.spill_to(m.spiller)
        self._vertical = VerticalStep(blocks, plan, m.streamer, m.weights, m.activations, m.gradients, m.lanes, seed=seed,
                                      on_gradient=partial(hand_over, plan, m))

    def step(self, micro_batches: list[MicroBatch], *, targets: int, attempt: int, hyper: Hyper) -> Outcome:
        """``attempt`` numbers the step for the random generators. Updates may go on in the
        background afterwards.
        """
        with self._m.lanes.computing():
            return self._step(micro_batches, targets, attempt, hyper)

    def evaluate(self, micro_batches: list[MicroBatch], *, targets: int) -> float:
        with self._m.lanes.computing():
            return float(self._vertical.evaluate(micro_batches, targets=targets))

    def _step(self, micro_batches: list[MicroBatch], targets: int, attempt: int, hyper: Hyper) -> Outcome:
        self._m.updates.ledger.begin_step()
        begun = self._begin_updates(hyper)
        loss = self._vertical.train(micro_batches, targets=targets, step=attempt, updates_follow=bool(begun))
        with self._m.exchange.tracing.waiting("norm"):
            norm = self._m.gradients.total_norm().cpu()  # waits for the whole backward pass
        loss_value, finite = float(loss), bool(torch.isfinite(norm))
        if finite:
            hyper = replace(hyper, grad_scale=clip_scale(norm, self._clip))
        self._guesses.append(finite and hyper.grad_scale == 1.0)
        again = self._decide(hyper, finite, begun) if self._plan.deferred else []
        applied = finite if self._plan.deferred else self._conclude_eager(finite)
        if applied:
            self._update_on_gpu(hyper)
        return Outcome(loss=loss_value, grad_norm=float(norm), applied=applied, early_units=len(begun),
                       redone_units=len(again))

    def _begin_updates(self, hyper: Hyper) -> list[UnitSpec]:
        """Ask for the updates that start when their gradients arrive; returns their units."""
        begun = [u for u in closed_first(self._plan.spec, self._plan.placements) if self._plan.updates_in_backward(u)]
        if not self._plan.deferred:
            self._submit(hyper, begun)
        elif begun and expects_no_scaling(self._guesses):
            self._m.updates.submit_early(begun, hyper)
        else:
            return []
        return begun

    def _decide(self, hyper: Hyper, finite: bool, begun: list[UnitSpec]) -> list[UnitSpec]:
        """Deferred mode: start all updates in forward order but those made early, or drop all
        gradients. Returns units that have to be updated again."""
        again = self._m.updates.decide(hyper if finite else None)
        done = {unit.index for unit in begun}
        late = again + [u for u in self._plan.spec.units if u.num_trainable and u.index not in done]
        if finite:
            self._submit(hyper, forward_order(late))
        else:
            for unit in late:
                if not self._plan.placement(unit).on_gpu:
                    self._m.updates.ledger.discard(unit.index)
        return again

    def _conclude_eager(self, finite: bool) -> bool:
        """The pipeline has left out the whole step, or made all of it; anything between is an
        error."""
        bad = [] if finite else self._m.gradients.not_finite()
        if not bad:
            return True
        if self._m.updates.finish_step():
            raise NonFiniteError(f"the gradient of {bad[0].name} (on the GPU) is not finite, but other units are updated "
                                 "already; the deferred optimizer skips such a step")
        return False

    def _submit(self, hyper: Hyper, units: Iterable[UnitSpec]) -> None:
        for unit in units:
            if not self._plan.placement(unit).on_gpu:
                self._m.updates.submit(unit, hyper)

    def _update_on_gpu(self, hyper: Hyper) -> None:
        """Units whose planes are on the device; CUDA runs a kernel, a CPU device the CPU
        optimizer."""
        for unit in self._plan.spec.units:
            if unit.num_trainable and self._plan.placement(unit).on_gpu:
                self._m.saver.wait_copied(unit.index, 1)
                with self._m.lanes.work("compute", f"update {unit.name}"):
                    self._update_unit_on_gpu(unit, hyper)
                self._m.store.versions.advance(unit.index)

    def _update_unit_on_gpu(self, unit: UnitSpec, hyper: Hyper) -> None:
        count = unit.num_trainable
        formats = self._plan.formats.of(unit)
        planes = {p: self._m.store.plane(unit.index, p).part(0, count) for p in (*formats.planes, "g")}
        scalars = hyper.of_elements(unit, 0, count)
        if self._m.lanes.device.type == "cuda":
            UPDATES[formats.update].on_gpu(planes, **scalars)
        else:
            UPDATES[formats.update].in_memory(self._m.pool, planes, planes, **scalars)


def hand_over(plan: Plan, machinery: Machinery, unit: UnitSpec, grad: torch.Tensor) -> None:
    """A complete gradient goes to where its update takes it from."""
    gradients = machinery.gradients
    gradients.close(unit, grad)
    gradient = gradients.move(unit, grad, gradients.measure(unit, grad))
    if gradient is None:
        return
    if plan.deferred and plan.grads_pass_through(unit):
        _to_ssd(machinery, unit, gradient)
    else:
        machinery.updates.arrived(unit, gradient)


def _to_ssd(machinery: Machinery, unit: UnitSpec, gradient: GradientInFlight) -> None:
    """The gradient waits on SSD: write it once it is in DRAM, and announce it once it is
    written."""
    # Not the machinery: whoever drops that would wait for the thread that has this.
    io, engine, writes, updates = machinery.io, machinery.engine, machinery.writes, machinery.updates

    def write() -> None:
        ticket = io.write(unit.index, "g", 0, gradient.host, native.nvme_ds.WRITEBACK)
        writes.when(lambda: engine.wait(ticket), announce)

    def announce() -> None:
        gradient.release()
        updates.arrived(unit, gradient.on_ssd())

    machinery.copies.when_event(gradient.arrived, write)


def expects_no_scaling(guesses: Iterable[bool]) -> bool:
    """Whether an early update is likely to be right. A wrong one costs bandwidth, and time only
    where that is short; so it is made when it would have been right more often than not. Not in the
    first step, whose norm is the least certain.
    """
    right = list(guesses)
    return 2 * sum(right) > len(right)


def clip_scale(norm: torch.Tensor, max_norm: float) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies gradients by: ``min(1, max_norm / (norm +
    1e-6))`` in fp32."""
    if not max_norm:
        return 1.0
    return float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
