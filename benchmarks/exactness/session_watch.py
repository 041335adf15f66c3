"""A session watched from outside: digests of its gradients and of whatever is handed over on the
way.

They are enqueued on the stream that computes, between what is there anyway, so that nothing waits
for what it did not wait for before. What a session's parts are called is known here, and nowhere
else outside the package but in tests.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.exactness.bitwise import digest
from ratel.planner.checkpoints import INPUT
from ratel.planner.shape import ParamSpec, UnitSpec
from ratel.runtime.session.session import Session
from ratel.runtime.streams.streamer import Key

Digest = tuple[str, int]
"""The place at which it was taken, and its value."""

Noted = dict[str, list[Digest]]
"""Digests by what they are of, in the order of the step."""


class Watch:
    """A watch on one session that has been prepared, while the context lasts. It notes the weights
    at the begin and the end of each use, what forward saves and what backward gets of it, and the
    gradients of a unit's parameters; with ``planes`` also what is in DRAM before the next updates,
    for which every step then waits.
    """

    def __init__(self, session: Session, *, planes: bool = False) -> None:
        self._session, self._machinery, self._planes = session, session._machinery, planes
        self._units, self._attached = session.plan.spec.units, {}
        self._noted: list[tuple[str, str, Tensor]] = []
        self._returned: dict[tuple[int, int, str], dict[str, list[Tensor]]] = {}
        """What came back for each block, micro-batch and group, by name."""
        self._patches = ExitStack()

    def __enter__(self) -> "Watch":
        activations, gradients = self._machinery.activations, self._machinery.gradients
        self._after(self._session.parts.parameters, "attach", self._note_weights)
        self._after(activations, "save_input", lambda _, block, micro_batch, hidden:
                    self._note_saved(block, micro_batch, {INPUT: [hidden]}, "saved"))
        self._after(activations, "save", lambda _, block, micro_batch, name, tensors:
                    self._note_saved(block, micro_batch, {name: tensors}, "saved"))
        self._after(activations, "kept", lambda tensors, block, micro_batch, name:
                    self._note_saved(block, micro_batch, {name: tensors or []}, "kept"))
        self._after(activations, "returned", self._note_returned)
        self._before(self._machinery.streamer, "release", self._note_released)
        self._after(gradients, "measure", self._note_gradient)
        if self._planes:
            self._after(gradients, "total_norm", lambda _: self._note_planes())
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _after(self, owner: object, name: str, note: Callable[..., None]) -> None:
        """Have ``note`` called after a method. Until the context ends this method of the object is
        followed by ``note(result, *arguments)``."""
        real = getattr(owner, name)

        def watched(*args: Any) -> Any:
            result = real(*args)
            note(result, *args)
            return result

        self._patches.enter_context(mock.patch.object(owner, name, watched))

    def _before(self, owner: object, name: str, note: Callable[..., None]) -> None:
        real = getattr(owner, name)

        def watched(*args: Any) -> Any:
            note(*args)
            return real(*args)

        self._patches.enter_context(mock.patch.object(owner, name, watched))

    def take(self) -> Noted:
        """What has been noted since the last call; waits for the device."""
        noted, self._noted = self._noted, []
        values = torch.stack([one for _, _, one in noted]).tolist()
        result: Noted = {}
        for (what, place, _), value in zip(noted, values, strict=True):
            result.setdefault(what, []).append((place, value))
        return result

    def _note(self, what: str, place: str, tensor: Tensor) -> None:
        self._noted.append((what, place, digest(tensor)))

    def _note_weights(self, _: None, unit: int, flat: Tensor | None) -> None:
        begins = flat is not None
        if begins:
            self._attached[unit] = flat
        self._note(f"weights of {self._units[unit].name}", "at the begin of a use" if begins else "at the end of a use",
                   self._attached[unit])

    def _note_gradient(self, _: object, unit: UnitSpec, grad: Tensor) -> None:
        for param in trained(unit):
            self._note(gradient_name(unit, param), "computed", grad[param.offset : param.end])

    def _note_saved(self, block: int, micro_batch: int, saved: dict[str, list[Tensor]], place: str) -> None:
        for name, tensors in saved.items():
            for number, tensor in enumerate(tensors):
                self._note(f"{name or 'input'} of block.{block}, micro-batch {micro_batch}, tensor {number}", place, tensor)

    def _note_returned(self, saved: dict[str, list[Tensor]], key: tuple[int, int, str], view: Tensor) -> None:
        self._returned[key] = saved
        self._note_saved(*key[:2], saved, "returned")

    def _note_released(self, key: Key) -> None:
        """Note weights whose slot is about to be given back."""
        if key[0] != "unit":
            self._note_saved(*key[1:3], self._returned.pop(key[1:]), "at the end of backward")

    def _note_planes(self) -> None:
        """Backward is over as soon as the device is done, and no update that writes to them has
        begun."""
        self._machinery.lanes.synchronize()
        for unit, name, plane in planes_in_memory(self._session):
            if not self._session.plan.placement(unit).on_gpu:
                on_device = plane.to(self._machinery.lanes.device)
                if name == "hi":
                    self._note(f"weights of {unit.name}", "in DRAM", on_device)
                for param in trained(unit) if name == "g" else ():
                    self._note(gradient_name(unit, param), "in DRAM", on_device[param.offset : param.end])


def gradient_name(unit: UnitSpec, param: ParamSpec) -> str:
    return f"gradient of {unit.name}: {param.name}"


def trained(unit: UnitSpec) -> list[ParamSpec]:
    return [param for param in unit.params if param.trainable]


def planes_in_memory(session: Session) -> Iterator[tuple[UnitSpec, str, Tensor]]:
    """Weights and gradients that are in memory."""
    store = session._machinery.store
    for unit in session.plan.spec.units:
        for name in ("hi", "g"):
            if store.has(unit.index, name) and store.plane(unit.index, name).tensor is not None:
                yield unit, name, store.plane(unit.index, name).tensor
