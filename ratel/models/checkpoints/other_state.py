"""What a model's state dict has besides parameters, as bytes: buffers, and what modules say their
extra state is.

A safetensors file. An extra state that is no tensor is in it as the bytes that `torch.save` makes
of it; it is read without running code, so it must be made of tensors, numbers, strings and
containers of them.
"""

import io
import json
import pickle
from typing import Any

import torch
from torch import Tensor

from ratel.errors import RatelError

OBJECTS = "objects"
"""Key of the file's metadata: the names, as a JSON list, of what is no tensor."""


def pack(state: dict[str, Any]) -> bytes:
    """Raises RatelError for an extra state that could not be read again."""
    from safetensors.torch import save

    objects = sorted(name for name, value in state.items() if not isinstance(value, Tensor))
    return save(as_tensors(state), metadata={OBJECTS: json.dumps(objects)})


def unpack(content: bytes) -> dict[str, Any]:
    from safetensors.torch import load

    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    objects = set(json.loads(header.get("__metadata__", {}).get(OBJECTS, "[]")))
    return {name: _object(tensor) if name in objects else tensor for name, tensor in load(content).items()}


def as_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Each in memory of its own, as safetensors wants it."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor)
            else _bytes(name, value) for name, value in state.items()}


def refuse_unreadable(state: dict[str, Any]) -> None:
    """Before training: what no save could keep."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            _bytes(name, value)


def _bytes(name: str, value: Any) -> Tensor:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        found = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        _object(found)
    except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
        raise RatelError(f"cannot be saved: its get_extra_state() gives a {type(value).__name__}, which could not be read again "
                         "without running code", field="model", value=name,
                         remedy="Return tensors, numbers, strings, and lists and dictionaries of them") from error
    return found


def _object(tensor: Tensor) -> Any:
    return torch.load(io.BytesIO(tensor.numpy().tobytes()), weights_only=True)
