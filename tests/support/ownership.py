"""Short runs whose files are copied, moved and planted. No tests here."""

from pathlib import Path
from typing import Any

import pytest

from ratel.runtime.states.saved_state import SavedState
from ratel.training.states import StateDirectory
from tests.support.resume import make_model, make_text, train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model"), make_text(directory / "text.jsonl")


def start(model: Any, data: Any, out: Path, **options: Any) -> None:
    train(model, data, out, **{"warmup_steps": 1, "eval_every": 0, **options})


def committed(inputs: tuple[Path, Path], out: Path, ssd: "Path | list[Path]", **options: Any) -> Path:
    """A run on SSD that commits every step."""
    start(*inputs, out, **{"steps": 3, "ssd": ssd if isinstance(ssd, list) else [ssd], "tier": "ssd", "durable": "step",
                           "save_every": 1, **options})
    return out


def everything(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def newest(out: Path) -> SavedState:
    return SavedState(StateDirectory(out / "state").newest())


def fill(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
