"""Streams and events for a CPU device that behave like a GPU's at their worst. No tests here.

On a CPU device a copy is done when its call returns, so no test there can see an event that nobody
waits for. `LateLanes` stands in for `Lanes`: what is enqueued on ``h2d`` and ``d2h`` is run by a
thread for each, after a random delay, and only there; an event is reached when its lane has come to
it. On top of that every access is held to the order that events give it, so that luck hides
nothing:

- a copy may touch only what the compute lane had touched before the last event of it that the
  copy's lane waited for;
- the compute lane may touch nothing that a copy reads or writes, unless it waited for the copy;
- no copy may touch what an earlier one of the other lane touches, unless its lane waited for that;
- nobody may free memory that a copy still has to touch.

What is wrong is in ``violations``. Host threads are not told apart: what one of them has waited for
(``Event.synchronize``) counts as known to all that is enqueued from then on.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ratel.memory.lanes import Event, Lanes

COPIES = ("h2d", "d2h")
aten = torch.ops.aten
NOT_ON_A_STREAM = {aten.set_, aten.resize_, aten.detach_}
"""What changes a tensor without touching its bytes."""


@dataclass(frozen=True)
class Range:
    begin: int
    end: int
    is_write: bool

    def conflicts(self, other: "Range") -> bool:
        return self.begin < other.end and other.begin < self.end and (self.is_write or other.is_write)


@dataclass
class Work:
    """Something enqueued: an operation, or an event to reach or to wait for. ``number`` counts its
    lane's work."""

    number: int
    run: Any = None
    ranges: tuple[Range, ...] = ()
    label: str = ""
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class Point:
    """Where a lane was when an event was recorded: what it had come to itself, and what it knew of
    the others."""

    reached: threading.Event
    clock: dict[str, int]
    lanes: "LateLanes"

    def synchronize(self) -> None:
        self.reached.wait()
        self.lanes.waited_for(self.clock)


class _Lane(threading.Thread):
    """Runs what is enqueued, in order, late."""

    def __init__(self, name: str, seed: int, max_delay_s: float) -> None:
        super().__init__(name=f"late-{name}", daemon=True)
        self._random, self._max_delay_s = random.Random(f"{name} {seed}"), max_delay_s
        self._queue: deque[Work] = deque()
        self._filled = threading.Condition()
        self._ended = False
        self.start()

    def put(self, work: Work) -> None:
        with self._filled:
            self._queue.append(work)
            self._filled.notify()

    def end(self) -> None:
        with self._filled:
            self._ended = True
            self._filled.notify()
        self.join()

    def run(self) -> None:
        while True:
            with self._filled:
                self._filled.wait_for(lambda: self._queue or self._ended)
                if not self._queue:
                    return
                work = self._queue.popleft()
            if work.ranges:
                time.sleep(self._random.random() * self._max_delay_s)
            if work.run is not None:
                work.run()
            work.done.set()


class LateLanes(Lanes):
    def __init__(self, device: torch.device, *, seed: int = 0, max_delay_s: float = 0.002, deaf: str = "") -> None:
        """``deaf``: a lane that does not hear what it is told to wait for, to see that this is
        noticed."""
        super().__init__(device)
        assert device.type == "cpu"
        self.violations: list[str] = []
        self.num_copies = 0
        self._deaf = deaf
        self._lock = threading.RLock()
        self._lanes = {name: _Lane(name, seed, max_delay_s) for name in COPIES}
        self._clock = {name: dict.fromkeys(("compute", *COPIES), 0) for name in ("compute", *COPIES)}
        self._waited = dict.fromkeys(("compute", *COPIES), 0)
        """What host threads have waited for."""
        self._copied: dict[str, deque[Work]] = {name: deque() for name in COPIES}
        self._computed: deque[tuple[int, str, tuple[Range, ...]]] = deque()

    # --- the interface of Lanes -----------------------------------------------------------------------------------

    def on(self, lane: str) -> AbstractContextManager:
        return _Enqueueing(self, lane) if lane in COPIES else nullcontext()

    def record(self, lane: str) -> Event:
        with self._lock:
            reached = threading.Event()
            point = Point(reached, dict(self._clock[lane]), self)
            if lane in COPIES:
                self._lanes[lane].put(Work(self._clock[lane][lane], done=reached))
            else:
                reached.set()
            return Event(point)

    def wait(self, lane: str, event: Event | None) -> None:
        point = event._event if event is not None else None
        if point is None or lane == self._deaf:
            return
        if lane in COPIES:
            self._lanes[lane].put(Work(0, run=point.reached.wait))
        else:
            point.reached.wait()
        with self._lock:
            _learn(self._clock[lane], point.clock)

    def waited_for(self, clock: dict[str, int]) -> None:
        with self._lock:
            _learn(self._waited, clock)

    def synchronize(self) -> None:
        for lane in COPIES:
            self.record(lane).synchronize()
        with self._lock:
            latest = {name: self._clock[name][name] for name in self._clock}
            _learn(self._waited, latest)

    def end(self) -> None:
        for lane in self._lanes.values():
            lane.end()

    # --- what is done with memory ---------------------------------------------------------------------------------

    def watching(self) -> TorchDispatchMode:
        """Around what the main thread computes."""
        return _Watching(self)

    def enqueue(self, lane: str, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ranges = _ranges(func, args, kwargs, ())
        with self._lock:
            self.num_copies += 1
            self._clock[lane][lane] += 1
            work = Work(self._clock[lane][lane], ranges=ranges, label=f"{lane} {func}")
            self._check_copy(lane, work)
            work.run = _Later(self, work.label, func, args, kwargs)
            self._copied[lane].append(work)
            self._lanes[lane].put(work)

    def computed(self, func: Any, ranges: tuple[Range, ...]) -> None:
        with self._lock:
            known = self._clock["compute"]
            known["compute"] += 1
            self._computed.append((known["compute"], str(func), ranges))
            for lane in COPIES:
                self._check_against(lane, known[lane], ranges, f"compute {func}")
            least = max(self._waited["compute"], min(self._clock[lane]["compute"] for lane in COPIES))
            while self._computed and self._computed[0][0] <= least:
                self._computed.popleft()

    def _check_copy(self, lane: str, work: Work) -> None:
        known = self._clock[lane]
        for number, name, ranges in reversed(self._computed):
            if number <= max(known["compute"], self._waited["compute"]):
                break
            if _conflict(work.ranges, ranges):
                self.violations.append(f"{work.label} does not wait for the compute lane's {name}")
                break
        other = next(name for name in COPIES if name != lane)
        self._check_against(other, known[other], work.ranges, work.label)

    def _check_against(self, lane: str, known: int, ranges: tuple[Range, ...], label: str) -> None:
        copied = self._copied[lane]
        everybody = max(self._waited[lane], min(clock[lane] for clock in self._clock.values()))
        while copied and copied[0].number <= everybody:
            copied.popleft()
        for work in copied:
            if work.number > max(known, self._waited[lane]) and _conflict(work.ranges, ranges):
                self.violations.append(f"{label} does not wait for {work.label}")
                return


def _learn(known: dict[str, int], clock: dict[str, int]) -> None:
    for lane, number in clock.items():
        known[lane] = max(known[lane], number)


class _Later:
    """One operation, for which nothing but its operands' own owners keeps them in memory."""

    def __init__(self, lanes: LateLanes, label: str, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._lanes, self._label, self._func = lanes, label, func
        flat, self._form = tree_flatten((args, kwargs))
        self._flat = [_Operand(x) if isinstance(x, Tensor) else x for x in flat]

    def __call__(self) -> None:
        flat = [x.tensor() if isinstance(x, _Operand) else x for x in self._flat]
        if any(isinstance(old, _Operand) and new is None for old, new in zip(self._flat, flat)):
            self._lanes.violations.append(f"memory of {self._label} was freed before it had run")
            return
        args, kwargs = tree_unflatten(flat, self._form)
        with torch.no_grad():
            self._func(*args, **kwargs)


class _Operand:
    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._form = tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self) -> Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        dtype, offset, shape, stride = self._form
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


class _Enqueueing(TorchDispatchMode):
    def __init__(self, lanes: LateLanes, lane: str) -> None:
        super().__init__()
        self._late, self._lane = lanes, lane

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not func._schema.is_mutable or func.overloadpacket in NOT_ON_A_STREAM:
            return func(*args, **(kwargs or {}))
        self._late.enqueue(self._lane, func, args, kwargs or {})
        return args[0]


class _Watching(TorchDispatchMode):
    def __init__(self, lanes: LateLanes) -> None:
        super().__init__()
        self._late = lanes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func.overloadpacket in NOT_ON_A_STREAM:
            return func(*args, **kwargs)
        # Before it runs: afterwards a wrong one could have been late enough to be right.
        self._late.computed(func, _ranges(func, args, kwargs, ()))
        result = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        made = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]
        self._late.computed(func, _ranges(func, (), {}, made))
        return result


def _ranges(func: Any, args: tuple, kwargs: dict[str, Any], results: Any) -> tuple[Range, ...]:
    written = set()
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written |= {id(x) for x in tree_flatten(value)[0]}
    found = [(x, id(x) in written) for x in tree_flatten((args, kwargs))[0]] + [(x, True) for x in tree_flatten(results)[0]]
    return tuple(_range(x, is_write) for x, is_write in found if isinstance(x, Tensor) and x.numel() and x.device.type == "cpu")


def _range(tensor: Tensor, is_write: bool) -> Range:
    begin = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return Range(begin, begin + (last + 1) * tensor.element_size(), is_write)


def _conflict(some: tuple[Range, ...], others: tuple[Range, ...]) -> bool:
    return any(one.conflicts(other) for one in some for other in others)


@contextmanager
def late_lanes(monkeypatch: Any, **options: Any) -> Iterator[list[LateLanes]]:
    """Sessions made inside have such lanes; the list holds those of each, in order."""
    made: list[LateLanes] = []

    def make(device: torch.device) -> LateLanes:
        made.append(LateLanes(device, **options))
        return made[-1]

    monkeypatch.setattr("ratel.runtime.session.machinery.Lanes", make)
    try:
        yield made
    finally:
        monkeypatch.undo()
        for lanes in made:
            lanes.end()
