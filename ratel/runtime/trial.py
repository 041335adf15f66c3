"""Measures the memory that activations take: one block and one loss chunk, forward and backward, on the spot.

On a GPU the allocator says what the peak was. On a CPU device activations are ordinary memory of this process, and
Linux says it: the peak of the resident set, started anew before each trial. That includes the scratch buffers of math
libraries, and is taken over what the process held before, which the plan counts by itself.
"""

from collections.abc import Callable
from typing import Any

import torch

from ratel.memory.resident import peak_bytes, reset_peak, resident_bytes
from ratel.models import Parts
from ratel.plan.shape import UnitSpec
from ratel.runtime.loss import chunked_loss, positions_per_chunk, shifted_targets
from ratel.runtime.micro import with_labels
from ratel.units import MIB

SLACK = 1.10
"""The caching allocator's own fragmentation, over what was measured."""
SLACK_BYTES = 128 * MIB


def measure_workspace(parts: Parts, batch: Any, device: torch.device) -> int:
    """Bytes that one micro-batch needs beyond planes and slots.

    Raises torch.OutOfMemoryError if it does not fit on the GPU at all.
    """
    cuda = device.type == "cuda"
    meter = _GpuMeter(device) if cuda else _HostMeter()
    with torch.random.fork_rng(devices=[device] if cuda else []):  # dropout draws, and leaves no trace
        peak = max(_measure(parts, units, run, device, meter) for run, units in _trials(parts, batch))
    meter.close()
    return int(max(peak, 0) * SLACK) + meter.slack_bytes


def _measure(parts: Parts, units: list[UnitSpec], run: Callable[[], None], device: torch.device,
             meter: "_GpuMeter | _HostMeter") -> int:
    meter.reset()
    planes = sum(_attach(parts, unit, device) for unit in units)
    run()
    _measure_norms(parts, units)
    growth = meter.peak_growth() - planes
    for unit in units:
        parts.attach(unit.index, None)
        parts.take_grads(unit.index)
    return growth


class _GpuMeter:
    slack_bytes = SLACK_BYTES

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.empty_cache()
        self._held = torch.cuda.memory_allocated(device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_growth(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._held

    def close(self) -> None:
        torch.cuda.empty_cache()


class _HostMeter:
    slack_bytes = 0  # the plan's margin for the process covers the heap's own

    def __init__(self) -> None:
        self._held = resident_bytes()

    def reset(self) -> None:
        reset_peak()

    def peak_growth(self) -> int:
        return peak_bytes() - self._held

    def close(self) -> None:
        return None


def _measure_norms(parts: Parts, units: list[UnitSpec]) -> None:
    """As at the end of a unit's backward: on a CPU, norms in fp32 of bf16 gradients make an fp32 copy."""
    names = {p.name for unit in units for p in unit.params if p.trainable}
    grads = [p.grad for name, p in parts.module.named_parameters() if name in names and p.grad is not None]
    if grads:
        torch._foreach_norm(grads, 2, dtype=torch.float32)


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
    """Zero weights in place of the real ones; returns their bytes."""
    flat = torch.zeros(unit.num_elements, dtype=parts.dtype, device=device)
    parts.attach(unit.index, flat)
    return flat.numel() * flat.element_size()
