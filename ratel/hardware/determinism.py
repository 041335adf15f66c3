"""Kernels that give the same bits every time.

Some of PyTorch's GPU kernels, the backward passes of attention among them, add up with atomics, in
the order in which threads happen to come: two runs of the same work then part after some steps, by
rounding.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ratel.errors import RatelError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def same_bits(on: bool) -> Iterator[None]:
    """Inside, PyTorch takes such kernels alone, in the whole process. Raises RatelError if an
    operation has none.

    cuBLAS reads what it may use when it is first called: a process that has used it before must
    have set ``CUBLAS_WORKSPACE_CONFIG`` itself.
    """
    if not on:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")
    filling = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # nothing here reads what it has not written, and filling takes time
    try:
        yield
    except RuntimeError as error:
        if "determin" not in str(error):
            raise
        raise RatelError(f"an operation of this model has no kernel that gives the same bits every time ({_first_line(error)})",
                         field="deterministic", remedy="Leave --deterministic out") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = filled


def _first_line(error: Exception) -> str:
    """The first line of an error, without PyTorch's own advice."""
    return str(error).splitlines()[0].split(", but you set")[0].split(". ")[0]
