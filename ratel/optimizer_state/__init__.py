"""AdamW's states as safetensors files (docs/state_format.md), to and from `torch.optim.AdamW`."""

from ratel.optimizer_state.adamw import load_adamw_state, save_adamw_state

__all__ = ["load_adamw_state", "save_adamw_state"]
