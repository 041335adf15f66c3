"""Which layers of a model an adapter is put on, as peft chooses them, and what is trained as a
whole beside them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from ratel.errors import RatelError
from ratel.lora.describe.config import ALL_LINEAR, LoraConfig
from ratel.lora.describe.layers import PARAMETER, AdaptedLayer, FullModule
from ratel.lora.describe.names import ends_with_any, nothing_found
from ratel.lora.describe.older_names import possible_names, with_present_names
from ratel.lora.describe.outline import CONV1D, EMBEDDING, LINEAR, OTHER, ModelOutline, ModuleOutline


PEFT_TIES = ("embed_tokens", "lm_head")
"""What peft knows an embedding and a head by."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """``config``: as it was given; ``effective``: with the names that the model has."""

    config: LoraConfig
    effective: LoraConfig
    layers: tuple[AdaptedLayer, ...]
    full: tuple[FullModule, ...]
    outline: ModelOutline

    @cached_property
    def by_weight(self) -> dict[str, AdaptedLayer]:
        """The parameters of the model that have an adapter. A weight that is one in the model, and
        stays one, is there once."""
        return {layer.weight: layer for layer in self.layers if layer.tied_to is None}

    @cached_property
    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the adapter's file, with their shapes."""
        return {name: shape for part in (*self.layers, *self.full) for name, shape in part.file_shapes.items()}

    @property
    def num_parameters(self) -> int:
        """That are trained: those of tied layers once."""
        count = sum(a[0] * a[1] + b[0] * b[1] + (layer.out_features if layer.has_magnitude else 0)
                    for layer in self.layers if layer.tied_to is None for a, b in [(layer.a_shape, layer.b_shape)])
        shapes = [shape for module in self.full if module.tied_to is None for shape in module.parameters.values()]
        return count + sum(map(prod, shapes))


def resolve(config: LoraConfig, outline: ModelOutline) -> Targets:
    """Raises RatelError where there is nothing to adapt, or what is to be adapted cannot be."""
    asked = replace(config, targets=_targets_of(config, outline))
    matches = {name: _fits(asked, name) for name in possible_names(outline)} if _is_pattern(asked) else {}
    effective = with_present_names(asked, outline, all_linear(outline), matches)
    if effective.targets == ALL_LINEAR:
        effective = replace(effective, targets=tuple(all_linear(outline)))
    _refuse_ties(effective, outline)
    effective = _with_ties(effective, outline)
    full = tuple(_full_modules(effective, outline))
    layers = (*_modules(effective, outline), *_parameters(effective, outline))
    if not layers:
        raise nothing_found(config, outline)
    return Targets(config=config, effective=effective, layers=layers, full=full, outline=outline)


def with_dropout(targets: Targets, dropout: float) -> Targets:
    """An embedding sees tokens, of which none is dropped; nor are those of parameters."""
    layers = tuple(replace(layer, dropout=dropout if layer.kind in (LINEAR, CONV1D) else 0.0) for layer in targets.layers)
    config, effective = (replace(one, dropout=dropout) for one in (targets.config, targets.effective))
    return replace(targets, config=config, effective=effective, layers=layers)


def all_linear(outline: ModelOutline) -> list[str]:
    """Every Linear and Conv1D but the output layer."""
    return [module.name for module in outline.modules if module.kind in (LINEAR, CONV1D) and module.name != outline.head]


def _is_pattern(config: LoraConfig) -> bool:
    return isinstance(config.targets, str) and config.targets != ALL_LINEAR


def _targets_of(config: LoraConfig, outline: ModelOutline) -> str | tuple[str, ...]:
    """What peft takes for a type of models where nothing is said is written in peft alone."""
    if config.targets is not None or config.parameters:
        return config.targets if config.targets is not None else ()
    try:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as usual
    except ImportError:
        usual = {}
    found = usual.get(outline.model_type)
    if found is None:
        config.refuse("targets", "are not given, and peft has none for this type of models", outline.model_type or "none",
                      f"Give {ALL_LINEAR}, names, or a regular expression")
    return found if isinstance(found, str) else tuple(sorted(found))


# --- modules -------------------------------------------------------------------------------------------------------

def _modules(config: LoraConfig, outline: ModelOutline) -> Iterator[AdaptedLayer]:
    tied = outline.tied if _ties_layers(config, outline) else ()
    found = [module for module in outline.modules if module.name not in tied and _fits(config, module.name)]
    found += [outline.by_name[name] for name in tied]
    for module in found:
        if module.kind == OTHER:
            own = ", ".join(module.parameters) or "without weights"
            raise RatelError(f"is no Linear, Conv1D or Embedding, and takes no adapter ({own})", field=config.words["targets"],
                             value=module.name, remedy="Exclude it, or name the layers in it; parameters of a module, such as fused "
                                                       f"experts, go into {config.words['parameters']}")
        yield _adapted(config, module, tied_to=outline.embedding if module.name in tied else None)


def _fits(config: LoraConfig, name: str) -> bool:
    if not name or _is_excluded(config, name):
        return False
    if isinstance(config.targets, str):
        return re.fullmatch(config.targets, name) is not None
    if name in config.target_names:
        return True  # whatever its layer is
    return ends_with_any(name, config.target_names) and _is_in_layers(config, name)


def _is_excluded(config: LoraConfig, name: str) -> bool:
    """Also what is trained as a whole, and all that is in it."""
    if isinstance(config.exclude, str) and re.fullmatch(config.exclude, name):
        return True
    if ends_with_any(name, config.excluded_names):
        return True
    return any(re.match(rf"(^|.*\.){full}($|\..*)", name) for full in config.full)


def _is_in_layers(config: LoraConfig, name: str) -> bool:
    """By the first number in the name, or the first after one of the patterns."""
    if config.layers is None:
        return True
    for before in config.layers_pattern or (r"[^.]*",):
        start = r".*?\." if not config.layers_pattern else r"(?:^|.*?\.)"
        if found := re.match(rf"{start}{before}\.(?P<index>\d+)\.", name):
            index = found["index"]  # None where an alternative without it has matched
            return index is not None and int(index) in (config.layers if isinstance(config.layers, tuple) else (config.layers,))
    return False


def _adapted(config: LoraConfig, module: ModuleOutline, tied_to: str | None) -> AdaptedLayer:
    rows, columns = module.parameters["weight"]
    is_transposed = module.kind != LINEAR
    sizes = (rows, columns) if is_transposed else (columns, rows)  # an embedding's rows are its inputs
    return AdaptedLayer(
        name=module.name, parameter="weight", kind=module.kind, in_features=sizes[0], out_features=sizes[1],
        is_transposed=is_transposed, file_name=module.name, has_magnitude=config.dora, tied_to=tied_to,
        dropout=config.dropout if module.kind != EMBEDDING else 0.0, **_sizes(config, module.name))


def _sizes(config: LoraConfig, key: str) -> dict[str, float]:
    return {"rank": config.rank_of(key), "alpha": config.alpha_of(key), "scale": config.scale_of(key)}


# --- parameters ----------------------------------------------------------------------------------------------------

def _parameters(config: LoraConfig, outline: ModelOutline) -> Iterator[AdaptedLayer]:
    """The adapted parameters; the first of one module is innermost: its tensors are those of the
    module's `base_layer`, once for each that follows."""
    for module in outline.modules:
        keys = {parameter: f"{module.name}.{parameter}" for parameter in module.parameters if module.name}
        found = [parameter for parameter, key in keys.items() if ends_with_any(key, config.parameters)]
        if found and _fits(config, module.name):
            raise RatelError("is a target, and so is a parameter of it", field=config.words["parameters"], value=keys[found[0]],
                             remedy="Give one of the two")
        for index, parameter in enumerate(found):
            yield _adapted_parameter(config, module, parameter, depth=len(found) - 1 - index)


def _adapted_parameter(config: LoraConfig, module: ModuleOutline, parameter: str, depth: int) -> AdaptedLayer:
    key, shape = f"{module.name}.{parameter}", module.parameters[parameter]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] == 1):
        raise RatelError(f"has the shape {list(shape)}: adapters are for matrices, and for matrices of several experts",
                         field=config.words["parameters"], value=key, remedy="Leave it out")
    is_transposed = len(shape) == 3 and module.keeps_outputs_last
    columns, rows = shape[-2:] if is_transposed else shape[-2:][::-1]
    return AdaptedLayer(
        name=module.name, parameter=parameter, kind=PARAMETER, in_features=columns, out_features=rows,
        is_transposed=is_transposed, experts=shape[0] if len(shape) == 3 else 1, is_stack=len(shape) == 3,
        file_name=module.name + ".base_layer" * depth, has_magnitude=False, dropout=0.0, **_sizes(config, key))


# --- what is trained as a whole, and ties ----------------------------------------------------------------------------

def _full_modules(config: LoraConfig, outline: ModelOutline) -> Iterator[FullModule]:
    """peft compares the ends of names, dots or not."""
    tied = outline.tied if _ties_full(config, outline) else ()
    names = [module.name for module in outline.modules] + list(outline.aliases)
    for name in (name for name in names if name and name not in tied and name.endswith(config.full)):
        yield FullModule(name=name, parameters=_of_full(outline, name))
    for name in tied:
        yield FullModule(name=name, parameters=_of_full(outline, name), tied_to=outline.embedding)


def _of_full(outline: ModelOutline, name: str) -> dict[str, tuple[int, ...]]:
    first = outline.aliases.get(name, name)
    return {name + parameter[len(first):]: shape for parameter, shape in outline.parameters_in(first).items()}


def _ties_full(config: LoraConfig, outline: ModelOutline) -> bool:
    return config.tied and bool(outline.tied) and any(name.endswith(config.full) for name in _ends(outline))


def _ties_layers(config: LoraConfig, outline: ModelOutline) -> bool:
    is_asked = config.tied and bool(outline.tied) and not _ties_full(config, outline)
    return is_asked and any(_fits(config, name) for name in _ends(outline))


def _ends(outline: ModelOutline) -> list[str]:
    """The names of what is one parameter: heads and the embedding."""
    return [name for name in (*outline.tied, outline.embedding) if name]


def _refuse_ties(config: LoraConfig, outline: ModelOutline) -> None:
    if _ties_layers(config, outline) and config.dora:
        config.refuse("dora", "gives an embedding and a head that are one parameter lengths of their own, so that they become two",
                      True, f"Leave {config.words['tied']} or one of the two words out")
    ends = _ends(outline)
    is_known = any(end.rpartition(".")[2] in PEFT_TIES for end in ends)
    if (_ties_layers(config, outline) or _ties_full(config, outline)) and not is_known:
        config.refuse("tied", f"is possible in peft for modules called {' or '.join(PEFT_TIES)}, and here they are "
                              f"{' and '.join(ends)}", True, "Leave it out, or do not adapt them")


def _with_ties(config: LoraConfig, outline: ModelOutline) -> LoraConfig:
    """The configuration in which an embedding is named for itself and the heads that share its
    weight."""
    if _ties_full(config, outline) and outline.embedding is not None and not outline.embedding.endswith(config.full):
        kept = tuple(name for name in config.full if not any(tied.endswith(name) for tied in outline.tied))
        return replace(config, full=(*kept, outline.embedding))
    if _ties_layers(config, outline) and outline.embedding is not None and not _fits(config, outline.embedding):
        embedding = outline.embedding
        if isinstance(config.targets, str):
            return replace(config, targets=rf"(?:{config.targets}|{re.escape(embedding)})")
        return replace(config, targets=(*(config.targets or ()), embedding))
    return config

