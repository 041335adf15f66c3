"""What people give for an adapter, as one description: a rank, a `LoraConfig`, an object of peft's,
or the directory of an adapter to go on with."""

import os
from dataclasses import dataclass
from pathlib import Path

from ratel.errors import RatelError
from ratel.lora.describe.config import OPTIONS, LoraConfig
from ratel.lora.describe.peft_config import CONFIG_FILE, is_peft_config, of_directory, of_object
from ratel.schema import shown


@dataclass(frozen=True, kw_only=True)
class GivenAdapter:
    """``directory``: where the adapter is that training goes on with; None for a new one, which
    `refuse_mistakes` is for."""

    config: LoraConfig
    directory: Path | None = None


def given_adapter(given: object, field: str = "lora") -> GivenAdapter:
    """Raises RatelError for what describes no adapter."""
    if isinstance(given, LoraConfig):
        return GivenAdapter(config=given)
    if is_peft_config(given):
        return GivenAdapter(config=of_object(given, field))
    if isinstance(given, int) and not isinstance(given, bool):
        return GivenAdapter(config=LoraConfig(rank=given, words=_called(field)))
    if isinstance(given, (str, os.PathLike)):
        directory = Path(given).expanduser()
        if not directory.is_dir():
            raise RatelError("is neither a rank nor the directory of an adapter", field=field, value=shown(os.fspath(given)),
                             remedy=f"Give a rank such as 16, or a directory with an {CONFIG_FILE}")
        return GivenAdapter(config=of_directory(directory, field), directory=directory)
    raise RatelError(f"is a {type(given).__name__}, which describes no adapter", field=field, value=shown(given),
                     remedy="Give a rank, a ratel.lora.describe.config.LoraConfig, a peft.LoraConfig, or the directory of an adapter")


def _called(field: str) -> dict[str, str]:
    """The rank is what was given, under its name there."""
    return {**OPTIONS, "rank": field}
