"""How a model is called: on which arguments, and what counts as its result."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models.calls.documents import MADE, OWN, MaskFunctions, document_mask, restarts
from ratel.models.structure.inputs import tree_map

LossFn = Callable[[nn.Module, Any], Tensor]


class LossRunner:
    """Any module with a ``loss_fn(module, batch)``. Floating inputs of the module are cast to the
    compute dtype."""

    def __init__(self, module: nn.Module, loss_fn: LossFn, device: torch.device, dtype: torch.dtype) -> None:
        self._module, self._loss_fn, self._device = module, loss_fn, device
        self._cast = None
        if dtype is not torch.float32:
            # Only what the model is called with: targets, which loss_fn reads from the batch, keep
            # their precision.
            self._cast = module.register_forward_pre_hook(
                lambda _, args, kwargs: (cast(args, dtype), cast(kwargs, dtype)), with_kwargs=True)

    def run(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self._module, to_device(batch, self._device))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            returned = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise RatelError(f"returned {returned}", field="loss_fn",
                             remedy="Return the batch's mean loss, a tensor that is a scalar")
        return loss

    def close(self) -> None:
        if self._cast is not None:
            self._cast.remove()


class CausalLMRunner:
    """A Hugging Face causal language model: logits of a batch, never its own loss."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._module, self._device, self._dtype = module, device, dtype
        accepted = inspect.signature(module.forward).parameters
        self._accepts_positions = "position_ids" in accepted
        takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        self._fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted or takes_more else {}
        if "output_router_logits" in accepted:
            # They are collected from inside the blocks, for a loss of their own.
            self._fixed["output_router_logits"] = False
        self._is_flash = "flash" in str(getattr(module.config, "_attn_implementation", ""))
        self._mask_functions = MaskFunctions(module)
        self.documents: str | None = OWN
        """How those of one row are kept apart; None: they are not."""
        self.skips_mask = False
        """`run_on_nothing` hands the model a finished mask, so that it makes none (nor waits for
        the device)."""

    def run(self, batch: Mapping[str, Tensor], attention_mask: Tensor | None = None) -> Tensor:
        arguments = dict(self._fixed, input_ids=batch["input_ids"].to(self._device, non_blocking=True))
        positions, shown = batch.get("position_ids"), nullcontext()
        if positions is not None:
            moved = positions.to(self._device, non_blocking=True)
            if self._accepts_positions:
                arguments["position_ids"] = moved
            if attention_mask is None and self.documents == OWN:
                shown = self._mask_functions.shown(moved)
            if attention_mask is None and self.documents == MADE and restarts(positions):
                attention_mask = document_mask(moved, self._dtype)
            if self._is_flash:
                self._refuse_flash(positions)
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        with shown:
            output = self._module(**arguments)
        return output.logits if hasattr(output, "logits") else output[0]

    def _refuse_flash(self, positions: Tensor) -> None:
        # transformers looks for restarts only in batches of one row there, and mixes documents
        # silently otherwise.
        if positions.shape[0] > 1 and positions.device.type == "cpu" and restarts(positions):
            raise RatelError("flash attention keeps packed documents apart only in micro-batches of one row",
                             field="attention", value="flash", remedy="Use --micro-batch 1, or --attention sdpa")

    def probe_batch(self) -> dict[str, Tensor]:
        """Four tokens, in two documents where these are kept apart: enough to see every path a
        batch takes."""
        positions = [0, 1, 2, 3] if self.documents is None else [0, 1, 0, 1]
        return {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "position_ids": torch.tensor([positions])}

    def plain_batch(self) -> dict[str, Tensor]:
        """Arguments of the model itself, of one document."""
        used = {name: value for name, value in self._fixed.items() if name != "output_router_logits"}
        return used | {"input_ids": torch.zeros(1, 4, dtype=torch.int64, device=self._device)}

    def run_on_nothing(self, num_rows: int) -> Tensor:
        """A forward on ``num_rows`` sequences of one token each, for what comes after the
        blocks."""
        zeros = torch.zeros(num_rows, 1, dtype=torch.int64, device=self._device)
        mask = torch.zeros(1, 1, 1, 1, dtype=self._dtype, device=self._device) if self.skips_mask else None
        return self.run({"input_ids": zeros, "position_ids": zeros}, mask)

    def close(self) -> None:
        pass


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping) and type(batch) is not dict:  # a tokenizer's BatchEncoding and the like
        batch = dict(batch)
    return tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, batch)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)
