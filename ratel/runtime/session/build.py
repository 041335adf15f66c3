"""The machinery of a session with the states in it, from whichever source: the model's own weights,
or a saved state."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ratel import interrupt, native
from ratel.errors import RatelError
from ratel.models import Parts
from ratel.optimizer_state.files import MomentFiles
from ratel.ownership.stamps import belongs_to
from ratel.planner.formats import StateFormats
from ratel.planner.machine.stripes import Weights
from ratel.planner.plan import Plan
from ratel.runtime.session.machinery import Machinery, can_continue
from ratel.runtime.states.moments import import_moments
from ratel.runtime.states.saved_state import SavedState
from ratel.startup import readahead
from ratel.store.volumes import IoOptions
from ratel.trace import phases

log = logging.getLogger(__name__)


def build(parts: Parts, plan: Plan, device: torch.device, *, threads: int, io: IoOptions, commits: Path | None,
          saved: SavedState | None, moments: MomentFiles | None) -> Machinery:
    """Complete, or not at all: what was imported in part must never be given back as trained."""
    pool = _threads(threads)
    machinery = None
    try:
        if saved is not None:
            saved.check_model(parts.spec)
            _tell_conversion(saved, plan)
        goes_on = saved is not None and are_own(saved, commits) and can_continue(saved, plan, io)
        with phases.phase("files and address space"):
            machinery = Machinery(parts, plan, device, pool=pool, io=io, commits=commits,
                                  earlier=saved if goes_on else None)
        interrupt.check()
        with phases.phase("importing states"):
            _fill(machinery, saved, moments, goes_on=goes_on)
        with phases.phase("the rest of the memory"):
            machinery.settle()
    except BaseException:
        if machinery is not None:
            machinery.close()
        pool.close()
        raise
    finally:
        readahead.end()
    return machinery


def _tell_conversion(saved: SavedState, plan: Plan) -> None:
    conversion = saved.conversion(plan.formats)
    if conversion is not None:
        log.warning(conversion)


def _threads(count: int) -> "native.op_ds.Pool":
    try:
        return native.op_ds.Pool(count)
    except OSError as error:
        raise RatelError(f"the system starts no {count} threads for this process ({error.strerror})", field="optimizer_threads",
                         value=count, remedy="Give fewer, or raise the limit (`ulimit -u`, a container's)") from error


def _fill(machinery: Machinery, saved: SavedState | None, moments: MomentFiles | None, *, goes_on: bool) -> None:
    if goes_on:
        machinery.continue_commits(saved)
    elif saved is not None:
        machinery.import_state(saved)
    else:
        machinery.import_weights()
        if moments is not None:
            import_moments(machinery.plan.spec, machinery.transfer, moments)
            machinery.lanes.synchronize()


def are_own(saved: SavedState, commits: Path | None) -> bool:
    """Whether the state is the commits that a session with this directory goes on with. Those of a
    copied directory are not: the SSD files that it speaks of are the original's."""
    return (commits is not None and os.path.realpath(saved.path) == os.path.realpath(commits)
            and all(belongs_to(path, saved.path) for path in saved.files))


def own_stripes(saved: SavedState | None, commits: Path | None, directories: Sequence[str]) -> Weights:
    """How such commits are striped over these directories, which is how the session goes on; ()
    where there are none to go on with."""
    if saved is None or not saved.is_in_place or not are_own(saved, commits):
        return ()
    if [os.fspath(path.parent) for path in saved.files] != list(map(os.path.realpath, directories)):
        return ()
    return tuple(saved.manifest["pattern"].count(index) for index in range(len(directories)))


def own_files(saved: SavedState | None, commits: Path | None, formats: StateFormats) -> tuple[Path, ...]:
    """The SSD files of such commits: space that is taken, but by this session. A session that
    stores states in another way makes new ones, beside which they stay until its first commit."""
    goes_on = saved is not None and are_own(saved, commits) and saved.conversion(formats) is None
    own = saved.files if goes_on else []
    return tuple(path for path in own if path.is_file())
