"""Limits of the whole machine's memory. Of huge pages there can be one at a time: tests beside each
other take turns."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.harness.machine_memory import Machine
from benchmarks.size.limit_dram import Limit, limit_dram
from ratel.errors import RatelError
from tests.support.patience import patience


@contextmanager
def taken_away(num_bytes: int, method: str = "huge-pages") -> Iterator[Limit]:
    """``num_bytes`` less are available inside of the block."""
    deadline_s = time.monotonic() + patience(60)
    with ExitStack() as stack:
        while True:
            try:
                limit = stack.enter_context(limit_dram(Machine().available_bytes() - num_bytes, method))
                break
            except RatelError as error:
                if "still in force" not in str(error) or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.2)
        yield limit
