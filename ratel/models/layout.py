"""From a trace to units and stages: which parameter lives in which unit, is it trained, does it decay."""

import logging
from dataclasses import dataclass

from torch import nn

from ratel.models.skeleton import owners
from ratel.models.trace import Trace
from ratel.plan.shape import ModelSpec, ParamSpec, StageSpec, UnitSpec, lay_out

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layout:
    spec: ModelSpec
    unused: UnitSpec | None
    """Parameters no stage uses. They are in no unit of the spec and are exported as they were given."""


def make_layout(root: nn.Module, trace: Trace, name: str) -> Layout:
    """Units in forward order: ``pre``, ``block.i``, ``post``, then ``shared``. Empty ones are left out."""
    params = list(root.parameters())
    places = owners(root)
    stages = _stages_of(params, trace)
    names = ["pre", *(f"block.{i}" for i in range(len(trace.stages))), "post"]
    groups: dict[str, list[ParamSpec]] = {key: [] for key in (*names, "shared", "unused")}
    for index, param in enumerate(params):
        users = stages[index]
        group = "unused" if not users else names[users[0]] if len(users) == 1 else "shared"
        in_block = any(0 < user < len(names) - 1 for user in users)
        trained = param.requires_grad and bool(users) and (in_block or index in trace.reached)
        groups[group].append(_param_spec(param, places[id(param)], trained))
    _report(groups, params, places)
    units: dict[str, UnitSpec] = {}
    for key in (*names, "shared"):
        if groups[key]:
            units[key] = lay_out(len(units), key, key.split(".")[0], groups[key])
    specs = []
    for number, key in enumerate(names):
        uses_shared = any(number in stages[i] and len(stages[i]) > 1 for i in range(len(params)))
        used = [units[u].index for u in (key, *(("shared",) if uses_shared else ())) if u in units]
        specs.append(StageSpec(index=number, name=key, kind=key.split(".")[0], units=tuple(used)))
    unused = lay_out(-1, "unused", "unused", groups["unused"]) if groups["unused"] else None
    config = getattr(root, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    spec = ModelSpec(name=name, units=tuple(units.values()), stages=tuple(specs),
                     hidden_size=getattr(text, "hidden_size", None), vocab_size=getattr(text, "vocab_size", None),
                     max_seq_len=getattr(text, "max_position_embeddings", None))
    return Layout(spec=spec, unused=unused)


def _stages_of(params: list[nn.Parameter], trace: Trace) -> list[list[int]]:
    """By parameter, the numbers of the stages that use it."""
    owned: dict[int, set[int]] = {}
    for number, block in enumerate(trace.stages, start=1):
        # All of a block's parameters count, also those this forward passed by: an expert no token went to.
        for param in block.parameters():
            owned.setdefault(id(param), set()).add(number)
    return [sorted({n for n, used in enumerate(trace.used) if index in used} | owned.get(id(param), set()))
            for index, param in enumerate(params)]


def _param_spec(param: nn.Parameter, places: list[tuple[nn.Module, str, str]], trained: bool) -> ParamSpec:
    name = places[0][2]
    return ParamSpec(name=name, shape=tuple(param.shape), trainable=trained,
                     decay=decays(name, param, [module for module, _, _ in places]),
                     aliases=tuple(alias for _, _, alias in places[1:]))


def decays(name: str, param: nn.Parameter, modules: list[nn.Module]) -> bool:
    """Weight decay applies to matrices: not to vectors, biases or the parameters of norms. Embeddings do decay."""
    in_norm = any("norm" in type(module).__name__.lower() for module in modules)
    return param.ndim >= 2 and not in_norm and not name.endswith("bias")


def _report(groups: dict[str, list[ParamSpec]], params: list[nn.Parameter],
            places: dict[int, list[tuple[nn.Module, str, str]]]) -> None:
    if groups["unused"]:
        log.warning("not used by the model's forward, left as they are: %s", _names(groups["unused"]))
    wanted = {places[id(p)][0][2] for p in params if p.requires_grad}
    cut_off = [p for key, group in groups.items() if key != "unused" for p in group
               if not p.trainable and p.name in wanted]
    if cut_off:
        log.warning("no gradient of the loss reaches them, treated as frozen: %s", _names(cut_off))


def _names(params: list[ParamSpec], limit: int = 8) -> str:
    shown = ", ".join(p.name for p in params[:limit])
    return shown if len(params) <= limit else f"{shown} and {len(params) - limit} more"
