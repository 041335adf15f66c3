"""A module whose weights are with a session does not answer with the zeros that stand in for
them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ratel.errors import RatelError


class Guard:
    """Refuses to call the module and to give its state dict, except within ``lifted``."""

    def __init__(self, module: nn.Module) -> None:
        self._is_lifted = False
        self._hooks = [module.register_forward_pre_hook(self._refuse_call),
                       module.register_state_dict_pre_hook(self._refuse_state_dict)]

    @contextmanager
    def lifted(self) -> Iterator[None]:
        before, self._is_lifted = self._is_lifted, True
        try:
            yield
        finally:
            self._is_lifted = before

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _refuse_call(self, module: nn.Module, args: Any) -> None:
        self._refuse(module, "Use Session.evaluate, or call it after Session.close")

    def _refuse_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._refuse(module, "Use Session.save, Session.export or Session.state_dict, or ask for it after Session.close")

    def _refuse(self, module: nn.Module, remedy: str) -> None:
        if not self._is_lifted:
            raise RatelError("its weights are with the session; the module itself holds zeros", field="model",
                             value=type(module).__name__, remedy=remedy)
