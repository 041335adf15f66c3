"""A small discrete-event kernel: processes are generators that yield the events they wait for;
pipes serve in order."""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from heapq import heappop, heappush

from ratel.planner.machine.pipes import Pipe
from ratel.trace.timeline import Span

Process = Generator["Event", None, None]


class Event:
    """Happens once; whoever waits goes on then, in the order in which they came."""

    __slots__ = ("done", "_then")

    def __init__(self, done: bool = False) -> None:
        self.done, self._then = done, []

    def then(self, call: Callable[[], None]) -> None:
        self._then.append(call) if not self.done else call()

    def set(self) -> None:
        assert not self.done, "an event happens once"
        self.done = True
        for call in self._then:
            call()
        self._then.clear()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.spans: list[Span] = []
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        self._count += 1  # equal times in the order in which they were asked for
        heappush(self._agenda, (time_s, self._count, call))

    def delay(self, seconds: float) -> Event:
        event = Event()
        self.at(self.now_s + seconds, event.set)
        return event

    def start(self, process: Process) -> Event:
        """Run a process; the event happens when it has ended."""
        ended = Event()

        def go_on() -> None:
            for event in process:
                if not event.done:
                    event.then(go_on)
                    return
            ended.set()

        go_on()
        return ended

    def run(self, until: Event) -> None:
        while not until.done:
            assert self._agenda, "every process waits for another one"
            self.now_s, _, call = heappop(self._agenda)
            call()

    def record(self, lane: str, name: str, begin_s: float) -> None:
        self.spans.append(Span(lane=lane, name=name, begin_s=begin_s, end_s=self.now_s))


class Pool:
    """Slots, given in the order in which they were asked for."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._asking: deque[Event] = deque()

    def acquire(self) -> Event:
        event = Event()
        self._asking.append(event)
        self._serve()
        return event

    def release(self) -> None:
        self._free += 1
        self._serve()

    def _serve(self) -> None:
        while self._free and self._asking:
            self._free -= 1
            self._asking.popleft().set()


class Queue:
    """Items for one process, in order."""

    def __init__(self) -> None:
        self._items: deque[object] = deque()
        self._waiting: Event | None = None

    def put(self, item: object) -> None:
        self._items.append(item)
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.set()

    def some(self) -> Event:
        """Happens when ``take`` has something to return."""
        if self._items:
            return Event(done=True)
        self._waiting = Event()
        return self._waiting

    def take(self) -> object:
        return self._items.popleft()


class Memory:
    """DRAM as a queue of bytes behind all that moves: a transfer is complete when its bytes have
    been through it.

    The mover does not wait, so that what one burst delays is caught up by the idle time after it.
    """

    def __init__(self, clock: Clock, bps: float) -> None:
        self._clock, self._bps, self._busy_until = clock, bps, 0.0

    def take(self, num_bytes: float) -> float:
        """The time at which bytes that begin to move now have been read or written."""
        self._busy_until = max(self._busy_until, self._clock.now_s) + num_bytes / self._bps
        return self._busy_until


@dataclass(slots=True)
class _Moving:
    name: str
    left: float
    begin_s: float
    through_memory_s: float
    done: Event


class TwoWay:
    """A pipe that serves one transfer at a time in each direction, the more urgent first; the
    directions share it."""

    IN, OUT = 0, 1

    def __init__(self, clock: Clock, memory: Memory, pipe: Pipe, lanes: tuple[str, str]) -> None:
        self._clock, self._memory, self._lanes = clock, memory, lanes
        self._alone = (pipe.in_bps, pipe.out_bps)
        self._beside = (pipe.in_beside_bps, pipe.out_beside_bps)
        self._queues: tuple[list, list] = ([], [])
        self._moving: list[_Moving | None] = [None, None]
        self.moved = [0.0, 0.0]
        """Bytes that were asked for, by direction."""
        self._since_s, self._count = 0.0, 0
        self._version = 0

    def move(self, direction: int, num_bytes: float, name: str, urgency: int = 0) -> Event:
        """Ask for a transfer; a smaller ``urgency`` goes first. The event happens when it is
        complete."""
        done = Event()
        self._count += 1
        self.moved[direction] += num_bytes
        heappush(self._queues[direction], (urgency, self._count, name, num_bytes, done))
        self._change()
        return done

    def _rate(self, direction: int) -> float:
        return (self._beside if self._moving[1 - direction] else self._alone)[direction]

    def _change(self) -> None:
        """Account for what has moved, take up what can be, and say when the next transfer will
        end."""
        now = self._clock.now_s
        for direction in (self.IN, self.OUT):
            if self._moving[direction]:
                self._moving[direction].left -= (now - self._since_s) * self._rate(direction)
        self._since_s = now
        for direction in (self.IN, self.OUT):
            if not self._moving[direction] and self._queues[direction]:
                _, _, name, num_bytes, done = heappop(self._queues[direction])
                self._moving[direction] = _Moving(name, num_bytes, now, self._memory.take(num_bytes), done)
        self._version += 1
        ends = [(m.left / self._rate(d), d) for d, m in enumerate(self._moving) if m]
        if ends:
            seconds, direction = min(ends)
            self._clock.at(now + max(seconds, 0.0), lambda version=self._version: self._ended(direction, version))

    def _ended(self, direction: int, version: int) -> None:
        if version != self._version:
            return  # the rates have changed since
        moving = self._moving[direction]
        # The other direction moved beside this one up to now.
        other = self._moving[1 - direction]
        if other:
            other.left -= (self._clock.now_s - self._since_s) * self._rate(1 - direction)
        self._since_s = self._clock.now_s
        self._moving[direction] = None
        self._clock.record(self._lanes[direction], moving.name, moving.begin_s)
        self._clock.at(max(self._clock.now_s, moving.through_memory_s), moving.done.set)
        self._change()
