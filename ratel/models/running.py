"""How a model is called: on which arguments, and what counts as its result."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ratel.models.inputs import tree_map

LossFn = Callable[[nn.Module, Any], Tensor]


class Runner(Protocol):
    """Calls the module. ``run`` is the forward on a batch, ``run_tail`` the one whose head is thrown away."""

    def run(self, batch: Any) -> Any: ...


class LossRunner:
    """Any module with a ``loss_fn(module, batch)``. Floating inputs of the module are cast to the compute dtype."""

    def __init__(self, module: nn.Module, loss_fn: LossFn, device: torch.device, dtype: torch.dtype) -> None:
        self._module, self._loss_fn, self._device = module, loss_fn, device
        self._cast = None
        if dtype is not torch.float32:
            # Only what the model is called with: targets, which loss_fn reads from the batch, keep their precision.
            self._cast = module.register_forward_pre_hook(
                lambda _, args, kwargs: (cast(args, dtype), cast(kwargs, dtype)), with_kwargs=True)

    def run(self, batch: Any) -> Tensor:
        return self._loss_fn(self._module, to_device(batch, self._device))

    def close(self) -> None:
        if self._cast is not None:
            self._cast.remove()


class CausalLMRunner:
    """A Hugging Face causal language model: logits of a batch, never its own loss."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        accepted = inspect.signature(module.forward).parameters
        self._accepts_positions = "position_ids" in accepted
        self._fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        if "output_router_logits" in accepted:
            # They are collected from inside the blocks, for a loss of their own.
            self._fixed["output_router_logits"] = False

    def run(self, batch: Mapping[str, Tensor], attention_mask: Tensor | None = None) -> Tensor:
        arguments = dict(self._fixed, input_ids=batch["input_ids"].to(self._device, non_blocking=True))
        positions = batch.get("position_ids")
        if positions is not None and self._accepts_positions:
            arguments["position_ids"] = positions.to(self._device, non_blocking=True)
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        output = self._module(**arguments)
        return output.logits if hasattr(output, "logits") else output[0]

    def probe_batch(self) -> dict[str, Tensor]:
        """Four tokens in two documents: enough to see every path a batch takes."""
        return {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "position_ids": torch.tensor([[0, 1, 0, 1]])}

    def run_on_nothing(self, num_rows: int) -> Tensor:
        """A forward on ``num_rows`` sequences of one token each, for what comes after the blocks."""
        zeros = torch.zeros(num_rows, 1, dtype=torch.int64, device=self._device)
        return self.run({"input_ids": zeros, "position_ids": zeros})

    def close(self) -> None:
        pass


def to_device(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, batch)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)
