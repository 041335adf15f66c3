"""Finding the repeated blocks of a module, and refusing what cannot be trained one block at a
time."""

from collections import defaultdict

import torch
from torch import nn

from ratel.errors import RatelError
from ratel.models.checkpoints.config import refuse_config

MIN_BLOCK_SHARE = 0.1
"""Below this share of all parameters a list of layers is an accident (a head of two linears), not
the body of a model."""

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a weight may be stored in. All of them fit the fp32 master exactly."""


def count_elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def find_blocks(root: nn.Module) -> list[nn.Module]:
    """The children of the outermost list that holds the most parameters, each object once, in list
    order; where no list has two, the only child of one (ALBERT calls one layer again and again). Of
    a model for images and text it is a list of the text's part, however large the other is."""
    root, num_layers = _text_part(root), _num_text_layers(root)
    total = count_elements(root)
    found = ([s for s in _stacks(root, least) if total and _elements(s) >= MIN_BLOCK_SHARE * total] for least in (2, 1))
    stacks = next((stacks for stacks in found if stacks), [])
    stacks = [s for s in stacks if len(s) == num_layers] or stacks
    if not stacks:
        raise RatelError(
            "no repeated blocks found: no nn.ModuleList or nn.Sequential of two or more like layers holds "
            f"{MIN_BLOCK_SHARE:.0%} of the {total:,} parameters", field="model", value=type(root).__name__,
            remedy="Keep the repeated layers of the model in one nn.ModuleList")
    return max(stacks, key=_elements)


def _text_part(root: nn.Module) -> nn.Module:
    config = getattr(root, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config or not hasattr(root, "get_decoder"):
        return root
    decoder = root.get_decoder()
    return decoder if isinstance(decoder, nn.Module) and count_elements(decoder) else root


def _num_text_layers(root: nn.Module) -> int | None:
    """How many layers the text part has, for a model whose configuration has parts, and so perhaps
    other stacks among the text's own modules."""
    config = getattr(root, "config", None)
    return getattr(config.get_text_config(), "num_hidden_layers", None) if getattr(config, "sub_configs", None) else None


def _stacks(root: nn.Module, least: int) -> list[list[nn.Module]]:
    """The stacks of at least so many layers."""
    found: list[list[nn.Module]] = []
    pending = [root]
    while pending:
        module = pending.pop(0)
        stack = _as_stack(module, least)
        if stack:
            found.append(stack)
        else:
            pending.extend(module.children())
    return found


def _as_stack(module: nn.Module, least: int) -> list[nn.Module]:
    """The blocks in this container, or nothing."""
    kinds = (nn.ModuleList, nn.Sequential) if least > 1 else nn.ModuleList
    if not isinstance(module, kinds) or len(module) < least:
        return []
    layers = [child for child in module._modules.values() if child is not None and count_elements(child)]
    if isinstance(module, nn.Sequential):
        # A whole model may be one Sequential: embedding, layers, head. The layers are the class
        # with most weight.
        by_class: dict[type, list[nn.Module]] = defaultdict(list)
        for layer in layers:
            by_class[type(layer)].append(layer)
        layers = max(by_class.values(), key=_elements, default=[])
    if len(layers) < least or all(isinstance(layer, (nn.ModuleList, nn.ModuleDict)) for layer in layers):
        return []
    return list(dict.fromkeys(layers))


def _elements(modules: list[nn.Module]) -> int:
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def refuse_unsupported(root: nn.Module) -> None:
    """What is known to be wrong before anything runs. Raises RatelError."""
    if hasattr(root, "config"):
        refuse_config(root.config, type(root).__name__)
    num_empty = sum(p.device.type == "meta" for p in root.parameters())
    if num_empty and (num_empty < len(list(root.parameters())) or any(hasattr(m, "_hf_hook") for m in root.modules())):
        # Initialising them afresh would throw away what the others, or the offloaded ones, were
        # trained to.
        raise RatelError("some of its parameters are elsewhere (on the meta device)", field="model",
                         value=type(root).__name__, remedy="Load it without device_map, or give its directory")
    for name, module in root.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise RatelError("batch normalization with running statistics: recomputing a block in backward would "
                             "update them twice", field="model", value=f"{name} ({type(module).__name__})",
                             remedy="Replace it with LayerNorm or GroupNorm, or set track_running_stats=False")
    for name, param in root.named_parameters():
        if param.dtype not in COMPUTE_DTYPES:
            raise RatelError(f"the parameter has dtype {param.dtype}, which an fp32 master weight cannot hold",
                             field="model", value=name, remedy="Convert the model with .float() or .bfloat16()")
