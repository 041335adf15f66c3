"""Which inner activations are kept, and where, as a user or a test wrote it down."""

from fnmatch import fnmatchcase

from ratel.errors import RatelError
from ratel.planner.block_profile import BlockProfile
from ratel.planner.placement import TIERS

AUTO, RECOMPUTE = "auto", "recompute"
SPILL = "spill"
"""Nothing is kept, and what the second run of a block makes for backward goes through DRAM
(`ratel.planner.checkpoints.Spill`)."""

ActivationChoice = str | dict[str, "str | dict[str, str]"]
"""``auto``, ``recompute``, ``spill`` or a tier for everything; or block-name patterns to one of
these, or to these by name."""

Kept = tuple[tuple[tuple[str, str], ...], ...]
"""For each block ``(name, tier)`` of every inner activation that is kept, in the order in which
forward makes them."""

_EXAMPLE = "Write it like {'*': 'recompute', 'block.*': {'mlp.*': 'dram', 'sdpa': 'gpu'}}"


def kept_by_choice(profiles: tuple[BlockProfile, ...], choice: ActivationChoice) -> Kept:
    """Patterns are tried in order; later ones win, and what none matches is recomputed. ``auto``
    and ``spill`` are ``recompute``.

    Raises RatelError for what is no choice, or names no block or no inner activation of the blocks
    that it names.
    """
    patterns = choice if isinstance(choice, dict) else {"*": RECOMPUTE if choice == SPILL else choice}
    tiers = [dict.fromkeys((inner.name for inner in profile.inner), RECOMPUTE) for profile in profiles]
    for pattern, wanted in patterns.items():
        named = [block for number, block in enumerate(tiers) if fnmatchcase(f"block.{number}", pattern)]
        if not named:
            raise RatelError("no block of the model has such a name", field="activations", value=pattern,
                             remedy=f"Use names such as block.0 to block.{len(profiles) - 1}")
        _apply(wanted if isinstance(wanted, dict) else {"*": wanted}, named)
    return tuple(tuple((name, tier) for name, tier in block.items() if tier != RECOMPUTE) for block in tiers)


def _apply(wanted: dict[str, str], blocks: list[dict[str, str]]) -> None:
    for pattern, tier in wanted.items():
        if tier not in (*TIERS, AUTO, RECOMPUTE):
            raise RatelError("not a place for activations", field="activations", value=repr(tier),
                             remedy=f"Use auto, recompute, gpu, dram or ssd. {_EXAMPLE}")
        found = [(block, name) for block in blocks for name in block if fnmatchcase(name, pattern)]
        if pattern != "*" and not found:
            names = dict.fromkeys(name for block in blocks for name in block)
            raise RatelError("no inner activation of these blocks has such a name", field="activations", value=pattern,
                             remedy=f"Use names such as {', '.join(names)}" if names else
                             "These blocks have none: what they do depends on values, and they are always run again")
        for block, name in found:
            block[name] = RECOMPUTE if tier == AUTO else tier
