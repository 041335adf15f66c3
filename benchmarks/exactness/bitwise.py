"""Whether work that is done again has the same bits: digests of what is too large to keep,
differences of the rest."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

COLUMNS = 1 << 12
MULTIPLIER = 0x5851F42D4C957F2D
"""Knuth's, of a linear congruential generator modulo 2^64."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device, which is not waited for. Equal bits have equal digests,
    in whatever order they are summed; another value, or values that have changed places, make
    another one (but for one case in 2^64).

    The bytes are words of 64 bits in rows of 4096. The sum of each column and of each row is mixed
    with its position: sums weighted by position alone lose two words that have changed places and
    differ in the highest bit.
    """
    words, rest = _words(tensor)
    whole = words.numel() // COLUMNS * COLUMNS
    square = words[:whole].view(-1, COLUMNS)
    sums = torch.cat((square.sum(0), square.sum(1), words[whole:], rest))
    # Shifts bring high bits down, the multiplication low ones up.
    mixed = sums + _places(sums.numel(), sums.device)
    mixed = (mixed ^ mixed >> 32) * MULTIPLIER
    return (mixed ^ mixed >> 32).sum()


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor as int64, and the bytes that fill no word, each as one."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = raw.numel() // 8 * 8
    return raw[:whole].view(torch.int64), raw[whole:].long()


@cache
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device) * MULTIPLIER


def difference(first: Tensor, later: Tensor) -> dict[str, Any] | None:
    """How many elements have other bits, of how many, and the largest difference; None where all
    have the same."""
    kind = BITS[first.element_size()]
    differs = first.contiguous().view(kind) != later.contiguous().view(kind)
    count = int(differs.sum())
    if not count:
        return None
    largest = (first[differs].double() - later[differs].double()).abs().max()
    return {"elements": count, "of": first.numel(), "largest": float(largest)}


class Repetitions:
    """Results by name, of the first time, which are kept, and of repetitions, which are counted."""

    def __init__(self) -> None:
        self.count = self.different = 0
        self._first: dict[str, Tensor] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        """The tensors that were different at some time: how often, and by how much at most."""

    def add(self, results: dict[str, Tensor]) -> None:
        if not self._first:
            self._first = {name: tensor.detach().clone() for name, tensor in results.items()}
            return
        assert results.keys() == self._first.keys(), "work that is done again has results of the same names"
        found = {name: difference(first, results[name].detach()) for name, first in self._first.items()}
        self.note({name: one for name, one in found.items() if one})

    def note(self, found: dict[str, dict[str, Any]]) -> None:
        """What the next repetition differs in, by tensor; numbers are None where they are not
        known."""
        self.count += 1
        self.different += bool(found)
        for name, one in found.items():
            known = self.tensors.setdefault(name, {"times": 0, "elements": None, "of": None, "largest": None})
            known["times"] += 1
            for key in ("elements", "of", "largest"):
                if one[key] is not None:
                    known[key] = max(known[key] or 0, one[key])

    @property
    def point(self) -> dict[str, Any]:
        return {"repetitions": self.count, "different": self.different, "tensors": self.tensors}
