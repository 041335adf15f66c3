"""Ratel: fine-tune every parameter of a model far larger than GPU memory, on one GPU.

Importing this is instant: the faces below load PyTorch when they are first used.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from ratel.errors import RatelError

__version__ = "0.1.0"
__all__ = ["RatelError", "Session", "Task", "TrainResult", "__version__", "load_adamw_state", "plan", "save_adamw_state", "train"]

_FACES = {"Session": "ratel.runtime.session", "Task": "ratel.models.tasks", "TrainResult": "ratel.train.run",
          "load_adamw_state": "ratel.optimizer_state", "save_adamw_state": "ratel.optimizer_state"}


def __getattr__(name: str) -> Any:
    if name == "train":
        # The package `ratel.train` is itself the function: a module and a function cannot share a name otherwise.
        return import_module("ratel.train")
    if name in _FACES:
        return getattr(import_module(_FACES[name]), name)
    raise AttributeError(f"module 'ratel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _CallablePlan(ModuleType):
    def __call__(self, model: Any, **options: Any) -> Any:
        """See `ratel.runtime.planning.plan`."""
        return import_module("ratel.runtime.planning").plan(model, **options)


def _make_plan_callable() -> None:
    """`ratel.plan` is the package of the pure planner and the function that uses it. The package lies below everything that
    planning for a user takes (models, the machine), and may not know it; so it is given its call from here, where it is
    certain to be imported first."""
    import_module("ratel.plan").__class__ = _CallablePlan


_make_plan_callable()
