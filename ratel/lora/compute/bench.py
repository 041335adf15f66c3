"""What adapters cost: one linear, and one layer of a Llama, as a multiple of the frozen linears.

Forward and backward together, on random values. Two times: the device's, with the launches replayed
from a recorded graph, and the clock's, as a program without recording takes it. The floor is the
frozen time and one reading each of X for S, of dY for dS and dB, and of X for dA, at the rate at
which this device copies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ratel.hardware.timing import median_seconds
from ratel.lora.compute.function import Adapter, Frozen, adapted_linears
from ratel.lora.compute.graphs import BACKWARD, FORWARD
from ratel.lora.compute.masks import Dropout, mask_key

Point = dict[str, Any]
Run = Callable[[], Any]
LINEARS = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))
LAYERS = {"llama-8b": (4096, 1024, 14336), "llama-3b": (3072, 1024, 8192)}
"""Hidden, keys' and values', and inner width."""
EVERY_GRAPH = tuple(f"f1+{name}" for name in BACKWARD) + tuple(f"{name}+b1" for name in FORWARD if name != "f1")
EAGER, APART = "eager", "apart"
"""As peft computes it; ``fused`` with each linear by itself."""
RECORDED = 5
COPIED_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class LoraBench:
    rows: int = 8192
    ranks: tuple[int, ...] = (8, 16, 64, 256)
    dropouts: tuple[float, ...] = (0.0, 0.1)
    graphs: tuple[str, ...] = ("fused", *EVERY_GRAPH)
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cuda")
    limit_s: float = 0.05
    """For each measurement."""

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


def linears(bench: LoraBench, shapes: tuple[tuple[int, int], ...] = LINEARS) -> Iterator[Point]:
    rate = copy_rate(bench)
    for inputs, outputs in shapes:
        for rank in bench.ranks:
            for p in bench.dropouts:
                work = Work(bench, [(inputs, (outputs,))], rank, p)
                yield {"inputs": inputs, "outputs": outputs, **work.measured(bench.graphs, rate)}


def layers(bench: LoraBench, names: tuple[str, ...] | None = None) -> Iterator[Point]:
    """Queries, keys and values; output; gate and up; down. What is between them is left out."""
    rate = copy_rate(bench)
    for name in LAYERS if names is None else names:
        hidden, kv, inner = LAYERS[name]
        parts = [(hidden, (hidden, kv, kv)), (hidden, (hidden,)), (hidden, (inner, inner)), (inner, (hidden,))]
        for rank in bench.ranks:
            for p in bench.dropouts:
                work = Work(bench, parts, rank, p)
                yield {"layer": name, **work.measured(("fused", APART, "f1+b1"), rate)}


class Work:
    """Groups of linears; those of a group read one X."""

    def __init__(self, bench: LoraBench, parts: list[tuple[int, tuple[int, ...]]], rank: int, p: float) -> None:
        self.bench, self.parts, self.rank, self.p = bench, parts, rank, p
        self.xs = [bench.random(bench.rows, inputs).requires_grad_() for inputs, _ in parts]
        self.weights = [[bench.random(j, i) * 0.02 for j in outputs] for i, outputs in parts]
        self.dys = [[bench.random(bench.rows, j) for j in outputs] for _, outputs in parts]
        self.adapters = [[Adapter(a=(bench.random(rank, i) * 0.02).requires_grad_(), scale=2.0,
                                  b=(bench.random(j, rank) * 0.02).requires_grad_()) for j in outputs]
                         for i, outputs in parts]

    def measured(self, graphs: tuple[str, ...], copy_rate_bps: float) -> Point:
        """Ratios to the frozen linears, by the device's time and by the clock's."""
        bench = self.bench
        frozen = self._times(lambda: self.frozen())
        found: dict[str, Any] = {}
        for name in (EAGER, *graphs):
            device_s, clock_s = self._times(lambda name=name: self.run(name))
            found[name] = {"device": round(device_s / frozen[0], 4), "clock": round(clock_s / frozen[1], 4)}
        elements = sum(2 * i + sum(outputs) for i, outputs in self.parts)
        reading_s = bench.rows * elements * self.xs[0].element_size() / copy_rate_bps
        return {"rows": bench.rows, "rank": self.rank, "dropout": self.p, "frozen_ms": frozen[0] * 1e3,
                "frozen_clock_ms": frozen[1] * 1e3, "floor": round(1 + reading_s / frozen[0], 4), "ratios": found}

    def frozen(self) -> None:
        for x, weights, dys in zip(self.xs, self.weights, self.dys, strict=True):
            torch.autograd.grad([F.linear(x, w) for w in weights], x, dys)

    def run(self, name: str) -> None:
        for part, (x, dys) in enumerate(zip(self.xs, self.dys, strict=True)):
            ys = self._eager(part) if name == EAGER else self._ours(part, name)
            leaves = [tensor for adapter in self.adapters[part] for tensor in (adapter.a, adapter.b)]
            torch.autograd.grad(ys, [x, *leaves], dys)

    def _eager(self, part: int) -> list[Tensor]:
        x = self.xs[part]
        return [F.linear(x, w) + F.linear(F.linear(F.dropout(x, self.p), adapter.a), adapter.b) * adapter.scale
                for w, adapter in zip(self.weights[part], self.adapters[part], strict=True)]

    def _ours(self, part: int, name: str) -> list[Tensor]:
        bases, adapters = [Frozen(weight=w) for w in self.weights[part]], self.adapters[part]
        dropouts = [Dropout.of(self.p, [mask_key(0, 0, part, n)]) if self.p else None for n in range(len(bases))]
        if name == APART:
            return [adapted_linears(self.xs[part], [base], [adapter], dropout)[0]
                    for base, adapter, dropout in zip(bases, adapters, dropouts, strict=True)]
        keys = [mask_key(0, 0, part, n) for n in range(len(bases))]
        return list(adapted_linears(self.xs[part], bases, adapters, Dropout.of(self.p, keys) if self.p else None, name))

    def _times(self, run: Run) -> tuple[float, float]:
        """Seconds of the device and of the clock."""
        clock_s = median_seconds(run, limit_s=self.bench.limit_s, settle=self._settle)
        return (_recorded_seconds(run, self.bench.limit_s) if self.bench.device.type == "cuda" else clock_s), clock_s

    def _settle(self) -> None:
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize(self.bench.device)


def _recorded_seconds(run: Run, limit_s: float) -> float:
    """Seconds of one of several runs that are recorded as one graph: launches cost next to
    nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(RECORDED):
            run()
    return median_seconds(graph.replay, limit_s=limit_s, settle=torch.cuda.synchronize) / RECORDED


def copy_rate(bench: LoraBench) -> float:
    """Bytes a second, read or written."""
    source = torch.empty(COPIED_BYTES if bench.device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)

    def settle() -> None:
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)

    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), limit_s=bench.limit_s, settle=settle)


def table(points: list[Point]) -> str:
    """Markdown: the device's ratios, the clock's in brackets."""
    names = list(dict.fromkeys(name for point in points for name in point["ratios"]))
    lines = ["| " + " | ".join(("work", "rank", "dropout", "frozen ms", "floor", *names)) + " |", "|---" * (5 + len(names)) + "|"]
    for point in points:
        what = point.get("layer") or f"{point['inputs']} -> {point['outputs']}"
        cells = [f"{one['device']:.2f} ({one['clock']:.2f})" if (one := point["ratios"].get(name)) else "" for name in names]
        lines.append("| " + " | ".join((what, str(point["rank"]), str(point["dropout"]), f"{point['frozen_ms']:.3f}",
                                        f"{point['floor']:.2f}", *cells)) + " |")
    return "\n".join(lines)
