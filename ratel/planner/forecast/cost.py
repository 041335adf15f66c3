"""Predicts the time of a step: how long each resource is busy in each pass, and what of it is
exposed.

The busy times are plain quotients of bytes, FLOPs and parameters by rates; their maximum is the
step's bound. The step takes a little more, because the first gather of a pass, the last gradient
and the last update have nothing to hide under; ``ratel/planner/forecast/recurrence.py`` follows the
stages to find how much. docs/planner.md has the formulas.
"""

from collections import Counter
from dataclasses import dataclass

from ratel.errors import RatelError
from ratel.planner.forecast.compute import GpuSeconds
from ratel.planner.forecast.recurrence import Prices, Times, follow
from ratel.planner.machine.hardware import Hardware
from ratel.planner.machine.pipes import link, ssd_rates
from ratel.planner.plan import Plan
from ratel.planner.traffic import Traffic, micro_rows, pass_traffic

RESOURCES = ("compute", "h2d", "d2h", "cpu optimizer", "dram", "ssd")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one step takes in steady state. ``forward`` and ``backward``: seconds for which each of
    RESOURCES is busy."""

    step_s: float
    forward_s: float
    """To the end of the last block's forward pass, with what it waits for: updates made under
    it."""
    backward_s: float
    """The rest: loss, backward, updates on the GPU, and eager updates as far as the next step waits
    for them."""
    forward: dict[str, float]
    backward: dict[str, float]
    tokens_per_s: float
    ssd_read: int
    ssd_written: int

    @property
    def busy_s(self) -> dict[str, float]:
        return {name: self.forward[name] + self.backward[name] for name in RESOURCES}

    @property
    def bound_by(self) -> str:
        """The busiest resource."""
        busy = self.busy_s
        return max(RESOURCES, key=busy.__getitem__)

    @property
    def bound_s(self) -> float:
        """What the step would take if everything else were hidden."""
        return max(self.busy_s.values())

    @property
    def exposed_s(self) -> float:
        return self.step_s - self.bound_s


def predict(plan: Plan, hardware: Hardware) -> Prediction:
    """The step time of ``plan`` on ``hardware``. Raises RatelError if the plan uses SSDs and the
    machine has none."""
    return predict_below(plan, hardware, float("inf"))


def predict_below(plan: Plan, hardware: Hardware, limit_s: float) -> Prediction | None:
    """As `predict`, but None for a step whose busiest resource alone takes ``limit_s``: most of a
    search's plans."""
    gpu = GpuSeconds(plan, hardware)
    passes = pass_traffic(plan)
    updated = [u for u in plan.spec.units if not plan.placement(u).on_gpu]
    first = _PassWork(traffic=passes.forward + passes.forward_updates, first_h2d=passes.first_weights[0],
                      update_bytes=plan.formats.update_bytes, update_speed=plan.formats.update_speed,
                      params=sum(u.num_trainable for u in updated if not plan.updates_in_backward(u)))
    second = _PassWork(traffic=passes.backward + passes.backward_updates, first_h2d=passes.first_weights[1],
                       update_bytes=plan.formats.update_bytes, update_speed=plan.formats.update_speed,
                       last_d2h=passes.last_gradient, before_updates=passes.first_weights[1] + passes.first_gradient,
                       params=sum(u.num_trainable for u in updated if plan.updates_in_backward(u)),
                       to_other_planes=bool(plan.early))
    prices = (_prices(first, hardware), _prices(second, hardware))
    compute = _compute_seconds(plan, gpu)
    forward, backward = (_busy(work, hardware, price, seconds)
                         for work, price, seconds in zip((first, second), prices, compute))
    if max(forward[name] + backward[name] for name in RESOURCES) >= limit_s:
        return None
    return _prediction(plan, follow(plan, gpu, prices), forward, backward, first.traffic + second.traffic)


@dataclass(frozen=True, kw_only=True)
class _PassWork:
    traffic: Traffic
    params: int
    """Updated by the CPU during the pass."""
    update_bytes: float
    """Bytes of memory traffic for each of them."""
    update_speed: float
    """As the formats have it."""
    first_h2d: int
    last_d2h: int = 0
    """Bytes beside which nothing can move the other way."""
    before_updates: int = 0
    """Bytes over PCIe beside which nothing is updated."""
    to_other_planes: bool = False
    """The updates leave what they are made from."""


def _prices(work: _PassWork, hardware: Hardware) -> Prices:
    """What a byte or a parameter costs beside the pass's other traffic: total seconds over total
    work."""
    moved = work.traffic
    h2d_s, d2h_s = link(hardware).seconds(moved.h2d, moved.d2h, first_in=work.first_h2d, last_out=work.last_d2h)
    beside = (moved.dram_bytes - work.before_updates) / max(work.params, 1)
    share = hardware.update_share(elsewhere=work.to_other_planes)
    update = max(1 / (share * work.update_speed * hardware.adam_params_per_s), (work.update_bytes / share + beside) / hardware.dram_bps)
    return Prices(ssd=_ssd_seconds(moved, hardware) / max(moved.ssd_bytes, 1), h2d=h2d_s / max(moved.h2d, 1),
                  d2h=d2h_s / max(moved.d2h, 1), update=update)


def _ssd_seconds(moved: Traffic, hardware: Hardware) -> float:
    if not moved.ssd_bytes:
        return 0.0
    rates = ssd_rates(hardware)
    if rates is None:
        raise RatelError("the plan uses SSDs, of which the machine has none", field="hardware.ssds",
                         value=hardware.name, remedy="Plan without --ssd, or give the hardware file its SSDs")
    return rates.seconds(moved.ssd_read, moved.ssd_written)


def _busy(work: _PassWork, hardware: Hardware, prices: Prices, compute_s: float) -> dict[str, float]:
    moved = work.traffic
    share = hardware.update_share(elsewhere=work.to_other_planes)
    dram_bytes = moved.dram_bytes + work.update_bytes / share * work.params
    return {"compute": compute_s, "h2d": moved.h2d * prices.h2d, "d2h": moved.d2h * prices.d2h,
            "cpu optimizer": work.params / (share * work.update_speed * hardware.adam_params_per_s), "dram": dram_bytes / hardware.dram_bps,
            "ssd": moved.ssd_bytes * prices.ssd}


def _compute_seconds(plan: Plan, gpu: GpuSeconds) -> tuple[float, float]:
    forward = backward = 0.0
    sizes = Counter(micro_rows(plan)).items()
    for stage in plan.spec.stages:
        for rows, count in sizes:
            there, back = gpu.block(stage.index - 1, rows) if stage.kind == "block" else gpu.ends(stage, rows)
            forward, backward = forward + count * there, backward + count * back
    return forward, backward + sum(gpu.update(u) for u in plan.spec.units if plan.placement(u).on_gpu)


def _prediction(plan: Plan, times: Times, forward: dict[str, float], backward: dict[str, float],
                moved: Traffic) -> Prediction:
    # The recurrence lets urgent transfers and copies pass each other; no resource does more work
    # than there is time.
    step_s = max(times.step_s, *(forward[name] + backward[name] for name in RESOURCES))
    forward_s, backward_s = times.forward_s, step_s - times.forward_s
    return Prediction(step_s=step_s, forward_s=forward_s, backward_s=backward_s, forward=forward, backward=backward,
                      tokens_per_s=plan.work.rows * plan.work.seq_len / step_s, ssd_read=moved.ssd_read,
                      ssd_written=moved.ssd_written)
