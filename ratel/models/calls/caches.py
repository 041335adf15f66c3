"""Caches of keys and values are off while a model is in a session: a block that runs again would
read what its first run wrote, which carries no gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Caches:
    """Every ``use_cache`` of a module: of its configurations, nested ones and those of its
    submodules included."""

    def __init__(self, module: nn.Module) -> None:
        self._holders: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for child in module.modules():
            for holder in (child, getattr(child, "config", None), getattr(child, "generation_config", None)):
                self._find(holder, seen)
        # Gemma 4 keeps the keys of some layers for others and for an assistant; where no layer
        # takes them, nobody is to.
        are_shared = any(getattr(child, "is_kv_shared_layer", False) for child in module.modules())
        self._keepers = [] if are_shared else [c for c in module.modules() if getattr(c, "store_full_length_kv", None) is True]
        self._switch_off()

    def _find(self, holder: Any, seen: set[int]) -> None:
        settings = getattr(holder, "__dict__", None)
        if settings is None or isinstance(holder, type) or id(holder) in seen:
            return
        seen.add(id(holder))
        if settings.get("use_cache") or (not isinstance(holder, nn.Module) and getattr(holder, "use_cache", False) is True):
            self._holders.append((holder, holder.use_cache))
        if isinstance(holder, nn.Module):
            return  # its configurations are looked for by their names
        for name, value in settings.items():
            if name.endswith("config") or type(value).__name__.endswith("Config"):
                self._find(value, seen)

    def _switch_off(self) -> None:
        for holder, _ in self._holders:
            _set(holder, False)
        for keeper in self._keepers:
            keeper.store_full_length_kv = False

    def put_back(self) -> None:
        for holder, value in self._holders:
            _set(holder, value)
        for keeper in self._keepers:
            keeper.store_full_length_kv = True

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """What is written inside says about caches what the user's configuration says."""
        self.put_back()
        try:
            yield
        finally:
            self._switch_off()


def _set(holder: Any, value: Any) -> None:
    try:
        holder.use_cache = value
    except (AttributeError, TypeError):  # read only; a cache that is made nevertheless is refused where a block is given it
        pass
