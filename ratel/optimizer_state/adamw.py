"""`torch.optim.AdamW` filled from files of moments, and such files written from it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratel.errors import RatelError
from ratel.planner.shape import ParamSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import AdamW, Optimizer

    from ratel.models.safetensors.writer import Piece
    from ratel.optimizer_state.files import MomentFiles


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A parameter that the optimizer updates, with the optimizer's group that it is in."""

    spec: ParamSpec
    param: "nn.Parameter"
    group: dict[str, Any]


def load_adamw_state(path: "str | os.PathLike[str]", model: "nn.Module", optimizer: "AdamW") -> None:
    """Give ``optimizer`` the moments and the step count of ``path``, for parameters of the same
    name in ``model``.

    ``path``: what `save_adamw_state` or ``ratel export --optimizer`` wrote: a directory, or the
    file in it. Every parameter that the optimizer has and that requires grad gets ``exp_avg`` and
    ``exp_avg_sq`` in its own dtype and on its device; tied weights get one. Learning rates, betas
    and groups stay as they are. Raises RatelError if a name or shape differs, and for amsgrad or an
    optimizer that is not AdamW; then nothing has changed.
    """
    from ratel.optimizer_state.files import MOMENTS, MomentFiles

    trained = find_trained(model, optimizer)
    moments = MomentFiles(Path(path), "path")
    moments.check(each.spec for each in trained)
    for each in trained:
        read = {moment: _like(each.param, _read(moments, moment, each.spec)) for moment in MOMENTS}
        optimizer.state[each.param] = {"step": _step_like_torch(moments.step, each), **read}


def _read(moments: "MomentFiles", moment: str, spec: ParamSpec) -> "Tensor":
    import torch

    values = torch.empty(spec.shape, dtype=torch.float32)
    moments.read_into(moment, spec, values.view(-1))
    return values


def save_adamw_state(path: "str | os.PathLike[str]", model: "nn.Module", optimizer: "AdamW") -> Path:
    """Write the moments and the step count of ``optimizer``; returns ``path``.

    ``path``: a directory, in which ``optimizer.safetensors`` is written (sharded if it is large),
    or the name of one file that ends in ``.safetensors``. Older files of that name are replaced
    once the new ones are complete. Moments are stored as fp32. Raises RatelError before the first
    step, if the parameters' step counts differ (Ratel has one for all), and for what
    `load_adamw_state` refuses.
    """
    from ratel.models.safetensors.files import SUFFIX
    from ratel.models.safetensors.writer import SHARD_BYTES
    from ratel.optimizer_state.files import STEM
    from ratel.optimizer_state.writing import replace_moments

    trained = find_trained(model, optimizer)
    step = common_step(trained, optimizer)
    pieces = [_piece(each, optimizer) for each in trained]
    target = Path(path)
    if target.name.endswith(SUFFIX) and not target.is_dir():
        replace_moments(target.parent, pieces, step=step, stem=target.name.removesuffix(SUFFIX),
                        shard_bytes=sum(piece.num_bytes for piece in pieces))
    else:
        replace_moments(target, pieces, step=step, stem=STEM, shard_bytes=SHARD_BYTES)
    return target


def find_trained(model: "nn.Module", optimizer: "Optimizer") -> list[Trained]:
    """The optimizer's parameters that require grad, in the model's order."""
    _check_kind(optimizer)
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    names: dict[int, list[str]] = {}
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    for name, param in inner.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    for index, group in enumerate(optimizer.param_groups):
        for number, param in enumerate(group["params"]):
            if id(param) not in names:
                raise RatelError(f"parameter {number} of its group {index}, {list(param.shape)}, is not in the model",
                                 field="optimizer",
                                 remedy="Give the model whose parameters the optimizer was made with")
    trained = [Trained(spec=ParamSpec(name=names[id(param)][0], shape=tuple(param.shape),
                                      aliases=tuple(names[id(param)][1:])), param=param, group=groups[id(param)])
               for param in inner.parameters() if id(param) in groups and param.requires_grad]
    if not trained:
        raise RatelError("it has no parameter that requires grad", field="optimizer")
    return trained


def _check_kind(optimizer: "Optimizer") -> None:
    from torch.optim import AdamW

    if not isinstance(optimizer, AdamW):
        raise RatelError("is not torch.optim.AdamW", field="optimizer", value=type(optimizer).__name__)
    if any(group["amsgrad"] for group in optimizer.param_groups):
        raise RatelError("keeps a maximum that Ratel does not have", field="optimizer", value="AdamW(amsgrad=True)",
                         remedy="Use amsgrad=False")


def common_step(trained: list[Trained], optimizer: "Optimizer") -> int:
    steps = {each.spec.name: int(optimizer.state.get(each.param, {}).get("step", 0)) for each in trained}
    first = trained[0].spec.name
    for name, step in steps.items():
        if step != steps[first]:
            raise RatelError(f"{name} was updated {step} times, {first} {steps[first]} times", field="optimizer",
                             remedy="Ratel has one step count; freeze parameters that get no gradient")
    if steps[first] == 0:
        raise RatelError("has no states before its first step", field="optimizer", remedy="Call optimizer.step() first")
    return steps[first]


def _piece(each: Trained, optimizer: "Optimizer") -> "Piece":
    import torch

    from ratel.models.safetensors.writer import Outline, Piece
    from ratel.optimizer_state.files import MOMENTS, key_of

    def make() -> "Iterator[tuple[str, Tensor]]":
        state = optimizer.state[each.param]
        return ((key_of(moment, each.spec.name), state[moment].detach().to("cpu", torch.float32)) for moment in MOMENTS)

    outline = Outline(shape=tuple(each.spec.shape), dtype=torch.float32)
    return Piece(outlines={key_of(moment, each.spec.name): outline for moment in MOMENTS}, make=make)


def _like(param: "nn.Parameter", values: "Tensor") -> "Tensor":
    """The values in the parameter's dtype, device and memory format, as torch makes its states."""
    import torch

    return torch.empty_like(param, requires_grad=False).copy_(values)


def _step_like_torch(step: int, each: Trained) -> "Tensor":
    """Where the optimizer's kernel wants it: beside the parameter, or on the CPU for the others."""
    import torch

    beside = each.group["capturable"] or each.group["fused"]
    return torch.tensor(float(step), dtype=torch.float32, device=each.param.device if beside else "cpu")
