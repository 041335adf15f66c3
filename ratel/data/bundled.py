"""The text that is always there: what the running Python's standard library says about itself, and our examples."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ratel.data.sources import Source, find_sources
from ratel.errors import RatelError

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "corpus"
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def bundled_sources() -> tuple[Source, ...]:
    """The standard library's documentation, and the example corpus where this is a checkout of the project."""
    data = "\n\n".join(_documentation()).encode("utf-8", errors="replace")
    sources = [Source(name="<documentation of the Python standard library>", suffix=".txt", num_bytes=len(data),
                      data=data)] if data else []
    if _EXAMPLES.is_dir():
        sources.extend(find_sources(_EXAMPLES))
    if not sources:
        raise RatelError("none was given, and this Python comes without the sources of its standard library",
                         field="data", remedy="Name a .txt or .jsonl file, or a directory of them")
    return tuple(sources)


def _documentation() -> Iterator[str]:
    """Docstrings of the top-level modules, then the language reference. Sources are parsed; nothing is imported."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):
        tree = _parse(path)
        if tree is not None:
            yield from _docstrings(tree, path.stem)
    topics = _parse(library / "pydoc_data" / "topics.py")
    if topics is not None:
        yield from _long_strings(topics)


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # One module more or less does not matter; a distribution may leave any of them out.


def _docstrings(node: _Documented, name: str) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text and text.strip():
        yield f"{name}\n{text.strip()}"
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{name}.{child.name}")


def _long_strings(tree: ast.Module) -> Iterator[str]:
    """The texts of ``pydoc_data/topics.py``: values of one dictionary, in order."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.strip()
