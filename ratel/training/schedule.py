"""The learning rate as a pure function of the step, so that a resumed run continues on the same
curve."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def make_schedule(kind: str, *, lr: float, steps: int, warmup_steps: int = 0, min_lr: float = 0.0) -> Schedule:
    """``schedule(step)`` for steps counted from 0: a linear rise to ``lr``, then ``kind`` down
    towards ``min_lr``.

    The first step already learns (``lr / (warmup_steps + 1)``); a decay would reach ``min_lr`` at
    step ``steps``, the first one not taken.
    """
    decay = _DECAYS[kind]

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return lr * (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return min_lr + (lr - min_lr) * decay(progress)

    return schedule


_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
