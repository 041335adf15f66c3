"""Ratel: fine-tune every parameter of a model far larger than GPU memory, on one GPU.

Importing this is instant: the faces below load PyTorch when they are first used.
"""

from importlib import import_module
from typing import Any

from ratel.errors import RatelError

__version__ = "0.1.0"
__all__ = ["LoraConfig", "RatelError", "Session", "Task", "TrainResult", "__version__", "load_adamw_state", "plan",
           "save_adamw_state", "train"]

_FACES = {"LoraConfig": "ratel.lora.describe.config", "Session": "ratel.runtime.session.session",
          "Task": "ratel.models.calls.tasks", "TrainResult": "ratel.training.run", "load_adamw_state": "ratel.optimizer_state",
          "save_adamw_state": "ratel.optimizer_state"}


def __getattr__(name: str) -> Any:
    if name in _FACES:
        return getattr(import_module(_FACES[name]), name)
    raise AttributeError(f"module 'ratel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def train(model: Any, data: Any = None, **options: Any) -> Any:
    """Train ``model`` on ``data``: see `ratel.training.run.train`."""
    return import_module("ratel.training.run").train(model, data, **options)


def plan(model: Any, **options: Any) -> Any:
    """Plan without training: see `ratel.runtime.planning.planner.plan`."""
    return import_module("ratel.runtime.planning.planner").plan(model, **options)
