"""The text that is always there: what the running Python's standard library says about itself, and
our examples."""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ratel import probe_cache
from ratel.data.sources.files import Source, find_sources
from ratel.errors import RatelError

_EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "corpus"
_METHOD = 1
"""Raised when other text is taken out of the same sources: what is kept of it is then not used."""
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def bundled_sources() -> tuple[Source, ...]:
    """The standard library's documentation, and the example corpus where this is a checkout of the
    project."""
    data = _documentation()
    sources = [Source(name="<documentation of the Python standard library>", suffix=".txt", num_bytes=len(data),
                      data=data)] if data else []
    if _EXAMPLES.is_dir():
        sources.extend(find_sources(_EXAMPLES))
    if not sources:
        raise RatelError("none was given, and this Python comes without the sources of its standard library",
                         field="data", remedy="Name a .txt or .jsonl file, or a directory of them")
    return tuple(sources)


def _documentation() -> bytes:
    """UTF-8. Kept from one run to the next: parsing the sources takes one to two seconds."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths, topics = sorted(library.glob("*.py")), library / "pydoc_data" / "topics.py"
    key = {"method": _METHOD, "python": sys.version, "sources": [_version(path) for path in (*paths, topics)]}
    data = probe_cache.load(key, lambda content: content["text"].encode("utf-8"))
    if data is None:
        data = "\n\n".join(_extracted(paths, topics)).encode("utf-8", errors="replace")
        probe_cache.store(key, {"text": data.decode("utf-8")})
    return data


def _version(path: Path) -> list[str | int]:
    """What tells one version of a source file from others; the file may be missing."""
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


def _extracted(modules: list[Path], topics: Path) -> Iterator[str]:
    """Docstrings of the top-level modules, then the language reference. Sources are parsed; nothing
    is imported."""
    for path in modules:
        tree = _parse(path)
        if tree is not None:
            yield from _docstrings(tree, path.stem)
    tree = _parse(topics)
    if tree is not None:
        yield from _long_strings(tree)


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
