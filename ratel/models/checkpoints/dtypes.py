"""The precision in which `from_pretrained` keeps what: most of a model in the dtype that is asked
for, some of it always in fp32."""

import torch
from torch import nn


def kept_in_fp32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names, in the state dict, of parameters and buffers that stay fp32 in a model of transformers
    that was built, and is loaded, in ``dtype``: what the class says, and what its constructor makes
    in fp32 whatever is asked for."""
    if dtype is torch.float32 or not hasattr(module, "_get_dtype_plan"):
        return set()
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return planned_in_fp32(module, dtype) | {name for name, tensor in tensors if tensor.dtype is torch.float32}


def planned_in_fp32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """The parameters of which the class says so (`_keep_in_fp32_modules_strict` and the like)."""
    if dtype is torch.float32 or not hasattr(module, "_get_dtype_plan"):
        return set()
    from transformers.core_model_loading import build_glob_alternation

    plan = [pattern for pattern, kept in module._get_dtype_plan(dtype).items() if kept is torch.float32]
    if not plan:
        return set()
    is_kept = build_glob_alternation(plan)[0].search
    return {name for name, value in module.state_dict().items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and is_kept(name)}
