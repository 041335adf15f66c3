"""Modes that PyTorch calls for every operation are left whatever happens: one that stays on would
change what everything later in the process computes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_STACKS = (_get_current_dispatch_mode_stack, _get_current_function_mode_stack)


@contextmanager
def modes_as_before() -> Iterator[None]:
    """Around code with modes of its own. An exception that arises between the last line of a
    ``with`` and the call of its ``__exit__`` (of a handler of signals, of a debugger) passes that
    by; it does not pass by the one further out, too."""
    depths = [len(stack()) for stack in _STACKS]
    try:
        yield
    finally:
        for stack, depth in zip(_STACKS, depths):
            while len(modes := stack()) > depth:
                modes[-1].__exit__(None, None, None)
