"""The largest model and the largest batch that fit a limit on DRAM: searched for by planning, then
really trained."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ratel.errors import RatelError
from ratel.memory.resident import peak_bytes
from ratel.models.presets import preset_config
from ratel.planner.search.largest import largest_count
from ratel.planner.search.micro_batches import Planned
from ratel.runtime.session.session import Session
from ratel.training.bench.step import StepBench, measure
from ratel.units import format_bytes

Progress = Callable[[str], None]
SHORT = ("gpu_memory", "dram", "ssd")
"""What an error of the planner is about when something does not fit."""
FEWEST_LAYERS = 2
"""Blocks are recognised by being repeated."""
WARMUP = 2
"""The first step waits for kernels while the CPU updates already, what the second is spared: 0.8 s
were seen instead of 1.3."""


@dataclass(frozen=True, kw_only=True)
class MaxBench:
    """``model`` gives the width of the blocks; a larger model has more of them. ``steps`` count,
    after `WARMUP` that do not. ``options`` go to the Session."""

    model: str
    batch_size: int = 1
    seq_len: int = 1024
    steps: int = 3
    most: int = 4096
    """Layers, or sequences, that the search stops at."""
    options: dict[str, Any] = field(default_factory=dict)


def max_model(bench: MaxBench, limits: list[int], progress: Progress = lambda text: None) -> list[dict[str, Any]]:
    """One result per limit (bytes of DRAM): the deepest model that fits, trained for ``steps``
    steps."""
    def shape(layers: int) -> tuple[Any, int]:
        return preset_config(bench.model, num_blocks=layers), bench.batch_size

    return _train_all(bench, limits, progress, "layers", FEWEST_LAYERS, shape)


def max_batch(bench: MaxBench, limits: list[int], progress: Progress = lambda text: None) -> list[dict[str, Any]]:
    """As `max_model`, for the number of sequences in a step of the model as it is."""
    config = preset_config(bench.model)
    return _train_all(bench, limits, progress, "batch_size", 1, lambda rows: (config, rows))


def _train_all(bench: MaxBench, limits: list[int], progress: Progress, what: str, fewest: int,
               shape: Callable[[int], tuple[Any, int]]) -> list[dict[str, Any]]:
    """Each search begins where the one before suggests: planning tries blocks out, which takes
    seconds."""
    results: list[dict[str, Any]] = []
    for limit in limits:
        near = results[-1][what] * limit // results[-1]["dram_limit_bytes"] if results else 0
        results.append(_train_largest(bench, limit, progress, what, fewest, near, shape))
    return results


def _train_largest(bench: MaxBench, limit: int, progress: Progress, what: str, fewest: int, near: int,
                   shape: Callable[[int], tuple[Any, int]]) -> dict[str, Any]:
    plans: dict[int, Planned] = {}

    def fits(count: int) -> bool:
        planned = _plan(bench, limit, *shape(count))
        if planned is not None:
            plans[count] = planned
        progress(f"DRAM {format_bytes(limit)}, {what} {count}: {'fits' if planned else 'does not fit'}")
        return planned is not None

    count = largest_count(fits, least=fewest, most=bench.most, near=near)
    if count == 0:
        return {"dram_limit_bytes": limit, what: 0}
    config, rows = shape(count)
    run = _in_a_new_process(StepBench(model=config, batch_size=rows, seq_len=bench.seq_len, warmup=WARMUP, steps=bench.steps,
                                      options={**bench.options, "dram": limit}))
    planned, prediction = plans[count].plan, plans[count].prediction
    return {"dram_limit_bytes": limit, what: count, "parameters": run["parameters"], "model": bench.model,
            "batch": rows, "seq_len": bench.seq_len, "step_s": run["step_s"], "all_steps_s": run["all_steps_s"],
            "busy_s": run["busy_s"], "losses": run["losses"], "optimizer": planned.optimizer,
            "predicted_step_s": prediction.step_s if prediction else None, "dram_planned_bytes": planned.dram_bytes,
            "dram_peak_bytes": run["dram_peak_bytes"], "gpu_planned_bytes": planned.gpu_bytes,
            "gpu_peak_bytes": run["gpu_peak_bytes"], "ssd_planned_bytes": planned.ssd_bytes,
            "options": run["options"], "hardware": run["hardware"]}


def _in_a_new_process(bench: StepBench) -> dict[str, Any]:
    """As a user would run it: what the search has left in this process would count against the
    limit."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, bench).result()


def _measure(bench: StepBench) -> dict[str, Any]:
    return {**measure(bench), "dram_peak_bytes": peak_bytes()}


def _plan(bench: MaxBench, limit: int, config: Any, rows: int) -> Planned | None:
    try:
        with Session(config, **{**bench.options, "dram": limit}) as session:
            return session.plan_for(rows, bench.seq_len)
    except RatelError as error:
        if error.field in SHORT:
            return None
        raise


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'DRAM':>12} {'largest':>9} {'parameters':>12} {'s/step':>8} {'predicted':>10} {'DRAM peak':>12} {'of planned':>12}"]
    for r in results:
        count = r.get("layers", r.get("batch_size"))
        if not count:
            lines.append(f"{format_bytes(r['dram_limit_bytes']):>12}   nothing fits")
            continue
        predicted = f"{r['predicted_step_s']:.2f}" if r["predicted_step_s"] else ""
        lines.append(f"{format_bytes(r['dram_limit_bytes']):>12} {count:>9} {r['parameters'] / 1e6:>10,.0f} M "
                     f"{r['step_s']:8.2f} {predicted:>10} {format_bytes(r['dram_peak_bytes']):>12} "
                     f"{format_bytes(r['dram_planned_bytes']):>12}")
    return "\n".join(lines)
