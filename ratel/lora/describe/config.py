"""What an adapter is: rank, scale, which layers it is put on, how it begins. The words mean what
peft's mean (docs/lora.md)."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import NoReturn

from ratel.errors import RatelError
from ratel.schema import shown

ALL_LINEAR = "all-linear"
SVD_STEPS = re.compile(r"pissa_niter_(\d{1,4})")
CHANGES_BASE = ("pissa", "olora")
"""Inits that take from the base what the adapter begins with."""
INITS = "default, gaussian, pissa, pissa_niter_N or olora"

OPTIONS: Mapping[str, str] = MappingProxyType({
    "rank": "--lora", "alpha": "--lora-alpha", "dropout": "--lora-dropout", "targets": "--lora-targets",
    "exclude": "--lora-exclude", "parameters": "--lora-parameters", "init": "--lora-init", "rslora": "--rslora", "dora": "--dora",
    "rank_pattern": "--lora-rank-pattern", "alpha_pattern": "--lora-alpha-pattern", "full": "--lora-full",
    "layers": "--lora-layers", "layers_pattern": "--lora-layers-pattern", "tied": "--lora-tied"})
PEFT_FIELDS: Mapping[str, str] = MappingProxyType({
    "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules", "exclude": "exclude_modules",
    "parameters": "target_parameters", "init": "init_lora_weights", "rslora": "use_rslora", "dora": "use_dora",
    "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern", "full": "modules_to_save", "layers": "layers_to_transform",
    "layers_pattern": "layers_pattern", "tied": "ensure_weight_tying"})
"""The same fields, as peft calls them."""

_MOST_RANK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """One adapter. A text in ``targets`` or ``exclude`` is a regular expression for whole names
    (``targets`` may be `all-linear`, too); a tuple has names, or ends of names after a dot.
    ``rank_pattern`` and ``alpha_pattern``: regular expressions for ends of names, of which the
    first that fits counts. ``parameters``: targets that are parameters of other modules (fused
    experts). Raises RatelError for values that cannot be."""

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = ALL_LINEAR
    """None: what peft takes for the model's type where ``parameters`` is empty, else none."""
    exclude: str | tuple[str, ...] | None = None
    parameters: tuple[str, ...] = ()
    init: str = "default"
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    full: tuple[str, ...] = ()
    """Modules that are trained as a whole and stored with the adapter (peft's modules_to_save)."""
    layers: int | tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    tied: bool = False
    """Whether an embedding and a head that are one parameter in the model stay one (peft's
    ensure_weight_tying)."""
    words: Mapping[str, str] = field(default_factory=lambda: OPTIONS, repr=False, compare=False)
    """What its fields are called where they were given, for messages."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        if self.init not in ("default", "gaussian", "pissa", "olora") and not SVD_STEPS.fullmatch(self.init):
            self.refuse("init", "is not an init that is supported", self.init, f"Use {INITS}")
        if (self.dropout or self.dora) and self.parameters:
            name = "dropout" if self.dropout else "dora"
            self.refuse(name, "is not possible for parameters, and there are some among the targets", getattr(self, name),
                        "Turn it off, or target modules alone")
        if self.changes_base and self.parameters:
            self.refuse("init", "is not possible for parameters, and there are some among the targets", self.init,
                        "Use default or gaussian, or target modules alone")

    @property
    def changes_base(self) -> bool:
        return self.init.startswith(CHANGES_BASE)

    @property
    def svd_steps(self) -> int | None:
        """The steps of an approximate pissa; None for an exact one."""
        found = SVD_STEPS.fullmatch(self.init)
        return int(found[1]) if found else None

    @cached_property
    def target_names(self) -> frozenset[str]:
        return frozenset(self.targets) if isinstance(self.targets, tuple) else frozenset()

    @cached_property
    def excluded_names(self) -> frozenset[str]:
        return frozenset(self.exclude) if isinstance(self.exclude, tuple) else frozenset()

    def rank_of(self, name: str) -> int:
        return self.rank_pattern[found] if (found := first_pattern(self.rank_pattern, name)) is not None else self.rank

    def alpha_of(self, name: str) -> float:
        return self.alpha_pattern[found] if (found := first_pattern(self.alpha_pattern, name)) is not None else self.alpha

    def scale_of(self, name: str) -> float:
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)

    def refuse(self, name: str, message: str, value: object, remedy: str) -> NoReturn:
        raise RatelError(message, field=self.words[name], value=shown(value, 200), remedy=remedy)

    def _check_numbers(self) -> None:
        for name, rank in [("rank", self.rank), *(("rank_pattern", rank) for rank in self.rank_pattern.values())]:
            if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= _MOST_RANK:
                self.refuse(name, "must be a whole number of at least 1", rank, "Give the rank, for example 16")
        for name, alpha in [("alpha", self.alpha), *(("alpha_pattern", alpha) for alpha in self.alpha_pattern.values())]:
            if not _is_number(alpha) or not 0 < alpha < math.inf:
                self.refuse(name, "must be a number above 0", alpha, "Give alpha; the adapter is scaled by alpha / rank")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            self.refuse("dropout", "must be a number of at least 0 and below 1", self.dropout,
                        "Use for example 0.1, or 0 for none")
        for name in ("rslora", "dora", "tied"):
            if not isinstance(getattr(self, name), bool):
                self.refuse(name, "must be true or false", getattr(self, name), "Use one of them")
        layers = self.layers if isinstance(self.layers, tuple) else () if self.layers is None else (self.layers,)
        if any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers):
            self.refuse("layers", "must be whole numbers of at least 0", self.layers, "Give the indices of layers, from 0")

    def _check_names(self) -> None:
        for name in ("targets", "exclude", "full", "parameters", "layers_pattern"):
            for value in _tuple(getattr(self, name)):
                if not isinstance(value, str) or not value:
                    self.refuse(name, "must be names", getattr(self, name),
                                "Give names as the model has them, separated by commas")
        for name in ("targets", "exclude"):
            if isinstance(getattr(self, name), str) and getattr(self, name).lower() != ALL_LINEAR:
                self._check_pattern(name, getattr(self, name))
        for name in ("rank_pattern", "alpha_pattern", "full", "layers_pattern"):  # peft takes names of these as patterns, too
            for pattern in getattr(self, name):
                self._check_pattern(name, pattern)
        if isinstance(self.targets, str) and self.layers is not None:
            self.refuse("layers", "is for a list of targets, and the targets are one text", self.layers,
                        "List the targets, or put the layers into the regular expression")
        if self.layers_pattern and self.layers is None:
            self.refuse("layers_pattern", "says nothing without layers", self.layers_pattern,
                        "Give the layers as well, or leave it out")

    def _check_pattern(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
            re.compile(rf"(.*\.)?({pattern})$")  # as it is used: flags that are for a whole expression are none here
        except (re.error, RecursionError, OverflowError) as error:
            self.refuse(name, f"is not a regular expression: {error}", pattern, "Correct it; a dot in a name is written \\.")


def names_or_pattern(given: str) -> str | tuple[str, ...]:
    """What a text of the command line says: `all-linear`, names separated by commas, or else a
    regular expression. A name has letters, digits, `_`, `-` and dots between them."""
    parts = tuple(part.strip() for part in given.split(","))
    is_names = all(re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", part) for part in parts)
    return parts if is_names and given.lower() != ALL_LINEAR else given


def first_pattern(patterns: Iterable[str], name: str) -> str | None:
    """The first that is the whole name, or its end after a dot."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value
