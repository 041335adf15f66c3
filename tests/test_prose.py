"""How what people read is set: docstrings begin with their subject, and prose has lines of 100
columns."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("ratel", "nvme_ds", "op_ds", "benchmarks", "tests", "examples")
COLUMNS, MOST_LINES = 100, 350
MADE = {"families.md"}
"""Pages of tables that a command writes."""


def docstrings(path: Path) -> list[tuple[int, str]]:
    """With their lines; those of attributes, too."""
    return [(node.lineno, node.value.value.strip()) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]


def prose_lines(text: str) -> list[tuple[int, str]]:
    """Without tables, pictures, and what stands between fences."""
    lines, is_code = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        is_fence = line.lstrip().startswith("```")
        is_code ^= is_fence
        if not is_code and not is_fence and not line.startswith(("|", "![")):
            lines.append((number, line))
    return lines


def too_long(text: str) -> list[int]:
    return [number for number, line in prose_lines(text) if len(line) > COLUMNS and not re.fullmatch(r"\s*\S+", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_set_in_lines_of_100_columns(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert too_long(text) == []
    assert len(text.splitlines()) <= MOST_LINES or page.name in MADE


def test_what_is_no_prose_may_be_wide() -> None:
    wide = "word " * 30
    assert too_long(f"| {wide} |\n```\n{wide}\n```\n{wide}\nshort\n") == [5]


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_their_subject(folder: str) -> None:
    """A beginning such as *Of one row* says nothing to whoever does not know the line above it."""
    found = [f"{path.relative_to(ROOT)}:{line}" for path in sorted((ROOT / folder).rglob("*.py")) for line, text in docstrings(path)
             if re.match(r"Of\b", text)]
    assert found == []
