"""The opening of a session: from a model and options to its parts, refused before anything is
reserved."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ratel import models
from ratel.config import check_name
from ratel.errors import RatelError
from ratel.hardware.device import require_device
from ratel.lora.adaptation import Adaptation
from ratel.lora.request import adapter_request
from ratel.models import Parts
from ratel.models.calls.tasks import Task
from ratel.models.checkpoints.other_state import refuse_unreadable
from ratel.planner.search.options import SessionOptions, compute_dtype
from ratel.runtime.session.core import Core
from ratel.runtime.states.durable_files import check_state_target, make_directory
from ratel.runtime.states.moments import check_moments, open_moments
from ratel.store.volumes import IoOptions
from ratel.trace import phases

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_SSD_REMEDY = "Give a directory on a local disk that you may write to"


def open_core(model: Any, options: SessionOptions, loss_fn: Callable[[Any, Any], Any] | None) -> Core:
    task = _task_of(options.task, loss_fn)
    device = require_device(options.device)
    io = IoOptions(directories=_made(options.ssd), backend=options.io_backend, direct=options.direct,
                   bandwidth_bps=options.ssd_bandwidth, checksums=options.checksums == "on")
    _check_durability(options)
    adaptation = _adaptation(options)
    with phases.phase("model in outline"):
        parts = models.load(model, dtype=DTYPES[options.dtype], device=device, seed=options.seed, loss_fn=loss_fn,
                            attention=options.attention, task=task, additions=adaptation)
    try:
        _add_router_loss(parts, options)
        parts.stored.check_source()
        if adaptation is not None and parts.probed:
            adaptation.check_base()
        refuse_unreadable(parts.stored.other_state())
        moments = open_moments(options.optimizer_state)
        check_moments(moments, parts)
        used = [(name, Path(path)) for name, path in (("model", model), ("optimizer_state", options.optimizer_state))
                if isinstance(path, (str, os.PathLike)) and os.path.exists(path)]
        core = Core(options, device, io, parts, used=used, moments=moments, gives_back=isinstance(model, torch.nn.Module),
                    adaptation=adaptation)
        if options.may_commit:
            core.apart(options.commits, "commits")
        return core
    except BaseException:
        parts.close()
        raise


def _adaptation(options: SessionOptions) -> Adaptation | None:
    request = adapter_request(options)
    return None if request is None else Adaptation(request, seed=options.seed, dtype=DTYPES[options.dtype])


def dtype_of(name: str) -> torch.dtype:
    return DTYPES[compute_dtype(name)]


def _task_of(task: "str | Task", loss_fn: Any) -> Task | None:
    found = Task.of(task)
    if found is not None and loss_fn is not None:
        raise RatelError("has a loss of its own, which contradicts loss_fn", field="task", value=found.name,
                         remedy="Give one of them")
    return found


def _made(directories: tuple[str, ...]) -> tuple[str, ...]:
    for name in directories:
        check_name(os.path.realpath(name), "ssd")
        try:
            make_directory(Path(name))
        except OSError as error:
            raise RatelError(f"cannot be made: {error.strerror}", field="ssd", value=name, remedy=_SSD_REMEDY) from error
        if not os.access(name, os.W_OK | os.X_OK):
            raise RatelError("is not writable", field="ssd", value=name, remedy=_SSD_REMEDY)
    return directories


def _check_durability(options: SessionOptions) -> None:
    if options.durable in ("auto", "step") and options.commits is None:
        raise RatelError("there is no place for the records of commits", field="commits", value=None, remedy="Give commits=DIR")
    if options.durable == "step" and not options.ssd:
        raise RatelError("commits are made on SSD but no directory was given", field="durable", value=options.durable,
                         remedy="Give --ssd DIR, or use --durable checkpoint")
    if options.durable == "step" and options.checksums == "off":
        raise RatelError("commits hold checksums", field="checksums", value="off",
                         remedy="Leave them on, or use --durable checkpoint")
    if options.durable in ("auto", "step"):
        check_state_target(options.commits, "commits", ".old", ".removed")


def _add_router_loss(parts: Parts, options: SessionOptions) -> None:
    parts.add_router_loss(options.router_aux_loss)
    if parts.routing is not None and options.compiles:
        raise RatelError("does not go together with the loss of routers, which looks into blocks", field="compile", value="on",
                         remedy="Use --compile off, or --router-aux-loss off")
