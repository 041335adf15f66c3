"""Writes a trained adapter as a directory that peft and vLLM load."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ratel.lora.adaptation import Adaptation
from ratel.lora.files import write_adapter
from ratel.models import Parts
from ratel.planner.shape import UnitSpec
from ratel.runtime.states.export import export_directory


def export_adapter(parts: Parts, adaptation: Adaptation, read: Callable[[UnitSpec], Tensor], path: Path, *,
                   dtype: torch.dtype = torch.float32, beside: Callable[[Path], None] | None = None) -> Path:
    """Write ``path`` as `export_directory` does. ``read``: a unit's fp32 weights, 1-D in its layout;
    only units with something of the adapter are read. ``beside`` writes further files into the
    directory that it is given."""
    targets, tensors = adaptation.for_base_as_stored(adaptation.trained(parts.spec.units, read))

    def write(unfinished: Path) -> None:
        if beside is not None:
            beside(unfinished)
        write_adapter(unfinished, targets, tensors, base_name=parts.stored.origin.name, base=adaptation.fingerprint(),
                      task="CAUSAL_LM" if parts.is_causal_lm else None, dtype=dtype)

    return export_directory(path, "the adapter", write)
