"""In which precision `from_pretrained` keeps what: most of a model in the dtype that is asked for, some of it always in fp32."""

import torch
from torch import nn


def kept_in_fp32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names, in the state dict, of parameters and buffers that stay fp32 in a model of transformers loaded in ``dtype``:
    what the class says (`_keep_in_fp32_modules_strict`) and what its constructor makes in fp32, whatever is asked for."""
    if dtype is torch.float32 or not hasattr(module, "_get_dtype_plan"):
        return set()
    from transformers.core_model_loading import build_glob_alternation

    plan = {pattern: kept for pattern, kept in module._get_dtype_plan(dtype).items() if kept is torch.float32}
    is_kept = build_glob_alternation(list(plan))[0].search if plan else lambda name: None
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    persistent = set(module.state_dict())
    return {name for name, tensor in tensors
            if tensor.dtype is torch.float32 or (name in persistent and tensor.is_floating_point() and is_kept(name))}
