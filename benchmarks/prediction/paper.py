"""Predicts the figures of the Ratel paper (ICDE 2025) with this project's cost model, and what
Ratel itself would do.

    python -m benchmarks.prediction.paper            print every figure
    python -m benchmarks.prediction.paper --save     also write benchmarks/results/icde25_paper.json

The model is configured to do what the paper's system did (benchmarks/prediction/paper_systems.py)
on the machines 4090 and 3090 of ratel/planner/machines. Nothing is fitted but the numbers of these
files.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from benchmarks.harness.report import RESULTS, origin
from benchmarks.prediction import paper_figures as figures
from benchmarks.prediction import paper_systems as systems
from benchmarks.prediction.paper_figures import BEST_BATCH, CAPACITY_SHAPES, SEQ_LEN
from ratel.planner.forecast.cost import Prediction
from ratel.planner.machine.hardware import Hardware, load_hardware, with_ssds
from ratel.planner.machine.pipes import ssd_rates
from ratel.planner.plan import Plan
from ratel.planner.traffic import activation_traffic, pass_traffic

RESULT = RESULTS / "icde25_paper.json"
BATCHES = (8, 16, 24, 32, 48, 64, 96, 128)

LEAST_SWAP = ("qkv",)
"""Kept beside each block's input where capacity is concerned, 8 bytes per token, channel and block
in all. With the input alone (2 bytes) 13B at batch 60 would take 25 GB of the 128 that the paper
finds too few."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """``ratel``: what Ratel as built would do there, where the figure asks for a rate; eager, and
    deferred for exact clipping. ``reason``: why the paper's figure cannot be held against others of
    its own."""

    figure: str
    case: str
    unit: str
    paper: float | str
    ours: float | str
    ratel: float | None = None
    ratel_clipping: float | None = None
    reason: str | None = None

    @property
    def error(self) -> float | None:
        return None if isinstance(self.paper, str) else self.ours / self.paper - 1


spec = lru_cache(maxsize=None)(systems.gpt)


@lru_cache(maxsize=None)
def swapping(model: str, batch: int, hardware: Hardware) -> tuple[Plan, Prediction]:
    return systems.with_best_swap(systems.theirs(spec(model), batch), hardware)


@lru_cache(maxsize=None)
def as_built(model: str, batch: int, hardware: Hardware, deferred: bool) -> float:
    """Tokens/s of Ratel, with the activations kept that make its step shortest."""
    plan = systems.ours(spec(model), batch, hardware, deferred=deferred)
    return systems.with_best_swap(plan, hardware)[1].tokens_per_s


def rate_point(figure: str, model: str, batch: int, hardware: Hardware, paper: float, *, case: str = "",
               tflops: bool = False, reason: str | None = None) -> Point:
    scale = 8 * spec(model).num_params / 1e12 if tflops else 1.0
    eager, deferred = (scale * as_built(model, batch, hardware, d) for d in (False, True))
    return Point(figure=figure, case=case or f"{model}, batch {batch}", unit="TFLOP/s (8PN)" if tflops else "tokens/s",
                 paper=paper, ours=scale * swapping(model, batch, hardware)[1].tokens_per_s, ratel=eager,
                 ratel_clipping=deferred, reason=reason)


def throughput() -> Iterator[Point]:
    for name, table in (("4090", figures.TOKENS_4090), ("3090", figures.TOKENS_3090)):
        for (model, batch), paper in table.items():
            yield rate_point(f"throughput, {name}", model, batch, load_hardware(name), paper)


def best() -> Iterator[Point]:
    """At the paper's batch where it can be told (for 135B: 26 tokens/s with one SSD that moves 30
    bytes per parameter at 4.1 GB/s are a step of 24 sequences), else at the best of those that fit
    the GPU."""
    hardware = load_hardware("4090")
    for model, paper in figures.BEST_TFLOPS_4090.items():
        fitting = [b for b in BATCHES if fits(model, b, hardware.gpu_bytes, hardware.dram_bytes, "ssd")]
        batch = BEST_BATCH.get(model) or max(fitting, key=lambda b: swapping(model, b, hardware)[1].tokens_per_s)
        yield rate_point("best TFLOP/s, 4090", model, batch, hardware, paper, tflops=True)


def by_ssds() -> Iterator[Point]:
    hardware = load_hardware("4090")
    for batch, row in figures.TFLOPS_BY_SSDS.items():
        for count, paper in row.items():
            yield rate_point("13B by SSDs", "13B", batch, with_ssds(hardware, count), paper, tflops=True,
                             case=f"batch {batch}, {count} SSDs")
    for count, paper in figures.TOKENS_135B_BY_SSDS.items():
        yield rate_point("135B by SSDs", "135B", BEST_BATCH["135B"], with_ssds(hardware, count), paper,
                         case=f"{count} SSDs")


def gradient_offloading() -> Iterator[Point]:
    for name, table in figures.GRADIENT_OFFLOADING.items():
        for (model, batch), paper in table.items():
            yield Point(figure="gradient offloading, 4090", case=f"{name}: {model}, batch {batch}", unit="tokens/s",
                        paper=paper, ours=batch * SEQ_LEN / OFFLOADING[name](model, batch, load_hardware("4090")))


def _after_backward(model: str, batch: int, hardware: Hardware) -> float:
    """A stage of its own once backward is done, its chunks pipelined."""
    plan, found = swapping(model, batch, hardware)
    io_s, adam_s = _update_seconds(plan, hardware)
    return found.forward_s + _backward_alone(found, io_s) + max(io_s, adam_s)


def _naive(model: str, batch: int, hardware: Hardware) -> float:
    """Under backward, but one after the other: read, compute, write."""
    plan, found = swapping(model, batch, hardware)
    io_s, adam_s = _update_seconds(plan, hardware)
    return found.forward_s + max(_backward_alone(found, io_s), found.backward["ssd"] + adam_s)


def _backward_alone(found: Prediction, io_s: float) -> float:
    busy = found.backward | {"cpu optimizer": 0.0, "ssd": found.backward["ssd"] - io_s, "dram": 0.0}
    return max(busy.values())


def _update_seconds(plan: Plan, hardware: Hardware) -> tuple[float, float]:
    moved = pass_traffic(plan).updates
    io_s = ssd_rates(hardware).seconds(moved.ssd_read, moved.ssd_written)
    return io_s, plan.spec.num_params / hardware.adam_params_per_s


OFFLOADING: dict[str, Callable[[str, int, Hardware], float]] = {
    "after backward": _after_backward, "naive": _naive,
    "optimised": lambda model, batch, hardware: swapping(model, batch, hardware)[1].step_s}


def best_swap() -> Iterator[Point]:
    for batch, paper in figures.STEP_S_AT_BEST_SWAP.items():
        plan, found = swapping("13B", batch, load_hardware("4090"))
        yield Point(figure="13B, step at the best swap, 4090", unit="s", paper=paper, ours=found.step_s,
                    case=f"batch {batch} (ours swaps {systems.swapped_bytes(plan) / 1e9:.0f} GB)",
                    reason=_slower_than_a_larger_batch(batch, paper))
    found = swapping("13B", 32, load_hardware("4090"))[1]
    for name, ours in (("forward", found.forward_s), ("backward and optimizer", found.backward_s)):
        paper = figures.STAGES_13B_32[name]
        yield Point(figure="13B, batch 32, stages, 4090", case=name, unit="s", paper=paper, ours=ours,
                    reason=_faster_than_the_gpu(32, paper) if name == "forward" else None)


def _faster_than_the_gpu(batch: int, forward_s: float) -> str | None:
    flops = 2 * spec("13B").num_params * batch * SEQ_LEN / forward_s
    if flops > figures.STATED_FLOPS_4090:
        stated = figures.STATED_FLOPS_4090 / 1e12
        return f"{flops / 1e12:.0f} TFLOP/s, more than the {stated:.0f} that the paper gives the GPU"
    return None


def _slower_than_a_larger_batch(batch: int, step_s: float) -> str | None:
    for (model, other), rate in figures.TOKENS_4090.items():
        other_s = other * SEQ_LEN / rate
        if model == "13B" and other > batch and other_s < step_s:
            return f"{rate} tokens/s at batch {other} are {other_s:.1f} s a step: the smaller batch cannot take longer"
    return None


def largest() -> Iterator[Point]:
    for dram, paper in figures.LARGEST_BY_DRAM.items():
        yield Point(figure="largest model by DRAM, batch 1", case=f"{dram} GB", unit="", paper=paper,
                    ours=_largest(1, dram, "ssd"), reason=_outgrown_by_a_larger_batch(dram, paper))
    for (tier, dram), row in figures.LARGEST_BY_TIER.items():
        for batch, paper in row.items():
            yield Point(figure="largest model by batch", unit="", paper=paper, ours=_largest(batch, dram, tier),
                        case=f"{dram} GB, activations in {'DRAM' if tier == 'dram' else 'DRAM and SSD'}, batch {batch}",
                        reason=_contradicted(batch, tier, paper))


def _largest(batch: int, dram: int, tier: str) -> str:
    gpu = load_hardware("4090").gpu_bytes
    return max((m for m in CAPACITY_SHAPES if fits(m, batch, gpu, dram * 10**9, tier)), key=CAPACITY_SHAPES.index,
               default="none")


def fits(model: str, batch: int, gpu: int, dram: int, tier: str) -> bool:
    """Buffers and workspace on the GPU; buffers in DRAM, and activations where they may not go to
    SSD."""
    plan = systems.theirs(spec(model), batch, tier="ssd")
    kept = replace(plan, kept=(tuple((name, tier) for name in LEAST_SWAP),) * len(plan.checkpoint_tiers),
                   checkpoint_tiers=(tier,) * len(plan.checkpoint_tiers))
    activations = sum(activation_traffic(kept, block, batch).d2h for block in range(len(plan.checkpoint_tiers)))
    needed = plan.arena_bytes + (activations if tier == "dram" else 0)
    return systems.gpu_bytes(plan) <= gpu and needed <= dram


def _outgrown_by_a_larger_batch(dram: int, paper: str) -> str | None:
    for batch, model in figures.LARGEST_BY_TIER.get(("ssd", dram), {}).items():
        if CAPACITY_SHAPES.index(model) > CAPACITY_SHAPES.index(paper):
            return f"the paper trains {model} with {dram} GB at batch {batch}, which takes more"
    return None


def _contradicted(batch: int, tier: str, paper: str) -> str | None:
    """By what it runs elsewhere with more GPU memory, where DRAM is no limit because activations
    may go to SSD."""
    following = CAPACITY_SHAPES[min(CAPACITY_SHAPES.index(paper) + 1, len(CAPACITY_SHAPES) - 1)]
    most = max(b for m, b in figures.TOKENS_4090 if m == "13B")
    asked, had = (systems.gpu_bytes(systems.theirs(spec(m), b)) for m, b in ((following, batch), ("13B", most)))
    if tier == "ssd" and asked < had:
        return f"the paper runs 13B at batch {most}, which takes more GPU memory than {following} at batch {batch}"
    return None


def points() -> list[Point]:
    parts = (throughput, best, by_ssds, gradient_offloading, best_swap, largest)
    return [point for part in parts for point in part()]


def mean_error(found: list[Point]) -> float:
    errors = [abs(p.error) for p in found if p.error is not None and p.reason is None]
    return sum(errors) / len(errors)


def summary(found: list[Point]) -> dict:
    sizes = [p for p in found if p.error is None and p.reason is None]
    return {"machines": {name: load_hardware(name).to_json() for name in ("4090", "3090")},
            "mean_error": mean_error(found), "sizes_met": sum(p.paper == p.ours for p in sizes), "sizes": len(sizes),
            "points": [asdict(p) | {"error": p.error} for p in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the result beside the measured ones")
    args = parser.parse_args()
    found = points()
    result = summary(found)
    for p in found:
        ours = p.ours if isinstance(p.ours, str) else f"{p.ours:.1f}"
        error = "" if p.error is None else f"{p.error:+.0%}"
        built = "" if p.ratel is None else f"{p.ratel:8.1f} {p.ratel_clipping:8.1f}"
        print(f"{p.figure:34} {p.case:52} {p.paper!s:>7} {ours:>7} {error:>5} {built} {p.reason or ''}")
    print(f"mean error {result['mean_error']:.1%}; {result['sizes_met']} of {result['sizes']} model sizes met")
    if args.save:
        RESULT.write_text(json.dumps({**result, **origin()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
