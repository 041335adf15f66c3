"""Which base an adapter was trained on, by content: one SHA-256 over names, shapes and values of
all parameters.

Values are taken as bf16 (ties to even), so that a checkpoint has one fingerprint in fp32 and in
bf16, in however many files it lies. Each parameter has a digest of its own first: they can be made
in any order and on any thread, as weights come in.
"""

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256

import torch
from torch import Tensor

from ratel.models import Parts
from ratel.models.checkpoints.weights import view
from ratel.planner.shape import UnitSpec

_PIECE_ELEMENTS = 1 << 22


def digest_of(shape: Iterable[int], pieces: Iterable[Tensor]) -> str:
    """The digest of one parameter, from its values in their order, in pieces of any length."""
    found = sha256(f"{list(shape)}".encode())
    for piece in pieces:
        flat = piece.detach().reshape(-1)
        for begin in range(0, flat.numel(), _PIECE_ELEMENTS):
            part = flat[begin:begin + _PIECE_ELEMENTS].to(device="cpu", dtype=torch.bfloat16).contiguous()
            found.update(memoryview(part.view(torch.uint8).numpy()))
    return found.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """``digests``: of all parameters by name; one that is in the model twice, under its first
    name."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return f"sha256:{sha256(''.join(lines).encode()).hexdigest()}"


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    return fingerprint({name: digest_of(values.shape, [values]) for name, values in parameters})


def base_fingerprint(parts: Parts) -> str:
    """A model's, from where its weights come from."""

    def read(unit: UnitSpec, out: Tensor) -> UnitSpec:
        parts.stored.read_unit(unit, out)
        return unit

    return fingerprint_of_units([*parts.spec.units, *([parts.unused] if parts.unused is not None else [])], read)


def fingerprint_of_units(units: Iterable[UnitSpec], read: Callable[[UnitSpec, Tensor], UnitSpec]) -> str:
    """``read`` writes a unit's weights into zeros (fp32, 1-D in its layout), and returns the unit
    with the parameters that count. Every weight is read once, and one unit is in memory at a
    time."""
    digests: dict[str, str] = {}
    for unit in units:
        flat = torch.zeros(unit.num_elements)
        digests |= {param.name: digest_of(param.shape, [view(flat, param)]) for param in read(unit, flat).params}
    return fingerprint(digests)
