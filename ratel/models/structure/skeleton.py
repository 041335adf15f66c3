"""Modules without parameter memory.

A skeleton is the model's own module with every parameter replaced by a placeholder: one zero
element expanded to the parameter's shape. A module of any size then takes no memory, and still
runs.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ratel.errors import RatelError


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside keep their buffers and lose the memory of their parameters as each one
    is registered.

    Unlike ``torch.device("meta")`` the constructor runs on real tensors, so that buffers it
    computes (rotary frequencies, scales) come out exactly as always. One parameter at a time
    exists, and `torch.empty` is not touched.
    """
    original = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":  # tied later: already on meta, must stay one object
            meta = torch.empty_like(param, device="meta")
            param = nn.Parameter(meta, requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register_parameter
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def placeholder(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zero of that shape in one element of memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def owners(root: nn.Module) -> dict[int, list[tuple[nn.Module, str, str]]]:
    """Every name a parameter has: id -> [(module, attribute, full name)], in the module's order."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in root.named_modules(remove_duplicate=False):
        for attribute, param in module._parameters.items():
            if param is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(id(param), []).append((module, attribute, name))
    return places


_SKELETONS: WeakSet[nn.Module] = WeakSet()
"""Modules whose weights are with a session."""


def _with_state(root: nn.Module) -> list[nn.Module]:
    """Modules with parameters or buffers of their own. Others (an activation) may be one object for
    all models of a class."""
    return [module for module in root.modules() if module._parameters or module._buffers]


class Originals:
    """What a module held before it became a skeleton: weights on the CPU, and how to put them
    back."""

    def __init__(self, root: nn.Module) -> None:
        if not _SKELETONS.isdisjoint(_with_state(root)):
            raise RatelError("is in another session, which is not closed", field="model", value=type(root).__name__,
                             remedy="Close that session first; if nothing refers to it any more, load the model anew")
        self._root = root
        self.tensors: dict[str, Tensor] = {}
        """The parameters by first name; on the meta device if the module came without weights."""
        self._devices: dict[str, torch.device] = {}
        self._trainable: dict[str, bool] = {}
        self._buffers = [(m, name, buffer) for m in root.modules() for name, buffer in m._buffers.items()]
        self.buffers = dict(root.named_buffers())
        self._training = [(m, m.training) for m in root.modules()]
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        params = {id(p): p for p in root.parameters()}
        for key, places in owners(root).items():
            name, param = places[0][2], params[key]
            self._places += [(module, attribute, param) for module, attribute, _ in places]
            self._devices[name], self._trainable[name] = param.device, param.requires_grad
            # Weights on the GPU would take from the budget there.
            self.tensors[name] = param.data if param.device.type == "meta" else param.data.cpu()
        _SKELETONS.update(_with_state(root))

    @property
    def has_weights(self) -> bool:
        return all(tensor.device.type != "meta" for tensor in self.tensors.values())

    def put_back(self) -> None:
        """The module's own Parameter objects and buffers again, on their first devices."""
        _SKELETONS.difference_update(_with_state(self._root))
        for module, attribute, param in self._places:
            module._parameters[attribute] = param
        for name, param in self._root.named_parameters():
            param.grad = None
            param.requires_grad_(self._trainable[name])
            if param.device.type != "meta":
                param.data = self.tensors[name].to(self._devices[name])
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        for module, training in self._training:
            module.training = training


def strip_parameters(root: nn.Module, dtype: torch.dtype, device: torch.device, kept: Collection[str] = ()) -> None:
    """Turn every parameter into a placeholder, of fp32 if one of its names is among ``kept``.

    The Parameter objects stay the same where torch allows it, so that whatever else refers to them
    still does.
    """
    params = {id(p): p for p in root.parameters()}
    for key, places in owners(root).items():
        param = params[key]
        is_kept = any(name in kept for _, _, name in places)
        empty = placeholder(param.shape, torch.float32 if is_kept else dtype, device)
        if torch._has_compatible_shallow_copy_type(param, empty):
            param.grad = None
            param.data = empty
            continue
        fresh = nn.Parameter(empty, requires_grad=param.requires_grad)
        for module, attribute, _ in places:
            module._parameters[attribute] = fresh


def move_buffers(root: nn.Module, device: torch.device, dtypes: dict[str, torch.dtype]) -> None:
    """Move buffers to the device; those in ``dtypes`` are converted, the others keep their
    dtype."""
    for prefix, module in root.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            if buffer.device.type == "meta":
                raise RatelError("the buffer has no values (it is on the meta device)", field="model", value=name,
                                 remedy="Build the model outside torch.device('meta'), or give its configuration")
            module._buffers[attribute] = buffer.to(device=device, dtype=dtypes.get(name, buffer.dtype))


def build(config: Any, dtype: torch.dtype, attention: str | None, model_class: type | None = None) -> nn.Module:
    """The Hugging Face model of a configuration, parameters on meta, buffers real. The
    configuration is changed."""
    import transformers

    arguments: dict[str, Any] = {"dtype": dtype}
    if attention is not None:
        arguments["attn_implementation"] = attention
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        if model_class is not None:
            return model_class._from_config(config, **arguments)
        return transformers.AutoModelForCausalLM.from_config(config, **arguments)
