"""The auxiliary loss of routers, which keeps experts in use alike, for a model that runs one block
at a time.

With T tokens per expert and P probabilities per expert, both summed over all tokens of all layers,
and R tokens of all layers, it is ``coefficient * experts * sum(T / R * P / R)`` (equations 4 to 6
of https://arxiv.org/abs/2101.03961, as transformers computes it over all layers together). T has no
gradient. So the first run of the blocks counts, and in the second one every token's probabilities
of a layer have the same gradient, ``coefficient * experts * T / R**2``. T are whole numbers: how
the rows of a step are cut into micro-batches changes nothing.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError

log = logging.getLogger(__name__)

_FUNCTION = "load_balancing_loss_func"
"""What transformers' classes call with the logits of all routers."""


@dataclass(frozen=True, kw_only=True)
class RouterLoss:
    """``places``: the modules that give router logits, and which of their outputs (None: the only
    one)."""

    coefficient: float
    num_experts: int
    top_k: int
    places: tuple[tuple[nn.Module, int | None], ...]


class Routing:
    """Collects the probabilities that the routers of a block give their experts, run by run."""

    def __init__(self, loss: RouterLoss) -> None:
        self.loss = loss
        self._found: list[Tensor] | None = None
        self._last: list[Tensor] = []
        self._hooks = [module.register_forward_hook(self._collector(index)) for module, index in loss.places]

    def _collector(self, index: int | None) -> Callable[[nn.Module, Any, Any], None]:
        def collect(module: nn.Module, args: Any, output: Any) -> None:
            if self._found is not None:
                logits = output if index is None else output[index]
                # Here, in the block: what is saved for its backward is then among what a second run
                # makes.
                self._found.append(logits.float().softmax(-1).flatten(0, -2))
        return collect

    @contextmanager
    def watching(self) -> Iterator[None]:
        """One run of a block. What comes before the blocks and after them is not looked at."""
        self._last = self._found = []
        try:
            yield
        finally:
            self._found = None

    def take(self) -> list[Tensor]:
        """``[tokens, experts]`` of each router of the block that ran last."""
        found, self._last = self._last, []
        return found

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Balance:
    """Sums over the tokens of a step, exact whatever their order."""

    def __init__(self, loss: RouterLoss, device: torch.device) -> None:
        self._loss = loss
        self._counts, self._sums = (torch.zeros(loss.num_experts, dtype=torch.float64, device=device) for _ in range(2))
        self._tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, probabilities: list[Tensor], shown: Tensor | None) -> None:
        """``shown`` ``[rows, positions]``: 0 for tokens that do not count; None: all do."""
        for each in probabilities:
            weight = torch.ones(len(each), device=each.device) if shown is None else (shown.reshape(-1) != 0).float()
            self._sums += (each.detach() * weight[:, None]).sum(0, dtype=torch.float64)
            self._tokens += weight.sum(dtype=torch.float64)
            experts = torch.arange(self._loss.num_experts, device=each.device)
            for chosen in each.detach().topk(self._loss.top_k, dim=-1).indices.unbind(-1):
                self._counts += ((chosen[:, None] == experts) * weight[:, None]).sum(0, dtype=torch.float64)

    def value(self) -> Tensor:
        return (self._gradient() * self._sums).sum().float()

    def gradients(self, probabilities: list[Tensor], shown: Tensor | None) -> list[Tensor]:
        """The gradient of the loss with respect to each of these."""
        gradient = self._gradient().float()
        weight = None if shown is None else (shown.reshape(-1, 1) != 0).float()
        return [gradient.expand_as(each) if weight is None else gradient * weight for each in probabilities]

    def _gradient(self) -> Tensor:
        return self._counts * (self._loss.coefficient * self._loss.num_experts) / self._tokens.square()


# -- what a class of transformers does ---------------------------------------------------------------------------------

def find_router_loss(module: nn.Module, batch: dict[str, Tensor], choice: "float | str") -> RouterLoss | None:
    """What the class's own forward adds to its loss for ``batch``; None where it adds nothing.
    ``choice``: ``auto`` takes it if the configuration has ``output_router_logits``, a number in any
    case, with that coefficient.

    Runs the model once: call it in outline. Raises RatelError where a number was asked for and
    there is nothing to add.
    """
    config = getattr(module, "config", None)
    if choice == "off" or choice == "auto" and not _says_so(config):
        return None
    forward_globals = inspect.unwrap(type(module).forward).__globals__
    if not callable(forward_globals.get(_FUNCTION)):
        if choice == "auto":
            return None
        raise _nothing_to_add(module, choice)
    watch = _Watch(module)
    more = {} if choice == "auto" else {"output_router_logits": True}  # unasked, as the class reads its configuration
    original = forward_globals[_FUNCTION]
    forward_globals[_FUNCTION] = watch
    try:
        with torch.enable_grad(), watch.outputs():
            loss = module(**batch, labels=batch["input_ids"], **more).loss
    finally:
        forward_globals[_FUNCTION] = original
    if watch.result is None or loss is None:
        if choice != "auto":
            raise _nothing_to_add(module, choice)
        log.warning("config.json asks for the loss of routers, but %s of this transformers adds none", type(module).__name__)
        return None
    own = torch.autograd.grad(loss, watch.result)[0]
    return watch.describe(float(own) if choice == "auto" else float(choice))


def _says_so(config: Any) -> bool:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(config, "output_router_logits", False) or getattr(text, "output_router_logits", False))


def _nothing_to_add(module: nn.Module, choice: Any) -> RatelError:
    return RatelError(f"transformers' {type(module).__name__} adds no auxiliary loss of routers", field="router_aux_loss",
                      value=choice, remedy="Use auto or off")


class _Watch:
    """Stands in for transformers' function: notes what it is given, and which modules that came
    from."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._sources: dict[int, tuple[nn.Module, int | None]] = {}
        self._kept: list[Tensor] = []
        """Tensors that are kept so that their ids stay unique."""
        self.result: Tensor | None = None

    def __call__(self, gate_logits: Any, num_experts: Any = None, top_k: int = 2, attention_mask: Any = None) -> Tensor:
        if not isinstance(gate_logits, (tuple, list)):  # transformers' function gives 0 then
            return torch.zeros(())
        self._logits, self._num_experts, self._top_k = tuple(gate_logits), int(num_experts), int(top_k)
        self.result = torch.zeros((), requires_grad=True, device=self._logits[0].device)
        return self.result

    @contextmanager
    def outputs(self) -> Iterator[None]:
        hooks = [m.register_forward_hook(self._note) for m in self._root.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        items = enumerate(output) if isinstance(output, (tuple, list)) else [(None, output)]
        for index, item in items:
            if isinstance(item, Tensor):
                self._kept.append(item)
                self._sources.setdefault(id(item), (module, index))  # the innermost one: it returns first

    def describe(self, coefficient: float) -> RouterLoss:
        if not all(id(logits) in self._sources for logits in self._logits):
            raise RatelError("its router logits are not what one of its modules returns, so their loss cannot be computed one "
                             "block at a time", field="router_aux_loss", value=type(self._root).__name__,
                             remedy="Use --router-aux-loss off")
        places = tuple(dict.fromkeys(self._sources[id(logits)] for logits in self._logits))
        return RouterLoss(coefficient=coefficient, num_experts=self._num_experts, top_k=self._top_k, places=places)
