"""The way from a trace to units and stages: which parameter lives in which unit, is it trained,
does it decay."""

import logging
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ratel.models.structure.skeleton import owners
from ratel.models.structure.trace import Trace
from ratel.planner.shape import ADDED_SUFFIX, FP32_SUFFIX, ModelSpec, ParamSpec, StageSpec, UnitSpec, lay_out

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layout:
    spec: ModelSpec
    unused: UnitSpec | None
    """Parameters no stage uses. They are in no unit of the spec and are exported as they were
    given."""


def make_layout(root: nn.Module, trace: Trace, name: str, added: Collection[str] = ()) -> Layout:
    """Units in forward order: ``pre``, ``block.i``, ``post``, then ``shared``. Empty ones are left
    out. ``added``: parameters that are no part of the model as it is stored; they have units of
    their own."""
    stage_names = ["pre", *(f"block.{i}" for i in range(len(trace.stages))), "post"]
    users = _stages_of(list(root.parameters()), trace)
    groups = _group(root, trace, users, stage_names, added)
    units: dict[str, UnitSpec] = {}
    for key in (*stage_names, "shared"):
        for full in _parts_of(key):
            if groups[full]:
                units[full] = lay_out(len(units), full, key.split(".")[0], groups[full], fp32=full != key)
    sharing = {stage for stages in users if len(stages) > 1 for stage in stages}
    stages = []
    for number, key in enumerate(stage_names):
        used = [units[full].index for u in (key, "shared") for full in _parts_of(u)
                if full in units and (u == key or number in sharing)]
        stages.append(StageSpec(index=number, name=key, kind=key.split(".")[0], units=tuple(used)))
    config = getattr(root, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    spec = ModelSpec(name=name, units=tuple(units.values()), stages=tuple(stages),
                     hidden_size=getattr(text, "hidden_size", None), vocab_size=getattr(text, "vocab_size", None),
                     max_seq_len=longest_sequence(root))
    return Layout(spec=spec,
                  unused=lay_out(-1, "unused", "unused", groups["unused"]) if groups["unused"] else None)


def _parts_of(key: str) -> tuple[str, str, str]:
    """The units that the parameters of a stage may be divided among."""
    return key, key + FP32_SUFFIX, key + ADDED_SUFFIX


def longest_sequence(root: nn.Module) -> int | None:
    """Tokens of a sequence that the model has positions for; None: for any. RoBERTa's begin behind
    the number of the padding token, and XLNet says -1 for no limit."""
    config = getattr(root, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    tables = [m for name, m in root.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    skipped = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
    return None if limit is None or limit <= 0 else limit - skipped


def _group(root: nn.Module, trace: Trace, users: list[list[int]], stage_names: list[str],
           added: Collection[str]) -> dict[str, list[ParamSpec]]:
    """Parameters by the unit they go to."""
    places = owners(root)
    groups: dict[str, list[ParamSpec]] = defaultdict(list)
    is_mixed = {param.dtype for name, param in root.named_parameters() if name not in added} > {torch.float32}
    cut_off = []
    for index, (param, stages) in enumerate(zip(root.parameters(), users)):
        key = "unused" if not stages else stage_names[stages[0]] if len(stages) == 1 else "shared"
        in_block = any(0 < stage < len(stage_names) - 1 for stage in stages)
        trained = param.requires_grad and bool(stages) and (in_block or index in trace.reached)
        spec = _param_spec(param, places[id(param)], trained)
        is_kept = is_mixed and key != "unused" and param.dtype is torch.float32
        is_added = spec.name in added and key != "unused"
        groups[key + (ADDED_SUFFIX if is_added else FP32_SUFFIX * is_kept)].append(spec)
        if stages and param.requires_grad and not trained:
            cut_off.append(spec)
    if groups["unused"]:
        log.warning("not used by the model's forward, left as they are: %s", _names(groups["unused"]))
    if cut_off:
        log.warning("no gradient of the loss reaches them, treated as frozen: %s", _names(cut_off))
    return groups


def _stages_of(params: list[nn.Parameter], trace: Trace) -> list[list[int]]:
    """The numbers of the stages that use each parameter."""
    owned: dict[int, set[int]] = {}
    for number, block in enumerate(trace.stages, start=1):
        # All of a block's parameters count, also those this forward passed by: an expert no token
        # went to.
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
    """Weight decay applies to matrices: not to vectors, biases or the parameters of norms.
    Embeddings do decay."""
    in_norm = any("norm" in type(module).__name__.lower() for module in modules)
    return param.ndim >= 2 and not in_norm and not name.endswith("bias")


def _names(params: list[ParamSpec], limit: int = 8) -> str:
    shown = ", ".join(p.name for p in params[:limit])
    return shown if len(params) <= limit else f"{shown} and {len(params) - limit} more"
