"""What a session is made of, from its opening to its end. Preparing, stepping, keeping and ending
are functions of it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ratel.errors import RatelError
from ratel.hardware.host import worker_cores
from ratel.lora.adaptation import Adaptation
from ratel.memory.exchange import Exchange
from ratel.models import Parts
from ratel.optimizer_state.files import MomentFiles
from ratel.ownership.apart import contains
from ratel.planner.machine.hardware import Hardware
from ratel.planner.plan import Plan
from ratel.planner.search.micro_batches import Planned
from ratel.planner.search.options import SessionOptions
from ratel.runtime.blocks.batch import Batch
from ratel.runtime.session.machinery import Machinery
from ratel.runtime.session.meter import Meter
from ratel.runtime.session.training_step import Training
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.saver import raise_failure
from ratel.runtime.updates.jobs import Hyper
from ratel.store.volumes import IoOptions


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The largest batch that a session has room for."""

    rows: int
    positions: int

    @classmethod
    def of(cls, batch: Batch) -> "Capacity":
        return cls(rows=batch.rows, positions=batch.positions)

    def check(self, batch: Batch) -> None:
        if batch.rows > self.rows or batch.positions > self.positions:
            raise RatelError(f"the session was prepared for {self} at most", field="batch", value=Capacity.of(batch),
                             remedy="Give a batch of the largest shape first, or call Session.prepare(rows, seq_len) with "
                                    "it before the first step")

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.positions}"


class Core:
    """``used``: names of options and the paths that the session reads because of them."""

    def __init__(self, options: SessionOptions, device: torch.device, io: IoOptions, parts: Parts, *,
                 used: Sequence[tuple[str, Path]], moments: MomentFiles | None, gives_back: bool,
                 adaptation: Adaptation | None = None) -> None:
        self.options, self.device, self.io, self.parts, self.gives_back = options, device, io, parts, gives_back
        self.adaptation = adaptation
        self._used = [*(("ssd", Path(folder)) for folder in io.directories), *used]
        self.moments, self.saved = moments, None
        self.threads = worker_cores() if options.optimizer_threads == "auto" else options.optimizer_threads
        self.attempts, self.updates_made, self.saved_at = 0, moments.step if moments is not None else 0, -1
        self.machine: Hardware | None = None
        self.planned: Planned | None = None
        self.capacity: Capacity | None = None
        self.machinery: Machinery | None = None
        self.training: Training | None = None
        self.meter: Meter | None = None
        self.accuracy: float | None = None
        self.closed = False
        self.broken: BaseException | None = None
        """What ended the session before its time."""

    saved: SavedState | None
    """The state that it continues."""

    @property
    def plan(self) -> Plan:
        if self.planned is None:
            raise RatelError("there is no plan before the shape of a batch is known", field="plan",
                             remedy="Call prepare(rows, seq_len) or step(batch) first")
        return self.planned.plan

    @property
    def exchange(self) -> Exchange:
        return self.machinery.exchange

    def hyper(self, lr: float) -> Hyper:
        """What the next update uses."""
        return Hyper(lr=lr, step=self.updates_made + 1, seed=self.options.seed, **self.constants)

    @property
    def constants(self) -> dict[str, float]:
        """AdamW's constants."""
        given = self.options
        return {**dict(zip(("beta1", "beta2"), given.betas)), "eps": given.eps, "weight_decay": given.weight_decay}

    def check_usable(self) -> None:
        if self.closed:
            raise RatelError("the session is closed", field="session", remedy="Make a new one")
        if self.broken is not None:
            raise RatelError(f"the session ended with an earlier error ({type(self.broken).__name__}: {self.broken})",
                             field="session", remedy="Make a new one") from self.broken
        if self.machinery is not None:
            with self.noticing():
                self.exchange.check()
            raise_failure(self.machinery.saver.ended())

    def flush(self) -> None:
        """Complete pending updates: afterwards every plane on its tier is that of the last step."""
        self.check_usable()
        if self.machinery is not None:
            with self.noticing():
                self.machinery.updates.flush()
                self.machinery.lanes.synchronize()  # updates on the GPU may run on another stream than the caller's

    def apart(self, path: Path, field: str) -> Path:
        """A directory that is replaced may not hold what the session reads or works on."""
        for name, used in self._used:
            if contains(path, used):
                raise RatelError(f"{name} ({os.fspath(used)}) is in it, which the session uses", field=field, value=path,
                                 remedy="Give another directory")
        return path

    def protected(self) -> "Protected":
        return Protected(self, BaseException)

    def noticing(self) -> "Protected":
        """Unlike a step, waiting for updates can be interrupted and done again."""
        return Protected(self, Exception)


class Protected:
    """What does not come to its end because of an error leaves the session unusable, but
    closable."""

    def __init__(self, core: Core, kind: type[BaseException]) -> None:
        self._core, self._kind = core, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, self._kind):
            self._core.broken = error
            self._core.exchange.close()
