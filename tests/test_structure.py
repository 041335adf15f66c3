"""How large a file and a folder may be: what one sitting reads, and what a reader tells apart by
name."""

from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("ratel", "op_ds", "nvme_ds", "benchmarks")
MOST_LINES, MOST_MODULES = 350, 15
"""Modules: besides ``__init__``, which is the folder's face."""


def crowded(root: Path, folder: str) -> dict[str, int]:
    modules = [path for path in (root / folder).rglob("*.py") if path.name != "__init__.py"]
    counts = Counter(str(path.parent.relative_to(root)) for path in modules)
    return {name: count for name, count in counts.items() if count > MOST_MODULES}


def long_files(root: Path, folder: str) -> dict[str, int]:
    lengths = {str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in (root / folder).rglob("*.py")}
    return {name: length for name, length in lengths.items() if length > MOST_LINES}


@pytest.mark.parametrize("folder", PRODUCT)
def test_a_folder_is_told_apart_by_name(folder: str) -> None:
    assert crowded(ROOT, folder) == {}


@pytest.mark.parametrize("folder", [*PRODUCT, "examples"])
def test_a_file_is_read_in_one_sitting(folder: str) -> None:
    assert long_files(ROOT, folder) == {}


def test_what_is_too_large_is_found(tmp_path: Path) -> None:
    (tmp_path / "full" / "inner").mkdir(parents=True)
    for number in range(MOST_MODULES):
        (tmp_path / "full" / f"m{number}.py").write_text("x = 1\n" * MOST_LINES)
    (tmp_path / "full" / "__init__.py").write_text("")
    (tmp_path / "full" / "inner" / "m.py").write_text("")
    assert crowded(tmp_path, "full") == long_files(tmp_path, "full") == {}
    (tmp_path / "full" / "more.py").write_text("x = 1\n" * (MOST_LINES + 1))
    assert crowded(tmp_path, "full") == {"full": MOST_MODULES + 1}
    assert long_files(tmp_path, "full") == {"full/more.py": MOST_LINES + 1}
