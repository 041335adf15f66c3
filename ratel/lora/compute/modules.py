"""Adapted linears in the place of a model's own, under the names that those have.

Siblings that read one tensor (queries, keys and values; gate and up) are computed together when the
first of them is called, so that the tensor is read once; what the others return lies ready for
them. One that is called with something else is computed for itself.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.lora.compute.function import Adapter, Frozen, adapted_linears
from ratel.lora.compute.masks import Dropout, mask_key

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"),
          ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Names of siblings that are given the same tensor in the models that have them."""


class Draws:
    """Where in a run the linears of a block are. Whoever runs the block begins before it, and
    before its second run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._takers: list[tuple[AdaptedLinear | SharedInput, str, tuple[str, ...]]] = []
        """With the stage and the names of its linears: linears themselves do not know them, so that
        blocks that are alike are equal."""

    def add(self, taker: "AdaptedLinear | SharedInput", stage: str, names: tuple[str, ...]) -> None:
        """``names``: of the taker's linears, in the stage."""
        if taker.members[0].p:
            self._takers.append((taker, stage, names))

    def begin(self, step: int, first_row: int = 0) -> None:
        """``first_row``: of the micro-batch, among all rows (tokens) of the step."""
        for taker, stage, names in self._takers:
            taker.dropout = Dropout.of(taker.members[0].p, [mask_key(self.seed, step, stage, name) for name in names], first_row)


class AdaptedLinear(nn.Module):
    """A linear with an adapter. ``weight`` and ``bias`` are the base's own parameters under their
    own names; ``lora_A`` and ``lora_B`` come beside them. Dropout, of probability ``p``, is on in
    training mode."""

    def __init__(self, base: nn.Module, adapter: Adapter, *, p: float, graph: str = "auto") -> None:
        super().__init__()
        self.is_transposed = not isinstance(base, nn.Linear)
        self.weight, self.bias = base.weight, base.bias
        self.out_features, self.in_features = self.weight.shape[::-1] if self.is_transposed else self.weight.shape
        self.lora_A, self.lora_B = _parameter(adapter.a), _parameter(adapter.b)
        self.scale, self.p, self.graph = adapter.scale, p, graph
        self.dropout: Dropout | None = None
        self.shared: SharedInput | None = None
        self.train(base.training)

    @property
    def base(self) -> Frozen:
        return Frozen(weight=self.weight.t() if self.is_transposed else self.weight, bias=self.bias)

    @property
    def adapter(self) -> Adapter:
        return Adapter(a=self.lora_A, b=self.lora_B, scale=self.scale)

    @property
    def members(self) -> list["AdaptedLinear"]:
        return [self]

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is None or torch.compiler.is_compiling():
            return compute(self, x)[0]
        return self.shared.output(self, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.adapter.rank}, scale={self.scale}"


class SharedInput:
    """Linears that are given the same tensor."""

    def __init__(self, members: list[AdaptedLinear]) -> None:
        self.members = members
        self.dropout: Dropout | None = None
        self._given: tuple[Any, ...] | None = None
        self._ready: dict[int, Tensor] = {}

    def output(self, member: AdaptedLinear, x: Tensor) -> Tensor:
        index = next(n for n, one in enumerate(self.members) if one is member)
        if not self._is_given(x) or index not in self._ready:
            self._given, self._ready = self._state(x), dict(enumerate(compute(self, x)))
        y = self._ready.pop(index)
        if not self._ready:
            self._given = None
        return y

    def _is_given(self, x: Tensor) -> bool:
        """The same tensor with the same content, in the same place of the run: what lies ready was
        made of that."""
        if self._given is None or self._given[0] is not x or self._given[1] is not self.dropout:
            return False
        return self._given[2:] == self._state(x)[2:]

    def _state(self, x: Tensor) -> tuple[Any, ...]:
        first = self.members[0]
        version = None if x.is_inference() else x._version
        weights = tuple(one.lora_A._version for one in self.members)
        return x, self.dropout, version, torch.is_grad_enabled(), first.training, weights

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedInput":
        from copy import deepcopy

        copied = SharedInput([])
        memo[id(self)] = copied
        copied.members, copied.dropout = deepcopy(self.members, memo), self.dropout
        return copied


def compute(taker: AdaptedLinear | SharedInput, x: Tensor) -> tuple[Tensor, ...]:
    bases, adapters = zip(*((one.base, one.adapter) for one in taker.members), strict=True)
    return adapted_linears(x, bases, adapters, dropout_of(taker), taker.members[0].graph)


def dropout_of(taker: AdaptedLinear | SharedInput) -> Dropout | None:
    """What the next run of it drops."""
    first = taker.members[0]
    dropout = taker.dropout if first.training and first.p else None
    assert dropout is not None or not (first.training and first.p), "Draws.begin comes before a run that drops"
    return dropout


def stand_in(module: nn.Module, derived: type[nn.Module]) -> nn.Module:
    """A module of a class derived from another's, with its parameters, buffers, submodules, hooks
    and attributes. What is put into either afterwards is in that one alone."""
    found = object.__new__(derived)
    own = vars(nn.Module())
    found.__dict__.update({name: copy(value) if name in own else value for name, value in vars(module).items()})
    return found


def adapt(root: nn.Module, adapters: Mapping[str, Adapter], *, draws: Draws, stage: str = "", dropout: float = 0.0,
          graph: str = "auto", shared: Iterable[tuple[str, ...]] = SHARED) -> dict[str, AdaptedLinear]:
    """Put adapters on the linears of ``root`` that have these names; the base's parameters are
    frozen. Returns them by name.

    Raises RatelError for a module that is no linear, and for an adapter whose shape is another
    layer's.
    """
    made = {name: AdaptedLinear(_checked(root, name, adapter), adapter, p=dropout, graph=graph)
            for name, adapter in adapters.items()}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, module)
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
    for names in shared:
        for parent in {name.rpartition(".")[0] for name in made}:
            members = {full: made[full] for child in names if (full := f"{parent}.{child}".lstrip(".")) in made}
            first = next(iter(members.values()), None)
            alike = {full: one for full, one in members.items() if one.lora_A.shape == first.lora_A.shape}
            if len(alike) > 1:
                draws.add(_shared(list(alike.values())), stage, tuple(alike))
    for name, one in made.items():
        draws.add(one, stage, (name,))
    return made


def _parameter(tensor: Tensor) -> nn.Parameter:
    """One that is another module's, too, stays one."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _shared(members: list[AdaptedLinear]) -> SharedInput:
    group = SharedInput(members)
    for one in members:
        one.shared = group
    return group


def _checked(root: nn.Module, name: str, adapter: Adapter) -> nn.Module:
    base = root.get_submodule(name)
    if not isinstance(base, nn.Linear) and type(base).__name__ != "Conv1D":
        raise RatelError(f"an adapter of two matrices cannot be put on a {type(base).__name__}", field="targets", value=name,
                         remedy="Name linear layers")
    inputs, outputs = base.weight.shape if type(base).__name__ == "Conv1D" else base.weight.shape[::-1]
    expected = (adapter.rank, inputs), (outputs, adapter.rank)
    found = tuple(adapter.a.shape), tuple(adapter.b.shape)
    if found != expected:
        raise RatelError(f"an adapter for {outputs} x {inputs} has A and B of the shapes {expected[0]} and {expected[1]}, not {found[0]} "
                         f"and {found[1]}", field="adapter", value=name, remedy="Use an adapter that was made for this model")
    return base
