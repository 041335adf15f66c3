"""What a session puts into a model beside its own parameters, such as adapters."""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import nn

from ratel.models.checkpoints.weights import WeightSource
from ratel.planner.shape import UnitSpec


class Additions(Protocol):
    """Modules that take the places of a model's own while a session has it. The model's parameters
    keep their names and stay the same objects; new ones come beside them."""

    names: Collection[str]
    """The names of the new parameters. They are trained in fp32 and stay on the GPU, in units of
    their own."""

    def put_on(self, root: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
        """Put them into a model whose parameters are placeholders, and say by ``requires_grad``
        which of all parameters are trained. Raises RatelError for a model that cannot have them,
        which is as it was then."""

    def take_off(self) -> None:
        """Put the model's own modules back; nothing where there are none to put back."""

    def laid_out(self, units: Sequence[UnitSpec], used: Collection[str]) -> None:
        """Once it is known which units all parameters are in, those that no stage uses included.
        ``used``: the names of those that a forward of the model reads. Raises RatelError for a model that does not use what was put into it."""

    def source(self, base: WeightSource) -> WeightSource:
        """Where all weights come from, given where the model's own do."""

    def begin(self, block: nn.Module | None, step: int, first_row: int) -> None:
        """Before a run of a block, or of what is around the blocks (None), also before its second
        run. ``first_row``: of the micro-batch, among the rows of the step as its linears see
        them."""
