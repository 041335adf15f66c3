"""Seconds of GPU work of every stage, for a plan on a machine: measured blocks where there are any,
FLOPs elsewhere.

A micro-batch of few tokens leaves the GPU's matrix units idle between its kernels. One number
describes that: a block attains half of the GPU's rate at ``gpu_half_tokens``, so that n tokens take
the time of ``n + gpu_half_tokens``. Smaller ones yet take as long as it takes to launch their
kernels, which is measured with the blocks.
"""

from functools import lru_cache

from ratel.planner.block_profile import BlockProfile
from ratel.planner.machine.hardware import Hardware
from ratel.planner.plan import Plan
from ratel.planner.shape import StageSpec, UnitSpec
from ratel.planner.traffic import kept_inner

SUM_BYTES = 6
"""Per parameter and pass, where gradients of several passes are summed in fp32: the gradient (2) is
read and the sum (4) read and written, in place of one gradient read and written, which is in a
block's own time."""

LOSS_TOKEN_BYTES = 32
"""GPU memory traffic per token and vocabulary entry: logits and gradient in bf16 and fp32, each
written and read."""


def block_profile(plan: Plan, block: int) -> BlockProfile:
    """What the plan says about a block, or what follows from its parameters: two FLOPs each a
    token, and attention."""
    return plan.profiles[block] if plan.profiles else _derived_profile(plan, block)


def _derived_profile(plan: Plan, block: int) -> BlockProfile:
    stage = _blocks(plan)[block]
    matrices = [p for u in stage.units for p in plan.spec.units[u].params if len(p.shape) > 1]
    elements, trained = (sum(p.num_elements for p in some) for some in (matrices, [p for p in matrices if p.trainable]))
    seq_len = plan.work.seq_len
    # QK' and PV: 4 FLOPs per position, channel and earlier position, of which there are seq_len / 2
    # on average.
    attention = 2 * seq_len * (plan.spec.hidden_size or 0)
    flops = float(seq_len * (2 * elements + attention))
    return BlockProfile(forward_flops=flops, recompute_flops=flops,
                        gradient_flops=float(seq_len * (2 * (elements + trained) + 2 * attention)))


def _blocks(plan: Plan) -> list[StageSpec]:
    return [s for s in plan.spec.stages if s.kind == "block"]


def recomputed_flops(plan: Plan, block: int) -> float:
    """FLOPs of one row that backward makes again beside what is kept."""
    saved = sum(inner.row_flops for inner, _ in kept_inner(plan, block))
    return max(block_profile(plan, block).recompute_flops - saved, 0.0)


class GpuSeconds:
    """Times of one plan on one machine, each formed once: blocks of one kind cost the same."""

    def __init__(self, plan: Plan, hardware: Hardware) -> None:
        self._plan, self._hardware = plan, hardware
        self._seq_len = plan.work.seq_len
        self.block = lru_cache(maxsize=None)(self._block)

    def _block(self, block: int, rows: int) -> tuple[float, float]:
        """Forward, and backward with its recomputation, of one micro-batch of ``rows`` rows. A
        device that is done before it is given the next work waits for it."""
        keeps = bool(kept_inner(self._plan, block))
        launch_s = block_profile(self._plan, block).launch_s
        least = launch_s[keeps] if launch_s else (0.0, 0.0)
        forward, backward = map(max, self._device_seconds(block, rows), least)
        return forward, backward + self._sums(block)

    def _sums(self, block: int) -> float:
        if "block" not in self._plan.accumulators:
            return 0.0
        units = _blocks(self._plan)[block].units
        return SUM_BYTES * sum(self._plan.spec.units[u].num_trainable for u in units) / self._hardware.gpu_bps

    def _device_seconds(self, block: int, rows: int) -> tuple[float, float]:
        profile = block_profile(self._plan, block)
        again = recomputed_flops(self._plan, block)
        if not profile.seconds:
            return (self._of_flops(profile.forward_flops, rows),
                    self._of_flops(profile.backward_flops + again, rows))
        forward, backward = self._measured(profile.seconds, rows)
        spared = profile.recompute_flops - again
        if not spared:
            return forward, backward
        if profile.keeping_seconds:
            forward, fastest = self._measured(profile.keeping_seconds, rows)
            share = min(1.0, spared / sum(inner.row_flops for inner in profile.inner))
            return forward, backward - share * max(backward - fastest, 0.0)
        return forward, max(backward - spared / profile.forward_flops * forward, 0.0)

    def _of_flops(self, row_flops: float, rows: int) -> float:
        return row_flops * self._busy_rows(rows) / self._hardware.gpu_flops

    def _busy_rows(self, rows: int) -> float:
        """With those that the GPU's idle units would have done."""
        return rows + self._hardware.gpu_half_tokens / self._seq_len

    def _measured(self, points: tuple[tuple[int, float, float], ...], rows: int) -> tuple[float, float]:
        """Between two measured numbers of rows on the line; beyond them as the saturation curve
        goes."""
        for (low, *at_low), (high, *at_high) in zip(points, points[1:]):
            if low <= rows <= high:
                share = (rows - low) / (high - low)
                return tuple(a + share * (b - a) for a, b in zip(at_low, at_high))
        near, *seconds = points[0] if rows < points[0][0] else points[-1]
        return tuple(s * self._busy_rows(rows) / self._busy_rows(near) for s in seconds)

    def ends(self, stage: StageSpec, rows: int) -> tuple[float, float]:
        """Seconds of the stages around the blocks: before them a lookup and its gradient, after
        them the loss and its gradient.

        The loss runs forward and backward at the turn; all its time is in the second number. It is
        measured with the blocks.
        """
        spec, tokens = self._plan.spec, rows * self._seq_len
        moved = 2 * self._plan.weight_bytes * tokens * (spec.hidden_size or 0)
        if stage.kind == "pre":
            grads = 2 * sum(spec.units[u].num_trainable for u in stage.units) * self._plan.grad_bytes
            return moved / self._hardware.gpu_bps, (moved + grads) / self._hardware.gpu_bps
        if self._plan.loss_s is not None:
            return 0.0, self._plan.loss_s * self._busy_rows(rows) / self._busy_rows(self._plan.work.micro_rows)
        logits = tokens * (spec.vocab_size or 0) * LOSS_TOKEN_BYTES
        return 0.0, self._of_flops(3 * self._head_flops(stage), rows) + (moved + logits) / self._hardware.gpu_bps

    def _head_flops(self, stage: StageSpec) -> float:
        spec = self._plan.spec
        if spec.vocab_size and spec.hidden_size:
            return 2.0 * self._seq_len * spec.vocab_size * spec.hidden_size
        return 2.0 * self._seq_len * sum(spec.units[u].num_params for u in stage.units)

    def update(self, unit: UnitSpec) -> float:
        """AdamW of a unit whose planes are on the GPU."""
        return self._plan.formats.update_bytes * unit.num_trainable / self._hardware.gpu_bps
