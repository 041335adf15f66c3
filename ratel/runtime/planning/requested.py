"""What the caller of a session asked for, made into what the runtime works with, or refused."""

import math
import os
from numbers import Real
from pathlib import Path
from typing import Any

from ratel.config import check_name
from ratel.errors import RatelError
from ratel.planner.activation_policy import Activations
from ratel.runtime.states.durable_files import check_state_target, make_directory
from ratel.store.volumes import IoOptions
from ratel.units import parse_bytes

_SSD_REMEDY = "Give a directory on a local disk that you may write to"


def directories_of(ssd: "str | os.PathLike | list | tuple | None") -> tuple[str, ...]:
    if ssd is None:
        return ()
    names = ssd.split(",") if isinstance(ssd, str) else [ssd] if isinstance(ssd, os.PathLike) else list(ssd)
    for name in names:
        check_name(os.path.realpath(name), "ssd")
        try:
            make_directory(Path(name))
        except OSError as error:
            raise RatelError(f"cannot be made: {error.strerror}", field="ssd", value=name,
                             remedy=_SSD_REMEDY) from error
        if not os.access(name, os.W_OK | os.X_OK):
            raise RatelError("is not writable", field="ssd", value=name, remedy=_SSD_REMEDY)
    found = tuple(os.fspath(name) for name in names)
    twice = [name for name in found if sum(os.path.realpath(name) == os.path.realpath(other) for other in found) > 1]
    if twice:
        raise RatelError("is given twice", field="ssd", value=twice[-1], remedy="Name each directory once")
    return found


def durability_of(durable: str, commits: "str | os.PathLike | None", io: IoOptions) -> tuple[str, Path | None]:
    """The mode that can be had, and where its records go."""
    if durable not in ("off", "auto", "step", "checkpoint"):
        raise RatelError("not a way to keep states", field="durable", value=durable,
                         remedy="Use off, auto, step or checkpoint")
    if durable in ("auto", "step") and commits is None:
        raise RatelError("there is no place for the records of commits", field="commits", value=None,
                         remedy="Give commits=DIR")
    if durable == "step" and not io.directories:
        raise RatelError("commits are made on SSD but no directory was given", field="durable", value=durable,
                         remedy="Give --ssd DIR, or use --durable checkpoint")
    if durable == "step" and not io.checksums:
        raise RatelError("commits hold checksums", field="checksums", value="off",
                         remedy="Leave them on, or use --durable checkpoint")
    if durable in ("auto", "step"):
        check_state_target(Path(commits), "commits", ".old", ".removed")
    auto_without_ssd = durable == "auto" and not (io.directories and io.checksums)
    return "checkpoint" if auto_without_ssd else durable, None if commits is None else Path(commits)


def optimizer_of(optimizer: str, clip: float) -> str:
    """As a plan is asked for it: ``any`` is ``auto`` where eager updates are possible, too."""
    if optimizer not in ("auto", "eager", "deferred", "speculative"):
        raise RatelError("not an optimizer mode", field="optimizer", value=optimizer,
                         remedy="Use auto, eager, deferred or speculative")
    if clip and optimizer == "eager":
        raise RatelError("eager updates start before the norm of all gradients is known, so they cannot be clipped "
                         "by it", field="optimizer", value="eager",
                         remedy="Use deferred, speculative or auto, or switch clipping off with max_grad_norm 0")
    return "any" if optimizer == "auto" and not clip else optimizer


def is_compiled(compile: str, activations: Activations) -> bool:
    if compile == "on" and activations not in ("auto", "recompute"):
        raise RatelError("what compiled blocks make inside has no names to be kept by", field="activations",
                         value=activations, remedy="Use auto or recompute, or --compile off")
    return compile == "on"


def bytes_or_none(size: str | int | None, field: str) -> int | None:
    if size is None:
        return None
    num_bytes = 0 if isinstance(size, bool) else parse_bytes(size, field=field)
    if num_bytes <= 0:
        raise RatelError("must be above 0", field=field, value=size, remedy="Write it like 24GiB, or leave it out")
    return num_bytes


def learning_rate(value: Any) -> float:
    """0 is one: a step without a change."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value >= 0):
        raise RatelError("must be a finite number, 0 or more", field="lr", value=value)
    return float(value)
