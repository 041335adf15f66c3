"""What makes a session's states last: saves, commits, exports; and the load of a saved state."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.lora.describe.as_json import to_json
from ratel.models.checkpoints.other_state import pack
from ratel.runtime.session.core import Core
from ratel.runtime.session.opening import dtype_of
from ratel.runtime.states.durable_files import check_state_target, replaceable
from ratel.runtime.states.format import OtherState
from ratel.runtime.states.moments import export_moments
from ratel.runtime.states.saved_state import SavedState
from ratel.runtime.states.saver import Target, raise_failure
from ratel.runtime.states.targets import CommitTarget, DirectoryTarget
from ratel.schema import shown

Extra = dict[str, Any] | None


def save(core: Core, path: Path, extra: Extra, wait: bool) -> Path:
    if core.machinery is None:
        raise RatelError("there is nothing to save before the first step", field="save")
    other = _other_state(core)
    target = core.apart(replaceable(path, "save"), "save")
    check_state_target(target, "save")
    _save(core, DirectoryTarget(target, core.plan, core.machinery.engine, other), other, extra, wait)
    return path


def commit(core: Core, extra: Extra, wait: bool) -> None:
    if core.machinery is None or not core.plan.commits:
        raise RatelError("the session does not commit in place", field="durable", value=core.options.durable,
                         remedy='Make it with durable="step" and commits=DIR, and take a step')
    other = _other_state(core)
    _save(core, CommitTarget(core.machinery.log, core.machinery.engine, other), other, extra, wait)


def wait_saved(core: Core) -> None:
    core.check_usable()
    if core.machinery is not None:
        if core.saved_at == core.attempts:
            core.flush()  # updates kept for a forward pass that may not come would be waited for for ever
        with core.noticing():
            done = core.machinery.saver.wait()
        raise_failure(done)


def load(core: Core, path: Path) -> dict[str, Any]:
    core.check_usable()
    if core.machinery is not None:
        raise RatelError("the session has begun already", field="load", remedy="Load before prepare() and step()")
    saved = SavedState(path, core.io.directories)
    saved.check_files()
    _check_adapter(core, saved)
    if core.parts.probed:
        saved.check_model(core.parts.spec)
    if saved.training["seed"] != core.options.seed:
        raise RatelError(f"the state was made with seed {saved.training['seed']}", field="seed", value=core.options.seed,
                         remedy=f"Give seed {saved.training['seed']}: dropout depends on it")
    other = saved.other_state()
    if other is not None:
        core.parts.stored.set_other_state(other)
    core.saved, core.moments = saved, None  # the state has moments of its own
    core.attempts, core.updates_made = saved.training["steps"], saved.training["updates"]
    return saved.training["extra"]


def _check_adapter(core: Core, saved: SavedState) -> None:
    """Refuse a state that was trained with another adapter, or without one."""
    ours = None if core.adaptation is None else to_json(core.adaptation.config)
    theirs = saved.training.get("adapter")
    if ours == theirs:
        return
    if ours is None or theirs is None:
        raise RatelError(f"the state was trained {'with an adapter' if ours is None else 'without an adapter'}", field="lora",
                         value="none" if ours is None else f"rank {ours['rank']}", remedy="Say what the run was started with")
    name = next(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
    raise RatelError(f"the state was trained with {shown(theirs.get(name))} there", field=core.adaptation.config.words.get(name, name),
                     value=shown(ours.get(name)), remedy="Say what the run was started with")


def export(core: Core, path: Path, dtype: str | None, optimizer: bool, beside: Callable[[Path], None] | None) -> Path:
    if core.machinery is None:
        raise RatelError("there is nothing to export before the first step", field="export")
    from ratel.runtime.states.export import export_model
    from ratel.runtime.states.export_adapter import export_adapter

    core.flush()
    transfer = core.machinery.transfer

    def further(directory: Path) -> None:
        if optimizer:
            export_moments(core.plan.spec, transfer.read_moment, core.updates_made, directory)
        if beside is not None:
            beside(directory)

    target = core.apart(replaceable(path, "export"), "export")
    if core.adaptation is not None:
        return export_adapter(core.parts, core.adaptation, transfer.read_weights, target, dtype=dtype_of(dtype or "fp32"), beside=further)
    return export_model(core.parts, transfer.weight_pieces, target, dtype_of(dtype or "bf16"), further)


def _other_state(core: Core) -> OtherState | None:
    state = core.parts.stored.other_state()
    return OtherState(content=pack(state)) if state else None


def _save(core: Core, target: Target, other: OtherState | None, extra: Extra, wait: bool) -> None:
    core.check_usable()
    training = _training_of(core, other, extra)
    wait_saved(core)
    with core.protected():  # an interrupt between holding updates back and asking the saver would hold them for ever
        core.machinery.saver.request(target, training)
        core.saved_at = core.attempts
    if wait:
        wait_saved(core)
        core.meter.read()  # what saving reads is not the next step's


def _training_of(core: Core, other: OtherState | None, extra: Extra) -> dict[str, Any]:
    """What a state records of the training beside its planes."""
    options, work = core.options, core.plan.work
    training = {"steps": core.attempts, "updates": core.updates_made, "seed": options.seed, "dtype": options.dtype,
                "hyper": core.constants, "max_grad_norm": options.max_grad_norm, "extra": _as_of_now(extra),
                "micro_batches": {"rows": work.rows, "rows_of_one": work.micro_rows},
                **({"buffers": other.describe()} if other else {})}
    if core.adaptation is not None:
        training["adapter"] = to_json(core.adaptation.config)
    if core.parts.task is not None:
        training["task"] = core.parts.task_runner.known_task.to_json()
    return training


def _as_of_now(extra: Extra) -> dict[str, Any]:
    """A copy, as JSON has it: it is written in the background, while the caller may go on with the
    original."""
    try:
        return json.loads(json.dumps(extra or {}))
    except (TypeError, ValueError) as error:
        raise RatelError(f"cannot be written as JSON: {error}", field="extra",
                         remedy="Give numbers, strings, lists and dictionaries of them") from error
