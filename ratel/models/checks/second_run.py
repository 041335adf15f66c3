"""Is a second run of a block what the first was? Tried on random values before planning, and on
real ones in the first step."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ratel.errors import RatelError
from ratel.models.structure.given import (changed_argument, changed_names, content_of, named_arguments, picture, refuse_changing,
                                          state_of)
from ratel.models.structure.inputs import BlockInputs

if TYPE_CHECKING:
    from ratel.models.parts import Parts

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative, of a token. With a graph another kernel may run than without one, and some add up in
any order."""
SAMPLED_TOKENS = 16


def refuse_unlike_runs(parts: "Parts", block: int, hidden: Tensor, inputs: BlockInputs, seed: Callable[[], None]) -> None:
    """Run the block as forward does, twice, and as backward does. Raises RatelError where runs
    differ, or where one leaves something behind that the next would meet. ``seed`` sets the random
    generators, always to the same state."""
    module, call = parts.blocks[block], parts.call_of(block, hidden, inputs)
    arguments = named_arguments(module, call.args, call.kwargs)
    before = {name: picture(value, content_of) for name, value in arguments.items()}
    outputs, states = [], []
    for run in (_without_graph, _without_graph, with_graph_dropped):
        seed()
        outputs.append(run(lambda: parts.block(block, hidden, inputs)).detach())
        states.append(state_of(module))
    for name, value in arguments.items():
        if picture(value, content_of) != before[name]:
            raise changed_argument(module, name, value)
    refuse_changing(states[0], states[1], module, "a block changes it every time that it runs")
    for output in outputs[1:]:
        if are_unlike(outputs[0], output):
            raise unlike_runs(block, module)


def unlike_runs(block: int, module: nn.Module) -> RatelError:
    return RatelError(f"block {block} did something else when it was run again for backward than in forward (another output for "
                      "the same arguments): its gradient would be wrong", field="model", value=type(module).__name__,
                      remedy="Make its forward depend on its arguments and weights alone")


def _without_graph(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


def with_graph_dropped(run: Callable[[], Tensor]) -> Tensor:
    """Run a block as in backward, but in no more memory than forward takes."""
    with torch.enable_grad(), saved_tensors_hooks(lambda tensor: None, lambda packed: packed):
        return run().detach()


def are_unlike(first: Tensor, second: Tensor) -> bool:
    """Whether most tokens differ by more than rounding. A few may: a router that is in doubt sends
    them elsewhere."""
    if first.shape != second.shape:
        return True
    if torch.equal(first, second):
        return False
    limit = ROUNDING.get(first.dtype, 5e-2)
    first, second = (x.flatten(0, -2).float() if x.dim() > 1 else x.float()[None] for x in (first, second))
    errors = (first - second).norm(dim=-1) / first.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    errors = errors[errors.isfinite()]  # random values may be too large for a block
    return bool(errors.numel()) and float(errors.median()) > limit


class FirstStep:
    """A few tokens of what every block made in forward of the first micro-batch, to be compared
    with its second run."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}
        self._numbers: dict[str, Any] | None = None

    def note_head(self, blocks: Sequence[nn.Module]) -> None:
        """After the stage before the blocks, of each micro-batch. Raises RatelError if it leaves
        another number in them for each: all blocks run after the last."""
        numbers = {".".join(part for part in (str(number), path, name) if part): value
                   for number, block in enumerate(blocks) for path, child in block.named_modules()
                   for name, value in vars(child).items() if isinstance(value, (int, float, str))}
        changed = changed_names(self._numbers, numbers) if self._numbers is not None else []
        if changed:
            raise RatelError("what comes before the blocks leaves in them a number that depends on the batch, and micro-batches "
                             "pass a block one after the other", field="model", value=f"blocks {changed[0]}",
                             remedy="Hand it to the blocks as an argument")
        self._numbers = numbers

    def note(self, block: int, output: Tensor) -> None:
        self._made[block] = _sample(output)

    def compare(self, block: int, module: nn.Module, run: Callable[[], Tensor]) -> None:
        """Raises RatelError if ``run`` makes something else."""
        if are_unlike(self._made.pop(block), _sample(with_graph_dropped(run))):
            raise unlike_runs(block, module)


def _sample(output: Tensor) -> Tensor:
    tokens = output.detach().flatten(0, -2) if output.dim() > 1 else output.detach()[None]
    return tokens[::max(1, tokens.shape[0] // SAMPLED_TOKENS)][:SAMPLED_TOKENS].clone()
