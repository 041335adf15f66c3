"""What a block computes between its input and its output, as the planner sees it: what could be
kept, what it would save.

Pure data, measured or derived elsewhere. A block's backward pass runs the block once more from its
input; every inner activation that was kept spares that second run the operations that made it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The result of one operation inside a block that backward needs, per row of a micro-batch."""

    name: str
    """Unique in the block, and the same in blocks of the same kind: ``self_attn.q_proj``,
    ``mlp.up_proj``, ``sdpa``."""
    row_bytes: int
    row_flops: float
    """FLOPs a row of the operations that need not be run again when this is kept (and all other
    kept ones are)."""

    @property
    def flops_per_byte(self) -> float:
        return self.row_flops / self.row_bytes


@dataclass(frozen=True, kw_only=True)
class BlockProfile:
    """One kind of block at one sequence length. FLOPs count a multiply and an add as two."""

    forward_flops: float
    """FLOPs of one row."""
    recompute_flops: float
    """FLOPs of one row that backward makes again with nothing kept. They are less than
    ``forward_flops`` where the last operations of a block serve its output alone, which backward
    does not need."""
    gradient_flops: float | None = None
    """FLOPs of one row of the backward pass itself. None: twice ``forward_flops``, a product for the
    gradient of each factor. A product with a frozen weight has one."""
    inner: tuple[Inner, ...] = ()
    """Inner activations in the order in which forward makes them. What is not listed is always
    recomputed."""
    seconds: tuple[tuple[int, float, float], ...] = ()
    """Measured: ``(rows, forward, backward with everything recomputed)``, by rows; empty where
    nothing was measured."""
    keeping_seconds: tuple[tuple[int, float, float], ...] = ()
    """The same with all of ``inner`` kept on the device; empty where that was not measured, or did
    not fit."""
    launch_s: tuple[tuple[float, float], ...] = ()
    """Measured: seconds of the processor until the device has its work of one micro-batch, whatever
    its size, forward and backward; with nothing kept, and with all of ``inner`` kept. Empty where
    nothing was measured, or where the processor does the work."""

    @property
    def backward_flops(self) -> float:
        return 2 * self.forward_flops if self.gradient_flops is None else self.gradient_flops
