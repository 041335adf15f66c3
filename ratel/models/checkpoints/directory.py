"""Weights in a Hugging Face directory: safetensors files, read unit by unit, with what
`from_pretrained` would make of them.

Checkpoints differ from modules: names with or without the base model's prefix, tied weights written
once, experts written one by one that the module holds in one tensor
(`ratel.models.checkpoints.recipes`). A conversion is done for one parameter at a time: on the meta
device to check everything from the headers, on tensors to read.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models.checkpoints.dtypes import kept_in_fp32
from ratel.models.checkpoints.recipes import find_recipes
from ratel.models.checkpoints.refusals import no_weights
from ratel.models.checkpoints.weights import round_ties_to_even, view
from ratel.models.safetensors.files import StoredTensor, TensorFiles, files_of
from ratel.models.safetensors.stored_bits import Run, StoredBits
from ratel.planner.shape import ParamSpec, UnitSpec

log = logging.getLogger(__name__)

EXTRA_STATE = "_extra_state"


class CheckpointSource:
    """The state of ``module`` in ``directory``: its parameters, unit by unit, and what else its
    state dict has.

    ``dtype``: of the computation. In bf16 the upper half of a master is what `from_pretrained`
    rounds the stored number to.
    """

    def __init__(self, directory: Path, module: nn.Module, dtype: torch.dtype = torch.float32, *,
                 tells_of_unused: bool = True) -> None:
        self._directory, self._module, self._dtype = directory, module, dtype
        self._files = TensorFiles(model_files(directory))
        found = find_recipes(module, self._files.tensors)
        self._recipes = found.by_name
        self._kept = kept_in_fp32(module, dtype)
        if tells_of_unused:
            self._tell_of(found.unused)

    def check(self, params: Iterable[ParamSpec]) -> None:
        missing, wrong = [], []
        for param in params:
            found = self._shape_of(param)
            if found is None:
                missing.append(param.name)
            elif tuple(found) != param.shape:
                wrong.append(f"{param.name} is {list(found)}, the model needs {list(param.shape)}")
        if missing:
            raise self._lacking(missing)
        if wrong:
            raise self._misshapen(wrong)

    def _lacking(self, names: list[str]) -> RatelError:
        return RatelError(f"the weights lack {_few(names)}", field="model", value=self._directory,
                          remedy="Check that the files are complete and belong to this config.json")

    def _misshapen(self, descriptions: list[str]) -> RatelError:
        return RatelError(f"weights of the wrong shape: {_few(descriptions)}", field="model", value=self._directory,
                          remedy="Check that the files belong to this config.json")

    def has(self, param: ParamSpec) -> bool:
        """Whether it is stored, in the shape that the model needs."""
        return self._shape_of(param) == param.shape

    @property
    def element_bytes(self) -> int:
        """Conversions make tensors of what was read, beside it."""
        return 8 if any(recipe.converter is not None for recipe in self._recipes.values()) else 4

    def read(self, unit: UnitSpec, out: Tensor) -> None:
        for param in unit.params:
            name = self._stored_name(param)
            assert name is not None, param.name
            recipe = self._recipes[name]
            if recipe.converter is None:
                self._files.read_into(recipe.parts[0][0], out[param.offset : param.end])
            else:
                view(out, param).copy_(self._produce(name, self._files.read))
            if self._dtype is torch.bfloat16 and name not in self._kept:
                round_ties_to_even(out[param.offset : param.end])

    def stored_bits(self, unit: UnitSpec) -> StoredBits | None:
        runs = []
        for param in sorted(unit.params, key=lambda p: p.offset):
            recipe = self._recipes[self._stored_name(param)]
            stored = self._files.tensors[recipe.parts[0][0]]
            if recipe.converter is not None or stored.dtype is not torch.bfloat16:
                return None
            runs.append(Run(file=stored.file, offset=stored.offset, begin=param.offset, end=param.end))
        return StoredBits(runs)

    # --- what is no parameter -------------------------------------------------------------------------------------

    def load_buffers(self) -> None:
        """Give the module the buffers, and the extra state, that its state dict has. Raises
        RatelError for one that is missing, which `from_pretrained` would make up, or has another
        shape."""
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        optional = getattr(self._module, "_keys_to_ignore_on_load_missing", None) or ()
        missing = []
        for name, current in self._module.state_dict().items():
            if name in parameters:
                continue
            if name in self._recipes:
                self._load_buffer(name, current)
            elif not any(re.search(pattern, name) for pattern in optional):
                missing.append(name)
        if missing:
            raise self._lacking(missing)

    def _load_buffer(self, name: str, current: object) -> None:
        value = self._produce(name, self._files.read)
        path, _, attribute = name.rpartition(".")
        owner = self._module.get_submodule(path)
        if attribute == EXTRA_STATE:
            owner.set_extra_state(value)
            return
        if value.shape != current.shape:
            raise self._misshapen([f"{name} is {list(value.shape)}, the model needs {list(current.shape)}"])
        dtype = torch.float32 if name in self._kept and current.is_floating_point() else current.dtype
        owner._buffers[attribute] = value.to(dtype, copy=True).contiguous()

    def untie(self) -> None:
        """Where the configuration ties two tensors that are stored with unlike values, each gets
        its own, as in `from_pretrained`."""
        for target, origin in getattr(self._module, "all_tied_weights_keys", {}).items():
            if target in self._recipes and origin in self._recipes and not self._are_equal(target, origin):
                log.warning("%s: config.json ties %s to %s, but their stored values differ: they are not tied", self._directory,
                            target, origin)
                path, _, attribute = target.rpartition(".")
                tied = self._module.get_parameter(origin)
                own = nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)
                self._module.get_submodule(path)._parameters[attribute] = own
                self._module._ratel_untied = True

    def _are_equal(self, *names: str) -> bool:
        one, other = (self._recipes[name] for name in names)
        if one is other or one.parts == other.parts:
            return True
        if one.converter is None and other.converter is None:
            return self._files.are_equal(one.parts[0][0], other.parts[0][0], self._dtype)
        tensors = [self._produce(name, self._files.read).to(self._dtype) for name in names]
        return torch.equal(*tensors)

    # --- names ----------------------------------------------------------------------------------------------------

    def _shape_of(self, param: ParamSpec) -> tuple[int, ...] | None:
        name = self._stored_name(param)
        if name is None:
            return None
        return tuple(self._produce(name, lambda stored: _outline(self._files.tensors[stored])).shape)

    def _stored_name(self, param: ParamSpec) -> str | None:
        """Tied weights may be stored under any of their names."""
        return next((name for name in (param.name, *param.aliases) if name in self._recipes), None)

    def _produce(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        recipe = self._recipes[name]
        if recipe.converter is None:
            return get(recipe.parts[0][0])
        converter = copy.deepcopy(recipe.converter)
        for stored, pattern in recipe.parts:
            converter.add_tensor(recipe.first, stored, pattern, get(stored))
        try:
            produced = converter.convert(recipe.first, model=self._module, config=self._module.config)
        except Exception as error:
            raise RatelError(f"the stored tensors cannot be converted to {name}: {error}", field="model",
                             value=self._directory, remedy="Check that the files are complete") from error
        tensor = produced.get(name)
        if tensor is None:
            raise RatelError(f"the stored tensors do not give {name}", field="model", value=self._directory,
                             remedy="Save the model again with transformers' save_pretrained")
        return tensor[0] if isinstance(tensor, list) else tensor

    def _tell_of(self, unused: list[str]) -> None:
        """Some checkpoints hold what a model has no place for, such as rotary frequencies; a
        config.json with too few layers looks the same."""
        if not unused:
            return
        ignored = [*(getattr(self._module, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
        buffers = {name for name, _ in self._module.named_buffers()}
        strange = [name for name in unused if name not in buffers and not any(re.search(k, name) for k in ignored)]
        if strange:
            log.warning("%s: of the weights %s are not used: config.json has no place for them", self._directory, _few(strange))


def _outline(stored: StoredTensor) -> Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def _few(items: list[str], limit: int = 4) -> str:
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def model_files(directory: Path) -> list[Path]:
    """The files with the weights. Raises RatelError if there are none."""
    paths = files_of(directory, "model", "model")
    if not paths:
        raise no_weights(directory)
    return paths
