"""Files with AdamW's moments: names and metadata, checks against a model, one tensor at a time.

    optimizer.safetensors      exp_avg.NAME and exp_avg_sq.NAME, fp32, for every trained parameter NAME
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from ratel.errors import RatelError
from ratel.models.safetensors.files import INDEX_SUFFIX, SUFFIX, TensorFiles, files_of, indexed_files
from ratel.models.safetensors.header import read_header
from ratel.planner.shape import ParamSpec

FORMAT, VERSION = "ratel-adamw", 1
STEM = "optimizer"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""First and second moment, as torch calls them."""

_DIGITS = re.compile(r"[0-9]{1,15}")

REMEDY = "Write one with `ratel export --optimizer`, Session.export(optimizer=True) or ratel.save_adamw_state"


def key_of(moment: str, name: str) -> str:
    return f"{moment}.{name}"


class MomentFiles:
    """Moments and step count (``step``) on disk. Raises RatelError for what is not such a file.

    ``path``: a directory with ``optimizer.safetensors`` or its shards and their index, or that file
    or index itself. ``field``: what the user calls it. Only headers are read before `read`.
    """

    def __init__(self, path: Path, field: str) -> None:
        self._path, self._field = path, field
        paths = self._find()
        self._files = TensorFiles(paths, field)
        self.step = self._step_of(paths)

    def check(self, params: Iterable[ParamSpec]) -> None:
        """Refuse moments of other parameters than ``params``, naming the first difference."""
        difference = next(self._differences(params), None)
        if difference is not None:
            raise RatelError(difference, field=self._field, value=self._path,
                             remedy="Give the states of this model, with the same parameters frozen")

    def read_into(self, moment: str, param: ParamSpec, out: Tensor) -> None:
        """A moment of a parameter into ``out`` (fp32, CPU, 1-D)."""
        key = self._key(moment, param)
        assert key is not None, f"{moment} of {param.name} was not checked"
        self._files.read_into(key, out)

    def _find(self) -> list[Path]:
        if not self._path.is_dir():
            if not self._path.is_file():
                raise RatelError("is neither a file nor a directory", field=self._field, value=self._path,
                                 remedy=REMEDY)
            is_index = self._path.name.endswith(INDEX_SUFFIX)
            return indexed_files(self._path, self._field) if is_index else [self._path]
        paths = files_of(self._path, STEM, self._field)
        if not paths:
            raise RatelError(f"there is no {STEM}{SUFFIX} and no {STEM}{INDEX_SUFFIX} in the directory",
                             field=self._field, value=self._path, remedy=REMEDY)
        return paths

    def _step_of(self, paths: list[Path]) -> int:
        """All shards must say the same: others were written at another time."""
        steps = {path: _read_step(path, self._field) for path in paths}
        first = paths[0]
        for path, step in steps.items():
            if step != steps[first]:
                raise RatelError(f"{path.name} was written after {step} steps, {first.name} after {steps[first]}",
                                 field=self._field, value=self._path, remedy="Write all of them again")
        return steps[first]

    def _differences(self, params: Iterable[ParamSpec]) -> Iterator[str]:
        names = set()
        for param in params:
            for moment in MOMENTS:
                key = self._key(moment, param)
                if key is None:
                    yield f"it lacks {key_of(moment, param.name)}"
                    continue
                names.add(key)
                stored = self._files.tensors[key]
                if stored.shape != param.shape:
                    yield f"{key} is {list(stored.shape)}, the model needs {list(param.shape)}"
                if stored.dtype_name != "F32":
                    yield f"{key} is stored as {stored.dtype_name}, not as F32"
        for key in self._files.tensors:
            if key not in names:
                yield f"it has {key}, which is of no parameter that is trained here"

    def _key(self, moment: str, param: ParamSpec) -> str | None:
        """Moments of tied weights may be stored under any of their names."""
        keys = (key_of(moment, name) for name in (param.name, *param.aliases))
        return next((key for key in keys if key in self._files.tensors), None)


def _read_step(path: Path, field: str) -> int:
    metadata = read_header(path, field).metadata
    if metadata.get("format") != FORMAT:
        raise RatelError(f"its metadata does not say format {FORMAT}", field=field, value=path, remedy=REMEDY)
    version, step = metadata.get("version", ""), metadata.get("step", "")
    if not _DIGITS.fullmatch(version) or not _DIGITS.fullmatch(step):
        raise RatelError(f"its metadata is damaged: version {version!r}, step {step!r}", field=field, value=path,
                         remedy=REMEDY)
    if int(version) > VERSION:
        raise RatelError(f"was written in version {version} of the format; this one reads up to {VERSION}", field=field,
                         value=path, remedy="Use the version of Ratel that wrote it, or a newer one")
    return int(step)
