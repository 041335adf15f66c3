"""Sessions that commit. No tests here."""

import os
from pathlib import Path
from typing import Any

from ratel.runtime.session.session import Session
from tests.support.sessions import open_session


def open_decaying(ssd: "Path | list[Path]", family: str = "llama", **options: Any) -> Session:
    return open_session(ssd, family, **{"weight_decay": 0.1, **options})


def on_ssd(folder: Path) -> set[str]:
    return {os.path.realpath(path) for path in folder.iterdir()}
