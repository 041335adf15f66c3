"""What a session was asked for: read and checked once, and handed on as it is to whatever uses
it."""

import math
import os
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from ratel.config import (CommonOptions, TrainConfig, choice_reader, directories_reader, option_of, optional, options_of,
                          varied)
from ratel.errors import RatelError
from ratel.planner.activation_policy import AUTO, ActivationChoice
from ratel.planner.machine.hardware import Hardware
from ratel.planner.placement import Forced
from ratel.planner.work import Buffers

_read_common = {spec.name: option_of(spec).read for spec in options_of(CommonOptions)}


def learning_rate(value: Any, field: str = "lr") -> float:
    """0 is one: a step without a change."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value >= 0):
        raise RatelError("must be a finite number, 0 or more", field=field, value=value)
    return float(value)


def compute_dtype(value: Any, field: str = "dtype") -> str:
    if value not in ("bf16", "fp32"):
        raise RatelError("not a type of computation", field=field, value=value, remedy="Use bf16 or fp32")
    return value


def _as_given(value: Any, field: str) -> Any:
    """Whoever uses it reads it."""
    return value


def _norm(value: Any, field: str) -> float:
    return _read_common[field](value or 0.0, field)


def _activations(value: Any, field: str) -> ActivationChoice:
    return value if isinstance(value, dict) else _read_common[field](value, field)


def _hardware(value: Any, field: str) -> "str | Hardware":
    return value if isinstance(value, Hardware) else _read_common[field](value, field)


def _directories(value: Any, field: str) -> tuple[str, ...]:
    return () if value is None else directories_reader("is given twice")(value, field)


_durable = choice_reader("off", "auto", "step", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class SessionOptions(CommonOptions):
    """The keyword arguments of `ratel.Session`."""

    task: Any = varied("task", _as_given)
    """A name, or a `ratel.Task`."""
    lr: float = varied("lr", optional(learning_rate))
    max_grad_norm: float = varied("max_grad_norm", _norm)
    dtype: str = varied("dtype", compute_dtype, default="bf16")
    attention: str = varied("attention", _as_given)
    device: Any = varied("device", _as_given)
    """A name, or a `torch.device`."""
    ssd: tuple[str, ...] = varied("ssd", _directories, default=None)
    hardware: "str | Hardware" = varied("hardware", _hardware)
    activations: ActivationChoice = varied("activations", _activations)
    durable: str = varied("durable", _durable, default="off")
    commits: "str | os.PathLike[str] | None" = None
    """The directory of their records."""
    placement: Forced | None = None
    """The forced places of single units or planes."""
    buffers: Buffers = Buffers()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "commits", None if self.commits is None else Path(self.commits))
        if self.max_grad_norm and self.optimizer == "eager":
            raise RatelError("eager updates start before the norm of all gradients is known, so they cannot be clipped "
                             "by it", field="optimizer", value="eager",
                             remedy="Use deferred, speculative or auto, or switch clipping off with max_grad_norm 0")
        if self.compiles and self.activations not in (AUTO, "recompute"):
            raise RatelError("what compiled blocks make inside has no names to be kept by", field="activations",
                             value=self.activations, remedy="Use auto or recompute, or --compile off")

    @classmethod
    def of(cls, config: TrainConfig, **others: Any) -> "SessionOptions":
        """Those of a run; ``others`` are what the run itself does not say, or says otherwise."""
        common = {spec.name: getattr(config, spec.name) for spec in options_of(CommonOptions)}
        return cls(**{**common, "durable": config.durability, **others})

    @property
    def given(self) -> dict[str, Any]:
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}

    @property
    def fp32(self) -> bool:
        return self.dtype == "fp32"

    @property
    def compiles(self) -> bool:
        return self.compile == "on"

    @property
    def forced(self) -> Forced | None:
        """Where states must go; None where the plan decides."""
        return self.placement if self.placement is not None else None if self.tier == AUTO else self.tier

    @property
    def update_mode(self) -> str:
        """As a plan is asked for it: ``any`` is ``auto`` where eager updates are possible, too."""
        return "any" if self.optimizer == AUTO and not self.max_grad_norm else self.optimizer

    @property
    def may_commit(self) -> bool:
        """In place: what is on SSDs has checksums, which the records of commits hold."""
        return self.durable in ("auto", "step") and bool(self.ssd) and self.checksums == "on"

    @property
    def of_plan(self) -> dict[str, Any]:
        """Those that a plan depends on."""
        return {**{spec.name: getattr(self, spec.name) for spec in options_of(type(self)) if option_of(spec).plans},
                "placement": self.placement, "buffers": self.buffers}
