"""The code that updates planes, by the name that the table of formats has for it
(`ratel.planner.formats`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ratel.native import op_ds

Planes = Mapping[str, torch.Tensor]
"""By name, 1-D, contiguous and of one length; ``g`` is the gradient."""

_HALVES_AND_MOMENTS = ("hi", "lo", "m", "v")
_GRAD_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_MOMENT_TYPES = {**_GRAD_TYPES, torch.uint8: "8bit"}


@dataclass(frozen=True, kw_only=True)
class UpdateCode:
    """Both give the same bits. Scalars are those of `op_ds.Pool.adamw`: ``lr`` to ``ranges``, and
    ``rounding``, which only moments that are rounded need."""

    in_memory: Callable[..., None]
    """``(pool, planes, targets, **scalars)``: by the threads of the pool, from ``planes`` into
    ``targets``, which may be the same."""
    on_gpu: Callable[..., None]
    """The update on a GPU, ``(planes, **scalars)``, in place."""


def _adamw_in_memory(pool: op_ds.Pool, planes: Planes, targets: Planes, *, rounding: op_ds.Rounding | None,
                     **scalars: Any) -> None:
    _rounded_in_memory(pool, planes, targets, rounding=None, **scalars)


def _rounded_in_memory(pool: op_ds.Pool, planes: Planes, targets: Planes, **scalars: Any) -> None:
    grad = planes["g"]
    pool.adamw(*(planes[name].data_ptr() for name in (*_HALVES_AND_MOMENTS, "g")), grad.numel(),
               to=tuple(targets[name].data_ptr() for name in _HALVES_AND_MOMENTS), grad_dtype=_GRAD_TYPES[grad.dtype],
               moments=_MOMENT_TYPES[planes["m"].dtype], **scalars)


def _adamw_on_gpu(planes: Planes, *, rounding: op_ds.Rounding | None, **scalars: Any) -> None:
    _rounded_on_gpu(planes, rounding=None, **scalars)


def _rounded_on_gpu(planes: Planes, **scalars: Any) -> None:
    from ratel.runtime.updates.gpu_adamw import adamw_

    adamw_(*(planes[name] for name in (*_HALVES_AND_MOMENTS, "g")), **scalars)


UPDATES = {"adamw": UpdateCode(in_memory=_adamw_in_memory, on_gpu=_adamw_on_gpu),
           "adamw with rounded moments": UpdateCode(in_memory=_rounded_in_memory, on_gpu=_rounded_on_gpu)}
