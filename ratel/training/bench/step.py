"""Measures whole steps under budgets: seconds, tokens/s, busy time of every resource, and the
bound."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from ratel.memory.resident import resident_bytes
from ratel.models.checkpoints.weights import view
from ratel.planner.report.plan_text import describe_plan, plan_to_json
from ratel.planner.report.utilization import describe, report_step
from ratel.runtime.session.result import StepResult
from ratel.runtime.session.session import Session

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """One configuration. ``options`` go to the Session as they are. The last step is traced."""

    model: Any
    batch_size: int = 8
    seq_len: int = 1024
    warmup: int = 2
    steps: int = 4
    trace: str | None = None
    """File for the trace of the last step."""
    options: dict[str, Any] = field(default_factory=dict)


def measure(bench: StepBench, progress: Progress = lambda text: None) -> dict[str, Any]:
    """Run it on random tokens with random weights. JSON-ready; times are medians over ``steps``."""
    begun = time.perf_counter()
    with Session(bench.model, **bench.options) as session:
        use_quick_weights(session)
        session.prepare(bench.batch_size, bench.seq_len)
        progress(describe_plan(session.plan))
        start_s = time.perf_counter() - begun
        outs, memory = [], []
        for index in range(bench.warmup + bench.steps):
            outs.append(_step(session, bench, index, progress))
            memory.append((resident_bytes(), torch.cuda.memory_reserved() if session.device.type == "cuda" else 0))
        if bench.trace is not None:
            outs[-1].timeline.write(bench.trace)
        rss, reserved = zip(*memory)
        return {**_summarize(session, bench, outs, start_s), "all_rss_bytes": rss, "all_gpu_reserved_bytes": reserved}


def use_quick_weights(session: Session) -> None:
    """Every parameter as `fill_quickly` makes it: initialising billions one by one takes
    minutes."""

    def read_unit(unit: int, out: torch.Tensor) -> None:
        out.zero_()
        for param in session.parts.spec.units[unit].params:
            fill_quickly(view(out, param))

    session.parts.stored.read_unit = read_unit


def fill_quickly(param: torch.Tensor) -> None:
    """Fill a tensor in place with a block of a million random values repeated, or ones where it has
    one dimension. Any dtype and device.

    The values are those of bf16, so that systems that begin with fp32 weights and with bf16 ones
    begin with the same.
    """
    if param.dim() < 2:
        param.fill_(1.0)
        return
    block, flat = random_block(), param.view(-1)
    for begin in range(0, flat.numel(), block.numel()):
        part = flat[begin : begin + block.numel()]
        part.copy_(block[: part.numel()])


@cache
def random_block() -> torch.Tensor:
    """The block of random values, on the CPU."""
    return (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().float()


def random_tokens(index: int, batch_size: int, seq_len: int, vocab_size: int) -> torch.Tensor:
    """The batch of a step: the same in every process, whatever it trains with."""
    return torch.randint(0, vocab_size, (batch_size, seq_len), generator=torch.Generator().manual_seed(index))


def _step(session: Session, bench: StepBench, index: int, progress: Progress) -> StepResult:
    tokens = random_tokens(index, bench.batch_size, bench.seq_len, session.parts.spec.vocab_size)
    out = session.step({"input_ids": tokens}, trace=index == bench.warmup + bench.steps - 1)
    busy = ", ".join(f"{name} {seconds:.3f}" for name, seconds in out.usage.busy_s.items() if seconds)
    progress(f"step {index}: {out.seconds:.3f} s, loss {out.loss:.4f}, norm {out.grad_norm:.3f}; busy: {busy}")
    return out


def _summarize(session: Session, bench: StepBench, outs: list[StepResult], start_s: float) -> dict[str, Any]:
    counted = outs[bench.warmup :]
    step_s = statistics.median(out.seconds for out in counted)
    spec, tokens = session.plan.spec, bench.batch_size * bench.seq_len
    busy_s = {name: statistics.median(out.usage.busy_s[name] for out in counted) for name in counted[0].usage.busy_s}
    bound_by = max(busy_s, key=busy_s.get)
    compute_s = session.prediction.busy_s["compute"] if session.prediction is not None else None
    return {
        "model": spec.name, "parameters": spec.num_params, "batch_size": bench.batch_size, "seq_len": bench.seq_len,
        "options": {key: value for key, value in bench.options.items() if isinstance(value, (str, int, float, bool))},
        "step_s": step_s, "tokens_per_s": tokens / step_s, "tflops_6pn": 6 * spec.num_params * tokens / step_s / 1e12,
        "busy_s": busy_s, "bound_s": busy_s[bound_by], "bound_by": bound_by,
        "fraction_of_bound": busy_s[bound_by] / step_s, "start_s": start_s,
        "predicted_s": session.prediction.step_s if session.prediction else None,
        "traced": report_step(outs[-1].timeline, session.machine, compute_s, session.plan.formats).to_json(),
        "ssd_read_bytes": statistics.median(out.usage.ssd_read_bytes for out in counted),
        "ssd_written_bytes": statistics.median(out.usage.ssd_written_bytes for out in counted),
        "gpu_peak_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
        "rss_bytes": resident_bytes(), "all_steps_s": [out.seconds for out in outs],
        "early_units": [out.early_units for out in outs], "redone_units": [out.redone_units for out in outs],
        "losses": [out.loss for out in outs], "grad_norms": [out.grad_norm for out in outs],
        "units_on_gpu": sum(place.on_gpu for place in session.plan.placements), "units": len(spec.units),
        "plan": {key: value for key, value in plan_to_json(session.plan).items() if key != "units"},
        "hardware": {**session.hardware, **_versions(),  # without the names of directories
                     "ssd_stripes": [*session.hardware.get("ssd_stripes", {}).values()]},
    }


def _versions() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "python": sys.version.split()[0]}


def table(results: list[dict[str, Any]]) -> str:
    """One line per configuration."""
    lines = [f"{'batch x seq':>12} {'s/step':>8} {'tokens/s':>10} {'TFLOP/s':>8} {'bound':>8} {'of bound':>9}  bound by"]
    for r in results:
        if "error" in r:
            lines.append(f"{r['batch_size']:>5} x {r['seq_len']:<4}  failed: {r['error']}")
            continue
        lines.append(f"{r['batch_size']:>5} x {r['seq_len']:<4} {r['step_s']:8.3f} {r['tokens_per_s']:10,.0f} "
                     f"{r['tflops_6pn']:8.1f} {r['bound_s']:8.3f} {r['fraction_of_bound']:8.0%}   {r['bound_by']}")
    return "\n".join(lines)


def details(result: dict[str, Any]) -> str:
    """What the last step's resources attained, and what its computation waited for."""
    return describe(result["traced"])
