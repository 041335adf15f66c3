"""What more of each resource would bring: the same work planned again on a machine that has it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ratel.planner.machine.hardware import Hardware
from ratel.planner.search.micro_batches import Planned
from ratel.planner.search.request import Request
from ratel.planner.search.search import search
from ratel.units import GIB

MORE_DRAM_BYTES = 64 * GIB
MORE_GPU_BYTES = 8 * GIB
LEAST_GAIN = 0.005
"""By this share of the tokens per second an advice must help: less is not worth a line."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    what: str
    """As one buys it: ``one more SSD``."""
    tokens_per_s: float
    gained: float
    """Tokens per second more than without."""


def advise(chosen: Planned, hardware: Hardware) -> list[Gain]:
    """What helps, best first.

    Only more GPU memory is tried with every micro-batch; the rest with the one chosen, which saves
    most of the time.
    """
    requests = list(chosen.choices)
    same = [request for request in requests if request.work == chosen.plan.work]
    now = chosen.prediction.tokens_per_s
    gains = []
    for what, changed, machine in _variants(requests, same, hardware):
        then = max(search(changed, machine).prediction.tokens_per_s, now)
        gains.append(Gain(what=what, tokens_per_s=then, gained=then - now))
    return sorted((gain for gain in gains if gain.gained >= LEAST_GAIN * now), key=lambda gain: -gain.gained)


def _variants(requests: list[Request], same: list[Request],
              hardware: Hardware) -> Iterator[tuple[str, list[Request], Hardware]]:
    if hardware.ssds and same[0].ssd_budget is not None:
        count = len(hardware.ssds)
        for more in dict.fromkeys((1, count)):
            what = "one more SSD" if more == 1 else f"{2 * count} SSDs instead of {count}"
            grown = same[0].ssd_budget * (count + more) // count
            yield what, _with(same, ssd_budget=grown), replace(hardware, ssds=hardware.ssds + hardware.ssds[:1] * more, stripes=())
    yield "64 GiB more DRAM", _with(same, dram_budget=same[0].dram_budget + MORE_DRAM_BYTES), hardware
    if same[0].gpu_budget is not None and not same[0].on_host:
        yield "8 GiB more GPU memory", _with(requests, gpu_budget=same[0].gpu_budget + MORE_GPU_BYTES), hardware
    yield ("a CPU that updates twice as fast", same,
           replace(hardware, adam_params_per_s=2 * hardware.adam_params_per_s))
    yield "a GPU that computes twice as fast", same, replace(hardware, gpu_flops=2 * hardware.gpu_flops)


def _with(requests: list[Request], **changes: int) -> list[Request]:
    return [replace(request, **changes) for request in requests]
