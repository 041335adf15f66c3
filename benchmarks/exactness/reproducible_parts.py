"""The single operations of a model, and one of its blocks, as plain PyTorch runs them: work to be
done repeatedly."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ratel import models
from ratel.hardware.host import worker_cores
from ratel.models.checkpoints.weights import view
from ratel.planner.shape import UnitSpec
from ratel.runtime.blocks.loss import chunked_loss, positions_per_chunk, shifted_count, shifted_targets
from ratel.training.bench.step import fill_quickly

Results = dict[str, Tensor]
Work = Callable[[], Results]

BACKENDS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
COPIED_BYTES = 128 << 20
"""Bytes of each copy beside a block: one of 64 MiB and more runs at the full rate of PCIe."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    given: list[Tensor]
    """Query, key and value of attention."""
    more: dict[str, Any]
    asked: Tensor
    """The gradient of the output."""
    chosen: str
    """What autograd calls the backend that was taken."""

    def works(self) -> Iterator[tuple[str, Work]]:
        """The call as it is, and by each backend alone. One that cannot do it raises RuntimeError
        when it runs."""
        yield "attention", self.run
        for backend in BACKENDS:
            yield f"attention, {backend.name.lower()}", partial(self.run, backend)

    def run(self, backend: SDPBackend | None = None) -> Results:
        tensors = [_leaf(t) for t in self.given]
        with nullcontext() if backend is None else sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(*tensors, **self.more)
            output.backward(self.asked)
        grads = {f"gradient of the {name}": t.grad for name, t in zip(("query", "key", "value"), tensors)}
        return {"output": output, **grads}


class Pieces:
    """A model with the weights of its ends and its first block. Hidden states and gradients that go
    in are random."""

    def __init__(self, config: Any, ids: Tensor, device: torch.device) -> None:
        self._parts = models.load(config, dtype=torch.bfloat16, device=device)
        for unit in self._units:
            self._parts.parameters.attach(unit.index, _filled(unit, device))
        self._random = torch.Generator(device).manual_seed(0)
        self._ids = ids.to(device)
        with torch.no_grad():
            hidden, self._inputs = self._parts.head({"input_ids": self._ids})
        self._hidden, self._grad = self._like(hidden), self._like(hidden)

    @property
    def num_blocks(self) -> int:
        return self._parts.num_blocks

    @property
    def _units(self) -> list[UnitSpec]:
        """The units of the first block and of what is around the blocks."""
        return [u for u in self._parts.spec.units if u.kind != "block" or u.index in self._parts.spec.stages[1].units]

    def block(self) -> Results:
        hidden = _leaf(self._hidden)
        output = self._parts.block(0, hidden, self._inputs)
        output.backward(self._grad)
        return {"output": output, "gradient of the input": hidden.grad, **self._gradients()}

    def products(self) -> Work:
        return self._all(nn.Linear, lambda module, x: F.linear(x, module.weight, module.bias), lambda m: m.in_features)

    def norms(self) -> Work:
        kinds = tuple({type(m) for m in self._parts.blocks[0].modules() if type(m).__name__.endswith("Norm")})
        return self._all(kinds, lambda module, x: module(x), lambda m: m.weight.shape[-1])

    def _all(self, kinds: Any, run: Callable[[nn.Module, Tensor], Tensor], width_of: Callable[[Any], int]) -> Work:
        """Forward and backward of every module of these kinds, each on an input of its own."""
        modules = {name: m for name, m in self._parts.blocks[0].named_modules() if isinstance(m, kinds)}
        shape = self._hidden.shape[:-1]
        given = {name: self._like(self._hidden.new_empty(*shape, width_of(m))) for name, m in modules.items()}
        with torch.no_grad():
            asked = {name: self._like(run(m, given[name])) for name, m in modules.items()}

        def work() -> Results:
            results = {}
            for name, module in modules.items():
                x = _leaf(given[name])
                output = run(module, x)
                output.backward(asked[name])
                results |= {f"{name}, output": output, f"{name}, gradient of the input": x.grad}
            return results | self._gradients()

        return work

    def embedding_and_loss(self) -> Results:
        (embedded, *_) = self._parts.pre({"input_ids": self._ids})
        embedded.backward(self._grad)
        gradients = {f"{name}, of the embedding": grad for name, grad in self._gradients().items()}
        chunk = positions_per_chunk(len(self._ids), self._parts.spec.vocab_size)
        loss, grad = chunked_loss(self._parts.tail_logits, self._hidden, shifted_targets(self._ids), chunk=chunk,
                                  backward=True, normalizer=shifted_count(self._ids), after_chunk=lambda: None)
        return {"embedded": embedded, **gradients, "loss": loss, "gradient of the hidden states": grad,
                **self._gradients()}

    def attention_call(self) -> AttentionCall | None:
        """The block's first scaled dot product attention; None if it has none."""
        calls, real = [], F.scaled_dot_product_attention

        def seen(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
            output = real(query, key, value, **more)
            given = [t.detach().clone() for t in (query, key, value)]
            calls.append(AttentionCall(given=given, more=more, asked=self._like(output), chosen=output.grad_fn.name()))
            return output

        with mock.patch.object(F, "scaled_dot_product_attention", seen):
            self._parts.block(0, self._hidden, self._inputs)
        return calls[0] if calls else None

    def _gradients(self) -> Results:
        """What backward has left on the parameters, by name."""
        found = {}
        for unit in self._units:
            names = [p.name for p in unit.params if p.trainable]
            found |= {n: g for n, g in zip(names, self._parts.parameters.take_grads(unit.index), strict=True) if g is not None}
        return found

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=self._random)

    def close(self) -> None:
        for unit in self._units:
            self._parts.parameters.attach(unit.index, None)
        self._parts.close()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _filled(unit: UnitSpec, device: torch.device) -> Tensor:
    flat = torch.zeros(unit.num_elements, dtype=torch.bfloat16, device=device)
    for param in unit.params:
        fill_quickly(view(flat, param))
    return flat


@contextmanager
def busy_machine(device: torch.device) -> Iterator[None]:
    """What a session does beside a block: copies of pinned memory in both directions, and threads
    that copy, too."""
    ended = threading.Event()
    ways = ["host"] * worker_cores() + (["in", "out"] if device.type == "cuda" else [])
    threads = [threading.Thread(target=_copy, args=(way, device, ended), daemon=True) for way in ways]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _copy(way: str, device: torch.device, ended: threading.Event) -> None:
    pinned = torch.ones(COPIED_BYTES, dtype=torch.uint8, pin_memory=way != "host")
    if way == "host":
        source, target = pinned.numpy(), torch.empty_like(pinned).numpy()
        while not ended.is_set():
            numpy.copyto(target, source)  # in this thread alone, and without the interpreter
        return
    other = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    torch.cuda.current_stream(device).synchronize()  # what was enqueued before may still use this memory
    source, target = (pinned, other) if way == "in" else (other, pinned)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        while not ended.is_set():
            target.copy_(source, non_blocking=True)
            stream.synchronize()
