"""Modes of PyTorch are left even where an exception comes between the last line of a `with` and its
end."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ratel.models.structure import trace
from ratel.runtime.blocks import op_trace, replay
from ratel.runtime.planning import outline
from ratel.runtime.session.session import Session
from tests.support.families import batches, llama

pytestmark = pytest.mark.numerics


class Stopped(BaseException):
    """As a handler of signals may raise it."""


def raised_at_the_end_of(module: Any, line: str, act: Callable[[], object]) -> bool:
    """Whether ``act`` came a second time to a line that begins a `with`, which it does when it
    leaves it; Stopped is raised then."""
    file = module.__file__
    number = next(n for n, text in enumerate(Path(file).read_text().splitlines(), 1) if text.strip().startswith(line))
    hits = 0

    def look(frame: FrameType, event: str, _: object) -> Any:
        nonlocal hits
        if frame.f_code.co_filename != file:
            return None
        if event == "line" and frame.f_lineno == number:
            hits += 1
            if hits == 2:
                sys.settrace(None)
                raise Stopped
        return look

    sys.settrace(look)
    try:
        act()
    except Stopped:
        pass
    finally:
        sys.settrace(None)
    return hits == 2


def opened(**options: Any) -> Session:
    torch.manual_seed(0)
    return Session(llama(), device="cpu", lr=1e-3, micro_batch=2, **options)


def make() -> None:
    opened().close()


def plan() -> None:
    from ratel import plan

    plan("demo", hardware="3090", batch_size=2, seq_len=32, advice=False)


def step() -> None:
    with opened(activations="dram") as session:
        session.step(batches("llama", 1)[0])


@pytest.mark.parametrize("module, line, act", [(trace, "with gates.handled_by(watch), shadow", make),
                                               (outline, "with modes_as_before(), _without_memory", plan),
                                               (op_trace, "with saved_tensors_hooks(pack", step), (replay, "with mode:", step)])
def test_no_mode_stays_on(module: Any, line: str, act: Callable[[], None]) -> None:
    assert raised_at_the_end_of(module, line, act)
    assert _get_current_dispatch_mode_stack() == [] and _get_current_function_mode_stack() == []
