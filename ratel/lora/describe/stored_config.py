"""The description of an adapter as its file has it: what was found in the model, in names that mean
just that to peft."""

from dataclasses import replace

from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.layers import PARAMETER
from ratel.lora.describe.outline import ModelOutline
from ratel.lora.describe.targets import Targets


def stored_config(targets: Targets) -> LoraConfig:
    """Layers are listed, by their last parts where these are enough: `all-linear`, regular
    expressions and what is excluded mean the same in any version of peft then. Of weights that are
    one in the model both names are there: peft ties by them."""
    layers = [layer.name for layer in targets.layers if layer.kind != PARAMETER]
    full = [*targets.config.full, *targets.effective.full, *(module.name for module in targets.full if module.tied_to)]
    return replace(targets.effective, targets=tuple(_shortest(layers, targets.outline)), exclude=None, layers=None,
                   layers_pattern=(), full=tuple(dict.fromkeys(full)))


def _shortest(names: list[str], outline: ModelOutline) -> list[str]:
    adapted = set(names)
    other_leaves = {module.leaf for module in outline.modules if module.name not in adapted}
    return sorted({name if (leaf := name.rpartition(".")[2]) in other_leaves else leaf for name in names})
