"""How large a function, a file and a folder may be: what a glance takes in, what one sitting reads,
and what a reader tells apart by name."""

import ast
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("ratel", "op_ds", "nvme_ds", "benchmarks")
MOST_LINES, MOST_MODULES = 350, 15
"""Modules: besides ``__init__``, which is the folder's face."""
MEAN_LINES, MOST_FUNCTION_LINES = 10, 60
"""Lines of a function, from ``def`` to its last one, its docstring among them."""


def crowded(root: Path, folder: str) -> dict[str, int]:
    modules = [path for path in (root / folder).rglob("*.py") if path.name != "__init__.py"]
    counts = Counter(str(path.parent.relative_to(root)) for path in modules)
    return {name: count for name, count in counts.items() if count > MOST_MODULES}


def long_files(root: Path, folder: str) -> dict[str, int]:
    lengths = {str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in (root / folder).rglob("*.py")}
    return {name: length for name, length in lengths.items() if length > MOST_LINES}


def function_lengths(root: Path, folder: str) -> dict[str, int]:
    """Lines of every function and method, those inside others as well."""
    found = {}
    for path in sorted((root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[f"{path.relative_to(root)}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return found


@pytest.mark.parametrize("folder", ["ratel", "op_ds", "nvme_ds"])
def test_functions_are_short(folder: str) -> None:
    lengths = function_lengths(ROOT, folder)
    assert sum(lengths.values()) / len(lengths) < MEAN_LINES
    assert {name: length for name, length in lengths.items() if length > MOST_FUNCTION_LINES} == {}


@pytest.mark.parametrize("folder", PRODUCT)
def test_a_folder_is_told_apart_by_name(folder: str) -> None:
    assert crowded(ROOT, folder) == {}


@pytest.mark.parametrize("folder", [*PRODUCT, "tests", "examples"])
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


def test_lines_of_functions_are_counted_with_those_inside(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "m.py").write_text("@cache\ndef f(a,\n      b):\n    def g():\n        return 1\n\n    return g\n")
    assert function_lengths(tmp_path, "full") == {"full/m.py:2 f": 6, "full/m.py:4 g": 2}
