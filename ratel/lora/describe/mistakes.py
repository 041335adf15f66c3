"""What in a description of a new adapter can only be a mistake: names that fit nothing, and ranks
beyond a layer's size.

peft passes over most of these in silence, and something stays untrained. An adapter that exists
already is not held to this: its tensors say what it is.
"""

import re

from ratel.errors import RatelError
from ratel.lora.describe.config import ALL_LINEAR, LoraConfig
from ratel.lora.describe.layers import AdaptedLayer
from ratel.lora.describe.names import adaptable, ends_of, nearest
from ratel.lora.describe.outline import ModelOutline
from ratel.lora.describe.targets import Targets


def refuse_mistakes(targets: Targets) -> None:
    """Raises RatelError for the first that is found."""
    config, outline = targets.config, targets.outline
    _refuse_unmatched(config, "targets", _listed(targets.config.targets), _names_for_targets(targets), adaptable(outline))
    parameters = [f"{module.name}.{parameter}" for module in outline.modules for parameter in module.parameters]
    _refuse_unmatched(config, "parameters", config.parameters, parameters, parameters)
    modules = [module.name for module in outline.modules if module.name]
    _refuse_unmatched(config, "exclude", _listed(config.exclude), modules, modules)
    for name in config.full:
        if not any(module.endswith(name) for module in (*modules, *outline.aliases)):
            raise RatelError("fits no module of the model", field=config.words["full"], value=name, remedy=nearest(name, modules))
    for module in targets.full:
        if not module.parameters:
            raise RatelError("has no parameters that could be trained", field=config.words["full"], value=module.name,
                             remedy="Leave it out")
    _refuse_patterns(targets)
    for layer in targets.layers:
        _refuse_rank(targets, layer)


def _names_for_targets(targets: Targets) -> list[str]:
    """Modules; and the older names of parameters that were found for them."""
    older = set(_listed(targets.config.targets)) - set(_listed(targets.effective.targets))
    return [module.name for module in targets.outline.modules if module.name] + (
        sorted(older) if targets.effective.parameters != targets.config.parameters else [])


def _refuse_unmatched(config: LoraConfig, field: str, given: tuple[str, ...], names: list[str], candidates: list[str]) -> None:
    ends = {end for name in names for end in ends_of(name)} if given else set()
    for name in given:
        if name not in ends:
            raise RatelError("fits nothing in the model", field=config.words[field], value=name, remedy=nearest(name, candidates))


def _refuse_patterns(targets: Targets) -> None:
    keys = [layer.key for layer in targets.layers]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(targets.config, field):
            if not any(re.match(rf"(.*\.)?({pattern})$", key) for key in keys):
                raise RatelError("fits no layer that is adapted", field=targets.config.words[field], value=pattern,
                                 remedy=nearest(pattern, keys))


def _refuse_rank(targets: Targets, layer: AdaptedLayer) -> None:
    """A rank beyond the smaller side of a layer adds nothing. Routers and gates that `all-linear`
    has brought in are small for any rank, and take the one that the others have, as in peft."""
    most = min(layer.in_features, layer.out_features)
    if layer.rank <= most:
        return
    config = targets.config
    if config.targets == ALL_LINEAR and not config.changes_base and layer.out_features <= _most_choices(targets.outline):
        return
    field = "rank_pattern" if layer.rank != config.rank and config.rank_pattern else "rank"
    size = f"{layer.in_features} by {layer.out_features}"
    raise RatelError(f"is above the size of {layer.key}, {size}, which has no higher rank than {most}",
                     field=config.words[field], value=layer.rank,
                     remedy=f"Give at most {most}, a rank for this layer in {config.words['rank_pattern']}, or exclude it")


def _most_choices(outline: ModelOutline) -> int:
    """The most outputs that a router has: one for each expert. A gate has one output."""
    shapes = [shape for module in outline.modules for shape in module.parameters.values()]
    return max((shape[0] for shape in shapes if len(shape) == 3), default=0) or 1


def _listed(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else ()
