"""Sessions on tiny models, and what two runs must have in common. No tests here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ratel.planner.work import Buffers
from ratel.runtime.session.session import Session
from ratel.runtime.states.saved_state import SavedState
from tests.support.families import build, loss_fn_of

SMALL = Buffers(weight_slots=1, grad_slots=1, host_weight_slots=1, host_grad_slots=1, ring_slots=1, chunk_elements=2048,
                checkpoint_slots=1)
MANY = Buffers(weight_slots=4, grad_slots=3, host_weight_slots=6, host_grad_slots=4, ring_slots=7, chunk_elements=4096,
               checkpoint_slots=5)
MIXED = {"*": {"hi": "dram", "lo": "ssd", "m": "ssd", "v": "dram", "g": "dram"}, "block.1": "ssd", "block.2": "gpu",
         "block.3": {"hi": "ssd", "g": "ssd"}}


def open_session(ssd: Path | Sequence[Path] | None, family: str = "llama", *, model: nn.Module | None = None,
                 **options: Any) -> Session:
    """A fresh model of the family, or ``model``, on the CPU in micro-batches of two rows, unless
    the options say otherwise."""
    folders = [ssd] if isinstance(ssd, Path) else ssd
    room = {"gpu_memory": "4GiB"} if options.get("device") == "cuda" else {}
    defaults = {"device": "cpu", "lr": 1e-3, "micro_batch": 2, "loss_fn": loss_fn_of(family)}
    return Session(build(family) if model is None else model, ssd=folders, **{**defaults, **room, **options})


def assert_same(one: tuple, other: tuple) -> None:
    """Numbers of each step, and tensors by name: equal to the last bit."""
    assert one[0] == other[0], "losses or norms differ"
    different = [name for name in one[1] if not torch.equal(one[1][name], other[1][name])]
    assert not different, f"states differ: {different[:5]}"


def with_frozen(*parts: str) -> nn.Module:
    """llama, of which parameters with one of the parts in their names are not trained."""
    model = build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return model


def everything(session: Session) -> dict[str, torch.Tensor]:
    """Every plane, by unit and name."""
    return {f"{unit.name}.{plane}": session.read_state(unit, plane) for unit in session.plan.spec.units
            for plane in ("hi", "lo", "m", "v") if session._machinery.store.has(unit.index, plane)}


def assert_holds(saved: SavedState, expected: dict[str, torch.Tensor]) -> None:
    """The state has these planes, and no other."""
    units = saved.manifest["model"]["units"]
    found = {f"{units[unit]['name']}.{plane}": saved.read(unit, plane) for unit, plane in saved.planes()}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def flip(file: Path, position: int) -> None:
    """One bit of a file."""
    with open(file, "r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([byte ^ 0x10]))
