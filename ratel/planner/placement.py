"""Where each plane of each unit lives."""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache

from ratel.errors import RatelError
from ratel.planner.formats import PLANES
from ratel.planner.shape import ModelSpec, UnitSpec

GPU, DRAM, SSD = "gpu", "dram", "ssd"
TIERS = (GPU, DRAM, SSD)


@dataclass(frozen=True, kw_only=True)
class UnitPlacement:
    """The tier of each plane of one unit. ``g`` is where a gradient waits for its update in
    deferred mode."""

    hi: str = DRAM
    lo: str = DRAM
    m: str = DRAM
    v: str = DRAM
    g: str = DRAM

    @classmethod
    def all_on(cls, tier: str) -> "UnitPlacement":
        return cls(hi=tier, lo=tier, m=tier, v=tier, g=tier)

    @property
    def on_gpu(self) -> bool:
        """Updated on the GPU; never crosses PCIe."""
        return self.hi == GPU

    def tier(self, plane: str) -> str:
        return getattr(self, plane)


@lru_cache(maxsize=1024)
def with_planes(place: UnitPlacement, planes: tuple[str, ...], tier: str) -> UnitPlacement:
    """The placement with these planes on the tier: the same object for the same question, by which
    a plan tells units that are placed alike."""
    return replace(place, **dict.fromkeys(planes, tier))


_ON_GPU = UnitPlacement.all_on(GPU)


def with_fp32_on_gpu(spec: ModelSpec, placements: tuple[UnitPlacement, ...]) -> tuple[UnitPlacement, ...]:
    """Units that compute in fp32 among others, and adapters, do not travel: they are thousandths of
    a model."""
    if not spec.has_fp32_units:
        return placements
    return tuple(_ON_GPU if unit.fp32 else place for unit, place in zip(spec.units, placements, strict=True))


def closed_first(spec: ModelSpec, placements: tuple[UnitPlacement, ...], count: int | None = None) -> list[UnitSpec]:
    """The first ``count`` (default: all) of the units that the CPU updates, in the order in which
    their gradients are complete."""
    return [unit for unit in spec.closing_order if not placements[unit.index].on_gpu][:count]


_EXAMPLE = "Write it like {'*': 'ssd', 'block.*': {'hi': 'dram'}}"

Forced = str | dict[str, "str | dict[str, str]"]
"""A tier for everything, or unit-name patterns to a tier or to tiers by plane."""


def check_forced(forced: Forced) -> None:
    """Refuse what is no placement for any model."""
    choices = {"*": forced} if isinstance(forced, str) else forced
    if not isinstance(choices, dict):
        raise RatelError("is neither a tier nor tiers by unit", field="placement", value=repr(forced), remedy=_EXAMPLE)
    for pattern, choice in choices.items():
        if not isinstance(choice, (str, dict)):
            raise RatelError("is neither a tier nor tiers by plane", field="placement", value=f"{pattern}: {choice!r}",
                             remedy=_EXAMPLE)


def forced_placements(spec: ModelSpec, forced: Forced) -> tuple[UnitPlacement, ...]:
    """The placement a user or a test wrote down, checked. Patterns are tried in order; later ones
    win."""
    check_forced(forced)
    if isinstance(forced, str):
        forced = {"*": forced}
    result = []
    for unit in spec.units:
        tiers = dict.fromkeys((*PLANES, "g"), DRAM)
        for pattern, choice in forced.items():
            if fnmatchcase(unit.name, pattern):
                tiers.update(dict.fromkeys(tiers, choice) if isinstance(choice, str) else choice)
        result.append(_checked(unit, tiers))
    for pattern in forced:
        if not any(fnmatchcase(unit.name, pattern) for unit in spec.units):
            raise RatelError("no unit of the model has such a name", field="placement", value=pattern,
                             remedy="Use names such as " + ", ".join(u.name for u in spec.units[:3]))
    return tuple(result)


def _checked(unit: UnitSpec, tiers: dict[str, str]) -> UnitPlacement:
    for plane, tier in tiers.items():
        if plane not in (*PLANES, "g") or tier not in TIERS:
            raise RatelError(f"unit {unit.name} cannot have plane {plane!r} on {tier!r}", field="placement",
                             value=f"{plane}={tier}", remedy="Planes are hi lo m v g; tiers are gpu dram ssd")
    on_gpu = [tier == GPU for tier in tiers.values()]
    if any(on_gpu) and not all(on_gpu):
        raise RatelError(f"unit {unit.name} has some planes on the GPU and some not", field="placement", value=tiers,
                         remedy="Put all planes of a unit on the GPU (it is updated there), or none")
    return UnitPlacement(**tiers)
