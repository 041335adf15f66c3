"""What each resource did in a step: busy seconds, bytes, and which one was busiest."""

from dataclasses import dataclass

from ratel import native
from ratel.memory.lanes import LANES, Lanes
from ratel.runtime.updates.pipeline import OptimizerPipeline


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one step used. ``bound_s`` is the busy time of the busiest resource: what the step would
    take were all else hidden. Bytes are all since the last step; busy seconds are of the step
    itself, beside whose length they are put."""

    busy_s: dict[str, float]
    ssd_read_bytes: int
    ssd_written_bytes: int
    h2d_bytes: int
    d2h_bytes: int
    """Between DRAM and GPU memory; on a CPU device the same copies within DRAM."""

    @property
    def bound_by(self) -> str:
        return max(self.busy_s, key=self.busy_s.get)

    @property
    def bound_s(self) -> float:
        return self.busy_s[self.bound_by]


class Meter:
    """Reads counters at the end of each step and reports the difference.

    Updates go on after a step, while the next batch is waited for or a state is saved. Their
    seconds are in neither step: counted for the next one, a drive was busy for ten times as long as
    that took.
    """

    def __init__(self, lanes: Lanes, updates: OptimizerPipeline, engine: "native.nvme_ds.Engine | None") -> None:
        self._lanes, self._updates, self._engine = lanes, updates, engine
        self._cpu_s = 0.0
        self._disk: dict[str, dict] = {}
        self.read()

    def begin(self) -> None:
        """A step begins: what was busy until now was not for it."""
        self._cpu_s = self._updates.busy_s
        for path, now in self._disks().items():
            self._disk.setdefault(path, {})["busy_s"] = now["busy_s"]  # a state may be the first thing that is written there

    def _disks(self) -> dict[str, dict]:
        return self._engine.stats()["directories"] if self._engine is not None else {}

    def read(self) -> Usage:
        busy, moved = dict.fromkeys(LANES, 0.0), dict.fromkeys(LANES, 0)
        for span in self._lanes.take_spans():
            busy[span.lane] += span.seconds
            moved[span.lane] += span.num_bytes
        cpu_s, self._cpu_s = self._updates.busy_s - self._cpu_s, self._updates.busy_s
        busy["cpu optimizer"] = cpu_s
        disks = self._disks()
        deltas = [{key: now[key] - self._disk.get(path, {}).get(key, 0) for key in ("busy_s", "bytes_read", "bytes_written")}
                  for path, now in disks.items()]
        self._disk = {path: dict(now) for path, now in disks.items()}
        busy["ssd"] = max((d["busy_s"] for d in deltas), default=0.0)
        return Usage(busy_s=busy, ssd_read_bytes=sum(d["bytes_read"] for d in deltas),
                     ssd_written_bytes=sum(d["bytes_written"] for d in deltas), h2d_bytes=moved["h2d"],
                     d2h_bytes=moved["d2h"])
