"""An adapter on the model of a session: put on before the model is taken apart, given its values as
weights are brought in, taken off when the session ends."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.lora.compute import Draws, adapt_layers
from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.layers import PREFIX, AdaptedLayer
from ratel.lora.describe.mistakes import refuse_mistakes
from ratel.lora.describe.outline import EMBEDDING, outline_of
from ratel.lora.describe.targets import Targets, resolve, with_dropout
from ratel.lora.files import StoredAdapter, named, read_adapter, tensors_of
from ratel.lora.request import AdapterRequest
from ratel.lora.values.converted import converted_targets, converted_tensors
from ratel.lora.values.fingerprint import fingerprint_of_units
from ratel.lora.values.initial import LayerTensors, initial, needs_weight, residual
from ratel.models.checkpoints.weights import WeightSource, WithFreshHead, view
from ratel.models.safetensors.stored_bits import StoredBits
from ratel.models.structure.skeleton import owners, placeholder
from ratel.planner.shape import ParamSpec, UnitSpec
from ratel.schema import shown


class Adaptation:
    """One adapter for one session. ``seed``: of what a new one begins with, and of dropout.
    ``dtype``: what the model computes in.

    What `ratel.models.load` takes as ``additions``.
    """

    def __init__(self, request: AdapterRequest, *, seed: int, dtype: torch.dtype) -> None:
        self._config, self._directory, self._graph = request.config, request.directory, request.graph
        self._is_new, self._field, self._seed, self._dtype = request.is_new, request.field, seed, dtype
        self._blocks: dict[int, Draws] = {}
        self._around = Draws(seed)
        self._replaced: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        """Parent, name, the model's own module, and what is in its place."""
        self._begun: dict[str, LayerTensors] = {}
        self._units: Sequence[UnitSpec] = ()
        self._fingerprint: str | None = None
        self.stored: StoredAdapter | None = None
        self.base: WeightSource | None = None
        """Where the weights of the model without the adapter come from."""
        self.names: dict[str, str] = {}
        """By parameter of the model: the tensor's name in the adapter's file."""

    targets: Targets

    @property
    def reads_base(self) -> bool:
        return self.stored is None and any(needs_weight(layer, self._config) for layer in self.targets.layers)

    @property
    def config(self) -> LoraConfig:
        """What was asked for; of an adapter that is gone on with, what its directory says."""
        return self._config

    # --- as additions to a model --------------------------------------------------------------------------------

    def put_on(self, root: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
        outline = outline_of(root)
        if self._directory is not None:
            stored = read_adapter(self._directory, outline, field=self._field)
            self.stored, self.targets = stored, with_dropout(stored.targets, self._config.dropout)
        else:
            self.targets = resolve(self._config, outline)
            if self._is_new:
                refuse_mistakes(self.targets)
        full = {name for module in self.targets.full for name in module.parameters}
        _refuse_one_end(root, full, self._config)
        trained = {id(parameter) for name, parameter in root.named_parameters(remove_duplicate=False) if name in full}
        for parameter in root.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        paths = {name: module for name, module in root.named_modules() if any(module is block for block in blocks)}
        own = dict(root.named_modules())
        for block, layers in _by_block(self.targets.layers, paths).items():
            draws = self._around if block is None else self._blocks.setdefault(id(paths[block]), Draws(self._seed))
            self._put(root, own, layers, draws, block or "", device)
        for draws in (self._around, *self._blocks.values()):
            draws.begin(0)  # whoever tries a block out has no step

    def _put(self, root: nn.Module, own: dict[str, nn.Module], layers: list[AdaptedLayer], draws: Draws, stage: str,
             device: torch.device) -> None:
        tensors = {name: placeholder(layer.file_shapes[stored], torch.float32, device)
                   for layer in layers if layer.tied_to is None for name, stored in layer.added.items()}
        # The model's own parents: what stands in one's place by now has its children in a dictionary of its own.
        split = {layer.name: layer.name.rpartition(".") for layer in layers}
        places = {name: (own[parent], child) for name, (parent, _, child) in split.items()}
        try:
            made = adapt_layers(root, layers, tensors, draws=draws, stage=stage, graph=self._graph)
        except BaseException:  # some may have been put on
            for name, (parent, child) in places.items():
                parent._modules[child] = own[name]
            raise
        for name, module in {layer.name: made[layer.key] for layer in layers}.items():
            self._replaced.append((*places[name], own[name], module))
        self.names |= {name: stored for layer in layers if layer.tied_to is None for name, stored in layer.added.items()}

    def take_off(self) -> None:
        self._put_own_back()
        self._replaced = []

    def _put_own_back(self) -> None:
        for parent, child, module, _ in reversed(self._replaced):
            parent._modules[child] = module

    @contextmanager
    def _off(self) -> Iterator[None]:
        """The model's own modules are in their places inside: whoever initialises a model knows
        them."""
        self._put_own_back()
        try:
            yield
        finally:
            for parent, child, _, adapted in self._replaced:
                parent._modules[child] = adapted

    def begin(self, block: nn.Module | None, step: int, first_row: int) -> None:
        draws = self._around if block is None else self._blocks.get(id(block))
        if draws is not None:
            draws.begin(step, first_row)

    def laid_out(self, units: Sequence[UnitSpec], used: Collection[str]) -> None:
        """PyTorch's attention, for one, reads the weight of a linear and never calls it."""
        self._units = units
        for layer in self.targets.layers:
            if layer.weight in used and not any(name in used for name in layer.added) and layer.tied_to is None:
                raise RatelError("would not be trained: its weight is read past it, by the module that it is in", field=self._config.words["targets"],
                                 value=layer.key, remedy="Leave it out of the targets")

    def source(self, base: WeightSource) -> WeightSource:
        self.base = base
        return _WithAdapter(self)

    def fingerprint(self) -> str:
        """The name of the model by content, without the adapter. Every weight is read, once."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of_units(self._units, self.read_base)
        return self._fingerprint

    def check_base(self) -> None:
        """Refuse a model that the adapter that is gone on with was not made for, where it names its
        own; and one with a new head that nothing would train."""
        self._check_head()
        named = self.stored.base if self.stored is not None else None
        if named is not None and named != self.fingerprint():
            raise RatelError(f"was made for another base: its base has the fingerprint {named[:23]}..., this model {self.fingerprint()[:23]}...",
                             field=self._field, value=self._directory, remedy="Give the model that it was trained on")

    def _check_head(self) -> None:
        new = self.base.absent if isinstance(self.base, WithFreshHead) else frozenset()
        frozen = sorted(new - {name for module in self.targets.full for name in module.parameters} - self.names.keys())
        if frozen:
            module = frozen[0].rpartition(".")[0]
            raise RatelError(f"leaves out {module}, which is not in the checkpoint: it would keep the random numbers it begins with",
                             field=self._config.words["full"], value=shown(list(self._config.full)),
                             remedy=f"Add {module}, to train it as a whole and store it with the adapter, as peft does")

    # --- values -------------------------------------------------------------------------------------------------

    def read_base(self, unit: UnitSpec, out: Tensor) -> UnitSpec:
        """Write what the model has of a unit's parameters without the adapter; returns the unit
        with these alone."""
        own = replace(unit, params=tuple(param for param in unit.params if param.name not in self.names))
        if own.params:
            with self._off():
                self.base.read(own, out)
        return own

    def beginnings(self, layer: AdaptedLayer) -> LayerTensors:
        """What a new adapter's layer begins with. Those that begin with something of the base read
        its unit, once for all layers there."""
        if layer.key not in self._begun:
            if needs_weight(layer, self._config):
                self._begin_unit(next(u for u in self._units if any(layer.weight in (p.name, *p.aliases) for p in u.params)))
            else:
                self._begun[layer.key] = initial(layer, self._config, self._seed)
        return self._begun[layer.key]

    def _begin_unit(self, unit: UnitSpec) -> None:
        flat = torch.zeros(unit.num_elements)
        for param in self.read_base(unit, flat).params:
            self.begin_on(param, view(flat, param))

    def begin_on(self, param: ParamSpec, weight: Tensor) -> None:
        """``weight``: as the model has it, in fp32."""
        for layer in self._on(param):
            if layer.key not in self._begun and needs_weight(layer, self._config):
                self._begun[layer.key] = initial(layer, self._config, self._seed, weight.to(self._dtype))

    def trained_on(self, param: ParamSpec, weight: Tensor) -> Tensor:
        """What the parameter is in training, of what it is in the model: pissa and olora take out
        what the adapter begins with, and a module that is trained as a whole goes on where the
        adapter has it."""
        stored = self.stored.tensors if self.stored is not None else {}
        for name in (param.name, *param.aliases):
            if f"{PREFIX}{name}" in stored:
                return stored[f"{PREFIX}{name}"]
        if self.stored is None and self._config.changes_base:
            self.begin_on(param, weight)
            for layer in self._on(param):
                begun = self._begun[layer.key]
                weight = residual(layer, weight.to(self._dtype), begun.a, begun.b).float()
        return weight

    def changes(self, param: ParamSpec) -> bool:
        """Whether a parameter of the model is another one in training, or is looked at before it."""
        names = {f"{PREFIX}{name}" for name in (param.name, *param.aliases)}
        is_stored = self.stored is not None and not names.isdisjoint([*self.stored.tensors, *(PREFIX + name for name in self.stored.base_copies)])
        return is_stored or param.name in self.names or (self._config.changes_base and bool(self._on(param)))

    def value(self, name: str) -> Tensor:
        """A new parameter's first value, by its name in the model."""
        if self.stored is not None:
            return self.stored.tensors[self.names[name]]
        layer = self._layer_of[self.names[name]]
        return named(layer, self.beginnings(layer))[self.names[name]]

    def trained(self, units: Sequence[UnitSpec], read: Callable[[UnitSpec], Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors by their names in its file, fp32, without those of tied layers.
        ``read`` gives the fp32 weights of a unit, 1-D in its layout."""
        full = {name for module in self.targets.full if module.tied_to is None for name in module.parameters}
        unused = [(unit, self._begun_unit) for unit in self._units if unit.index < 0]  # stored as it began, as peft stores it
        found = {}
        for unit, read_unit in [*((unit, read) for unit in units), *unused]:
            wanted = {param: name for param in unit.params if (name := self._name_in_file(param, full)) is not None}
            flat = read_unit(unit) if wanted else None
            found |= {name: view(flat, param).clone() for param, name in wanted.items()}
        return found

    def _begun_unit(self, unit: UnitSpec) -> Tensor:
        flat = torch.zeros(unit.num_elements)
        _WithAdapter(self).read(unit, flat)
        return flat

    def _name_in_file(self, param: ParamSpec, full: set[str]) -> str | None:
        if param.name in self.names:
            return self.names[param.name]
        return next((PREFIX + name for name in (param.name, *param.aliases) if name in full), None)

    def for_base_as_stored(self, tensors: dict[str, Tensor]) -> tuple[Targets, dict[str, Tensor]]:
        """The adapter that gives what was trained with the model as it is stored: of pissa and
        olora another one than what was trained (`ratel.lora.values.converted`)."""
        if self.stored is not None or not self._config.changes_base:
            return self.targets, tensors
        targets, made = converted_targets(self.targets), dict(tensors)
        for before, layer in zip(self.targets.layers, targets.layers, strict=True):
            if before.tied_to is None:
                made |= named(layer, converted_tensors(layer, tensors_of(before, self.targets, tensors), self._first_part(before)))
        return targets, made

    def _first_part(self, layer: AdaptedLayer) -> LayerTensors:
        """What was taken out of the layer's weight: nothing of an embedding."""
        begun = self.beginnings(layer)
        return begun if layer.kind != EMBEDDING else LayerTensors(a=torch.zeros_like(begun.a), b=torch.zeros_like(begun.b))

    def refuse_other_copies(self, param: ParamSpec, weight: Tensor) -> None:
        """An adapter of peft's may hold parameters of its base, which must be those that are
        loaded."""
        copies = self.stored.base_copies if self.stored is not None else {}
        for name in (name for name in (param.name, *param.aliases) if name in copies):
            if not torch.equal(weight.to(copies[name].dtype), copies[name]):
                raise RatelError(f"was made for another base: {name}, of which it has a copy, is not the same", field=self._field,
                                 value=self._directory, remedy="Give the model that it was trained on")

    @cached_property
    def _layer_of(self) -> dict[str, AdaptedLayer]:
        return {name: layer for layer in self.targets.layers if layer.tied_to is None for name in layer.file_shapes}

    def _on(self, param: ParamSpec) -> list[AdaptedLayer]:
        return [self.targets.by_weight[name] for name in (param.name, *param.aliases) if name in self.targets.by_weight]


class _WithAdapter:
    """Weights of a model and of its adapter."""

    def __init__(self, adaptation: Adaptation) -> None:
        self._adaptation = adaptation

    @property
    def element_bytes(self) -> int:
        """What an adapter begins with may be taken from a unit that is read beside."""
        return self._adaptation.base.element_bytes + 4 * self._adaptation.reads_base

    def check(self, params: Iterable[ParamSpec]) -> None:
        self._adaptation.base.check([param for param in params if param.name not in self._adaptation.names])

    def read(self, unit: UnitSpec, out: Tensor) -> None:
        own = self._adaptation.read_base(unit, out)
        for param in own.params:
            weight = view(out, param)
            self._adaptation.refuse_other_copies(param, weight)
            trained = self._adaptation.trained_on(param, weight)
            if trained is not weight:
                weight.copy_(trained)
        for param in unit.params:
            if param.name in self._adaptation.names:
                view(out, param).copy_(self._adaptation.value(param.name))

    def stored_bits(self, unit: UnitSpec) -> StoredBits | None:
        return None if any(map(self._adaptation.changes, unit.params)) else self._adaptation.base.stored_bits(unit)


def _by_block(layers: Iterable[AdaptedLayer], blocks: Iterable[str]) -> dict[str | None, list[AdaptedLayer]]:
    """By the name of the block that they are in; None: in none."""
    found: dict[str | None, list[AdaptedLayer]] = {}
    for layer in layers:
        inside = next((block for block in blocks if f"{layer.name}.".startswith(f"{block}.")), None)
        found.setdefault(inside, []).append(layer)
    return found


def _refuse_one_end(root: nn.Module, full: set[str], config: LoraConfig) -> None:
    """What is one parameter is trained as one."""
    for places in owners(root).values():
        names = [name for _, _, name in places]
        trained = [name for name in names if name in full]
        if trained and len(names) > 1 and not config.tied:
            raise RatelError(f"is one parameter with {next(name for name in names if name != trained[0])}, and would become another one",
                             field=config.words["full"], value=trained[0],
                             remedy=f"Say {config.words['tied']}, which keeps them one, or leave it out")
