"""The frozen parameters of a model: no state holds them. A state names them by their content, and
goes on with no others."""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any

import torch

from ratel.errors import RatelError
from ratel.memory.exchange import Exchange
from ratel.memory.jobs import Job, crew
from ratel.planner.formats import FROZEN, StateFormats
from ratel.planner.shape import ModelSpec, UnitSpec
from ratel.store.transfer import UnitTransfer

Digests = dict[str, dict[str, str]]
"""By plane and unit: the SHA-256 of the bytes of what is frozen of it."""

_THREADS = 4


def frozen_planes(spec: ModelSpec, formats: StateFormats) -> list[tuple[UnitSpec, str]]:
    return [(unit, plane) for plane in formats.planes for unit in spec.units if formats.num_elements(unit, plane, (FROZEN,))]


class FrozenBase:
    """What is frozen in a session. It is read once, when it is first asked for: nothing changes
    it."""

    def __init__(self, spec: ModelSpec, formats: StateFormats, transfer: UnitTransfer, exchange: Exchange) -> None:
        self._planes, self._transfer, self._exchange = frozen_planes(spec, formats), transfer, exchange
        self._digests: Digests | None = None

    def describe(self) -> dict[str, Any]:
        """What a commit record says of it: nothing, where all is trained."""
        return {"base": self.digests()} if self._planes else {}

    def digests(self) -> Digests:
        if self._digests is None:
            with crew(_THREADS, "ratel-base") as threads:
                running = [(unit, plane, threads.submit(self._digest, unit, plane)) for unit, plane in self._planes]
                self._digests = _by_plane(running)
        return self._digests

    def check(self, named: Digests) -> None:
        """Refuse to go on where the state that names these was saved with other frozen parameters.
        Planes of which it knows nothing (the lower halves, after a bf16 run) may be any."""
        refuse_other(self.digests(), named)

    def _digest(self, unit: UnitSpec, plane: str) -> str:
        return digest_of(self._while_open(self._transfer.frozen_pieces(unit, plane)))

    def _while_open(self, pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for piece in pieces:
            self._exchange.check()  # its memory goes when the session does
            yield piece


def digest_of(pieces: Iterable[torch.Tensor]) -> str:
    found = sha256()
    for piece in pieces:
        found.update(memoryview(piece.view(torch.uint8).numpy()))
    return found.hexdigest()


def refuse_other(found: Digests, named: Digests) -> None:
    wrong = [unit for plane in named.keys() & found.keys() for unit in named[plane]
             if found[plane].get(unit) != named[plane][unit]]
    if wrong:
        more = f" and {len(set(wrong)) - 1} other units" if len(set(wrong)) > 1 else ""
        raise RatelError(f"its frozen parameters of {wrong[0]}{more} are not those that the state was trained with, which a "
                         "state does not hold", field="model", value=wrong[0],
                         remedy="Give the model that the run was started with; where its directory lies does not matter")


def _by_plane(running: list[tuple[UnitSpec, str, Job]]) -> Digests:
    result: Digests = {}
    for unit, plane, digest in running:
        result.setdefault(plane, {})[unit.name] = digest.result()
    return result
