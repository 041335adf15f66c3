"""Measures the GPU memory that activations take: one block and one loss chunk, forward and backward, on the spot."""

from typing import Any

import torch

from ratel.models import Parts
from ratel.plan.shape import UnitSpec
from ratel.runtime.loss import chunked_loss, positions_per_chunk, shifted_targets
from ratel.runtime.micro import with_labels
from ratel.units import MIB

SLACK = 1.10
"""The caching allocator's own fragmentation, over what was measured."""
SLACK_BYTES = 128 * MIB


def measure_workspace(parts: Parts, batch: Any, device: torch.device) -> int:
    """Bytes that one micro-batch needs beyond planes and slots; 0 on a CPU device, which has no such limit.

    Raises torch.OutOfMemoryError if it does not fit at all.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    peak = 0
    for run, units in _trials(parts, batch):
        torch.cuda.reset_peak_memory_stats(device)
        planes = sum(_attach(parts, unit, device) for unit in units)
        run()
        torch.cuda.synchronize(device)
        peak = max(peak, torch.cuda.max_memory_allocated(device) - held - planes)
        for unit in units:
            parts.attach(unit.index, None)
            parts.attach_grad(unit.index, None)
    torch.cuda.empty_cache()
    return int(peak * SLACK) + SLACK_BYTES


def _trials(parts: Parts, batch: Any):
    """The largest block, and the tail; each with the units that it uses."""
    with torch.no_grad():
        hidden, inputs = parts.head(batch)
    sizes = {s.index: sum(parts.spec.units[u].num_elements for u in s.units) for s in parts.spec.stages
             if s.kind == "block"}
    largest = max(sizes, key=sizes.get)

    def run_block() -> None:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = parts.block(largest - 1, leaf, inputs.with_leaves())
        output.backward(torch.zeros_like(output))

    def run_tail() -> None:
        if parts.is_causal_lm:
            chunk = positions_per_chunk(hidden.shape[0], parts.spec.vocab_size)
            chunked_loss(parts.tail_logits, hidden, shifted_targets(with_labels(batch)["labels"]), normalizer=1.0,
                         chunk=chunk, backward=True, after_chunk=lambda: None)
        else:
            leaf = hidden.detach().requires_grad_()
            with torch.enable_grad():
                parts.tail_loss(leaf, batch).backward()

    for stage, run in ((parts.spec.stages[largest], run_block), (parts.spec.stages[-1], run_tail)):
        yield run, [parts.spec.units[u] for u in stage.units]


def _attach(parts: Parts, unit: UnitSpec, device: torch.device) -> int:
    """Zero weights and gradients in place of the real ones; returns their bytes."""
    flat = torch.zeros(unit.num_elements, dtype=parts.dtype, device=device)
    grad = torch.zeros(unit.num_trainable, dtype=parts.dtype, device=device)
    parts.attach(unit.index, flat)
    parts.attach_grad(unit.index, grad)
    return flat.numel() * flat.element_size() + grad.numel() * grad.element_size()
