"""A Hugging Face directory from a state on disk: no session, no device, one unit in memory at a
time."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ratel import models
from ratel.config import NEXT_TOKEN
from ratel.data.tokens.tokenizer import OwnTokenizer, load_for, write_tokenizer
from ratel.errors import RatelError
from ratel.lora.adaptation import Adaptation
from ratel.lora.describe.as_json import of_json
from ratel.lora.request import AdapterRequest
from ratel.models import Parts
from ratel.models.calls.tasks import Task
from ratel.models.presets import PRESETS
from ratel.planner.formats import FP32
from ratel.planner.shape import UnitSpec
from ratel.runtime.session.opening import DTYPES
from ratel.runtime.states.base import Digests, digest_of, refuse_other
from ratel.runtime.states.durable_files import existing_part
from ratel.runtime.states.export import export_model
from ratel.runtime.states.export_adapter import export_adapter
from ratel.runtime.states.moments import export_moments
from ratel.runtime.states.saved_state import SavedState
from ratel.training.export_merged import export_merged
from ratel.training.options import read_run
from ratel.training.output import beside_a_run
from ratel.training.states import find_state


def export_state(state: Path, out: Path, *, model: str | None = None, dtype: str | None = None,
                 optimizer: bool = False, ssd: Sequence[str] = (), merge: bool = False) -> Path:
    """Write ``out`` from a state, or the newest one of a run, as the run itself writes OUT/model.
    Returns it.

    ``model``, ``dtype``: by default the run's own, as its config.json has them. ``optimizer``: with
    the moments, for PyTorch. ``merge``: of a run that trained an adapter, its model with the adapter
    added to the weights, not the adapter. ``ssd``: where the run's SSD files are, if they are not
    where they were. Every chunk that is read is verified.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RatelError("is not an empty directory", field="--out", value=out, remedy="Give one that does not exist")
    path = find_state(state, "--state")
    with beside_a_run(path, "--state"):
        saved = SavedState(path, ssd)
        saved.check_files()
        if not merge:
            return _export_state(path, saved, out, model, dtype, optimizer)
        return _export_merged(path, saved, out, model, dtype, optimizer)


def _export_merged(path: Path, saved: SavedState, out: Path, model: str | None, dtype: str | None, optimizer: bool) -> Path:
    if "adapter" not in saved.training:
        raise RatelError("has no adapter to merge", field="--merge", value=path, remedy="Leave --merge out")
    if optimizer:
        raise RatelError("are an adapter's, and it is merged", field="--optimizer", value=True, remedy="Leave one of the two out")
    source = model if model is not None else _model_of_run(read_run(path.parent.parent), path, saved)
    with TemporaryDirectory(dir=existing_part(out)) as folder:
        adapter = _export_state(path, saved, Path(folder) / "adapter", model, None, False)
        return export_merged(source, adapter, out, dtype=dtype)


def _export_state(path: Path, saved: SavedState, out: Path, model: str | None, dtype: str | None, optimizer: bool) -> Path:
    options = read_run(path.parent.parent)
    source = model if model is not None else _model_of_run(options, path, saved)
    adaptation = _adaptation(saved)
    parts = models.load(source, dtype=DTYPES[saved.training["dtype"]], device=torch.device("cpu"),
                        seed=saved.training["seed"], task=Task.of(saved.training.get("task", NEXT_TOKEN)),
                        frozen=saved.frozen_names if adaptation is None else (), additions=adaptation)
    try:
        saved.check_model(parts.spec)
        if saved.base is not None:
            check_base(parts, saved.base)
        other = saved.other_state()
        if other is not None:
            parts.stored.set_other_state(other)
        beside = _beside(parts, saved, source, options, optimizer)
        if adaptation is not None:
            export_adapter(parts, adaptation, lambda unit: merged(saved, unit, parts), out, dtype=DTYPES[dtype or "fp32"],
                           beside=beside)
        else:
            kind = DTYPES[dtype or options.get("dtype") or saved.training["dtype"]]
            export_model(parts, lambda unit: [(0, merged(saved, unit, parts))], out, kind, beside)
    finally:
        parts.close()
    return out


def _adaptation(saved: SavedState) -> Adaptation | None:
    """The adapter that the state holds, as it was begun: what it was begun with is overwritten by
    the state, but for what pissa and olora have taken out of the base."""
    described = saved.training.get("adapter")
    if described is None:
        return None
    training = saved.training
    return Adaptation(AdapterRequest(config=of_json(described), is_new=False), seed=training["seed"], dtype=DTYPES[training["dtype"]])


def _beside(parts: Parts, saved: SavedState, source: str, options: dict[str, Any], optimizer: bool) -> Callable[[Path], None]:
    """Writes what lies beside the weights."""
    extra = saved.training["extra"]
    tokenizer, own = _tokenizer(source, options) if extra.get("has_tokenizer") else (None, None)  # before the long work
    if tokenizer is not None:
        tokenizer.chat_template = extra["chat_template"]

    def beside(directory: Path) -> None:
        if optimizer:
            export_moments(parts.spec, lambda unit, plane: saved.read(unit.index, plane, encoding=FP32), saved.training["updates"], directory)
        if tokenizer is not None:
            write_tokenizer(tokenizer, directory, own)

    return beside


def merged(saved: SavedState, unit: UnitSpec, parts: Parts) -> Tensor:
    """The fp32 master: ``(hi << 16) + lo`` on the bits. Elements without `lo` are bf16 values. What
    a state does not hold is the model's own."""
    bits = torch.zeros(unit.num_elements, dtype=torch.int32)
    hi, lo = saved.read(unit.index, "hi"), saved.read(unit.index, "lo")
    if saved.base is not None and unit.num_trainable < unit.num_elements:
        halves = _frozen_halves(parts, unit, saved.base)
        hi, lo = _joined(hi, halves["hi"]), _joined(lo, halves.get("lo"))
    bits[:] = hi.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    if lo is not None:
        bits[: lo.numel()] += lo  # wraps around, as it must
    return bits.view(torch.float32)


def _joined(trained: Tensor | None, frozen: Tensor | None) -> Tensor | None:
    parts = [part for part in (trained, frozen) if part is not None]
    return torch.cat(parts) if parts else None


def check_base(parts: Parts, base: Digests) -> None:
    """Refuse a model with other frozen parameters than the state names."""
    found: Digests = {}
    for unit in parts.spec.units:
        if unit.num_trainable < unit.num_elements:
            for plane, values in _frozen_halves(parts, unit, base).items():
                found.setdefault(plane, {})[unit.name] = digest_of([values])
    refuse_other(found, base)


def _frozen_halves(parts: Parts, unit: UnitSpec, base: Digests) -> dict[str, Tensor]:
    """As the run had them: with a lower half where the state names one."""
    master = torch.empty(unit.num_elements, dtype=torch.float32)
    parts.stored.read_unit(unit.index, master)
    bits = master[unit.num_trainable :].view(torch.int32)
    hi = (bits + 0x8000).bitwise_right_shift_(16)
    lo = (bits - (hi << 16)).to(torch.int16)
    halves = {"hi": hi.to(torch.int16).view(torch.bfloat16), "lo": lo}
    return {plane: half for plane, half in halves.items() if unit.name in base.get(plane, {})}


def _model_of_run(options: dict[str, Any], state: Path, saved: SavedState) -> str:
    model = options.get("model")
    frozen = "" if saved.base is None else f", whose {saved.num_left_out:,} frozen parameters the state does not hold"
    if model is None:
        raise RatelError(f"is not said: there is no config.json of a run beside {state}", field="--model",
                         remedy=f"Give the directory or preset that the run was started with{frozen}")
    if not os.path.isdir(model) and model not in PRESETS:
        raise RatelError(f"the run's model ({model}) is neither a directory here nor a preset", field="--model",
                         remedy="Give the directory or preset with its configuration" if saved.base is None else
                         f"Give its directory{frozen}, wherever it lies now")
    return model


def _tokenizer(source: str, options: dict[str, Any]) -> tuple[Any, OwnTokenizer | None]:
    """As `ratel train` finds it. One that was given as an object has left only the name of its
    type."""
    named = options.get("tokenizer")
    if named is not None and not os.path.isdir(named):
        raise RatelError("the run's tokenizer is not a directory here", field="tokenizer", value=named,
                         remedy="Export from the run's Python program with Session.load and Session.export")
    tokenizer, own = load_for(options.get("task", NEXT_TOKEN), named if named is not None else source)
    return tokenizer, own if named is None else None
