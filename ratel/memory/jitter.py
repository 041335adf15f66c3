"""Random delays at hand-overs, for tests: a run that is right only by luck of timing shows it.

Every place where one thread, stream or device gives bytes to another calls ``pause``. It costs one
global read unless a test has switched delays on.
"""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_delays: "Delays | None" = None


class Delays:
    def __init__(self, max_delay_s: float, seed: int, probability: float) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.max_delay_s, self.probability = max_delay_s, probability
        self.count = 0

    def draw(self) -> float:
        with self._lock:
            self.count += 1
            if self._random.random() >= self.probability:
                return 0.0
            return self._random.random() * self.max_delay_s


def pause(on_stream: bool = False) -> None:
    """Sleep for a random time if a test asked for it. ``on_stream`` also delays the current CUDA
    stream."""
    delays = _delays
    if delays is None:
        return
    delay_s = delays.draw()
    if delay_s:
        if on_stream:
            _sleep_on_stream(delay_s)
        time.sleep(delay_s)


def _sleep_on_stream(delay_s: float) -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda._sleep(int(delay_s * 1.5e9))  # clock cycles


@contextmanager
def injected(max_delay_s: float, seed: int = 0, probability: float = 0.5) -> Iterator[Delays]:
    """Delay every hand-over by up to ``max_delay_s`` seconds, with the given probability, while the
    context lasts."""
    global _delays
    previous, _delays = _delays, Delays(max_delay_s, seed, probability)
    try:
        yield _delays
    finally:
        _delays = previous
