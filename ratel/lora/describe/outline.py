"""What of a model adapters have to know: its modules with their names, kinds and shapes. No weights
are needed: a skeleton does."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ratel.errors import RatelError

CLASSIFIERS = ("score", "classifier")
"""What the output layer of a classifier is called."""
LINEAR, CONV1D, EMBEDDING, OTHER = "linear", "conv1d", "embedding", "other"


@dataclass(frozen=True, kw_only=True)
class ModuleOutline:
    """One module, under the first of its names. ``parameters``: its own ones, in their order, with
    shapes."""

    name: str
    kind: str
    parameters: dict[str, tuple[int, ...]]
    keeps_outputs_last: bool = False
    """Whether the matrices of fused experts are stored [in, out]."""

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class ModelOutline:
    """All modules, in the model's order. ``aliases``: further names of modules that are in it more
    than once."""

    modules: tuple[ModuleOutline, ...]
    aliases: dict[str, str]
    model_type: str | None = None
    embedding: str | None = None
    head: str | None = None
    """The output layer."""
    tied: tuple[str, ...] = ()
    """Modules whose weight is the embedding's."""

    @cached_property
    def by_name(self) -> dict[str, ModuleOutline]:
        return {module.name: module for module in self.modules}

    def parameters_in(self, name: str) -> dict[str, tuple[int, ...]]:
        """All parameters of a module and of those in it, by their full names."""
        return {f"{module.name}.{parameter}": shape for module in self.modules
                if module.name == name or module.name.startswith(f"{name}.") for parameter, shape in module.parameters.items()}


def outline_of(model: nn.Module) -> ModelOutline:
    """Raises RatelError for a model whose linear layers are quantised."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), name) != name:
            aliases[name] = first[id(module)]
    modules = tuple(_outline(name, module) for name, module in model.named_modules())
    embedding, head = (_called(model, get) for get in ("get_input_embeddings", "get_output_embeddings"))
    if head is None:
        head = next((module for name in CLASSIFIERS if isinstance(module := getattr(model, name, None), nn.Module)), None)
    return ModelOutline(modules=modules, aliases=aliases, model_type=getattr(getattr(model, "config", None), "model_type", None),
                        embedding=first.get(id(embedding)), head=first.get(id(head)), tied=tuple(_tied_with(model, embedding)))


def _outline(name: str, module: nn.Module) -> ModuleOutline:
    kind = _kind(module)
    own = {attribute: tuple(parameter.shape) for attribute, parameter in module.named_parameters(recurse=False)}
    weight = module._parameters.get("weight")
    if kind != OTHER and weight is not None and not weight.dtype.is_floating_point:
        raise RatelError(f"has quantised weights ({name} is {weight.dtype})", field="model", value=type(module).__name__,
                         remedy="Use the model as it was before quantisation")
    return ModuleOutline(name=name, kind=kind, parameters=own, keeps_outputs_last=bool(getattr(module, "is_transposed", False)))


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, nn.Linear):
        return LINEAR
    classes = [(cls.__module__, cls.__name__) for cls in type(module).__mro__]
    return CONV1D if ("transformers.pytorch_utils", "Conv1D") in classes else OTHER


def _called(model: nn.Module, name: str) -> nn.Module | None:
    """What a model of transformers says of itself; other modules do not."""
    get = getattr(model, name, None)
    try:
        return get() if callable(get) else None
    except (NotImplementedError, AttributeError, TypeError):
        return None


def _tied_with(model: nn.Module, embedding: nn.Module | None) -> Iterator[str]:
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor):
        yield from (name for name, module in model.named_modules()
                    if module is not embedding and module._parameters.get("weight") is weight)
