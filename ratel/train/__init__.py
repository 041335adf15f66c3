"""Training: the loop, its schedule and its output. Calling this package trains: ``ratel.train(model, data)``.

A package and a function cannot share a name in one namespace, and importing any module below would replace the function
by the package; so the package itself is callable.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, model: Any, data: Any = None, **options: Any) -> Any:
        """See `ratel.train.run.train`."""
        from ratel.train.run import train

        return train(model, data, **options)


sys.modules[__name__].__class__ = _CallablePackage
