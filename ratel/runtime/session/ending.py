"""The end of a session: updates completed, a module's weights given back, everything released."""

import torch

from ratel.errors import DamagedError, WorkerError
from ratel.runtime.session.core import Core
from ratel.runtime.session.keeping import wait_saved


def close(core: Core) -> None:
    """Complete and give back where nothing has gone wrong, and release in any case."""
    try:
        if core.machinery is not None and core.broken is None and not core.closed:
            core.flush()
            wait_saved(core)
            if core.gives_back:
                _give_back(core)
    finally:
        core.closed = True
        if core.machinery is not None:
            core.machinery.close()
            core.machinery.pool.close()
            core.machinery = core.training = core.meter = None  # the planes go now, not at the next collection
        core.parts.close()
        if core.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, core.device)  # the budget was this session's


def _give_back(core: Core) -> None:
    try:
        core.parts.stored.restore(core.machinery.transfer.read_weights)
    except (OSError, DamagedError) as error:
        raise WorkerError(f"the model has only a part of its trained weights, the rest as they were: {error}") from error
