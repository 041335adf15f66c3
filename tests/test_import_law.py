"""Numbered layers: a module imports only from lower ones, or from its own; see
docs/architecture.md.

Read from the source, so that an import inside a function counts too.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[1]
NATIVE_PACKAGES = ("op_ds", "nvme_ds")
LAYERS = {
    0: ("ratel.errors", "ratel.units", "ratel.config", "ratel.reading", "ratel.schema", "ratel.interrupt", "ratel.process",
        "ratel.synced", "ratel.other_names", "ratel.ownership", "ratel.probe_cache", "ratel.trace", "ratel.trace.phases",
        "ratel.startup.readahead"),
    1: NATIVE_PACKAGES,
    2: ("ratel.planner",),
    3: ("ratel.native", "ratel.memory", "ratel.store", "ratel.startup",
        "ratel.data", "ratel.monitor", "ratel.hardware", "ratel.models", "ratel.optimizer_state", "ratel.lora", "ratel.sparse",
        "ratel.dist"),
    4: ("ratel.runtime",),
    5: ("ratel.training", "ratel.verify"),
    6: ("ratel.cli", "ratel.__main__", "ratel"),
}
DOOR = "ratel.native"
HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "rich", "aiofiles", "psutil"}
STANDARD = {*sys.stdlib_module_names, "tomllib"}  # which Python 3.10 lacks


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name in one file. ``is_lazy``: inside a function; ``is_typing``: under ``if
    TYPE_CHECKING``."""

    importer: str
    line: int
    target: str
    is_lazy: bool
    is_typing: bool

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def component_of(module: str) -> str | None:
    """The longest entry of LAYERS that contains the module; ``ratel`` itself contains only its
    ``__init__``."""
    names = [name for group in LAYERS.values() for name in group
             if module == name or (module.startswith(name + ".") and name != "ratel")]
    return max(names, key=len, default=None)


def layer_of(module: str) -> int | None:
    component = component_of(module)
    return next((number for number, group in LAYERS.items() if component in group), None)


def modules(root: Path) -> dict[str, Path]:
    found = {}
    for package in ("ratel", *NATIVE_PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, known: set[str]) -> Iterator[Import]:
    base = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, is_lazy: bool, is_typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            lazy = is_lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing = is_typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            for target in _targets(child, base, known):
                yield Import(importer=module, line=child.lineno, target=target, is_lazy=lazy, is_typing=typing)
            yield from visit(child, lazy, typing)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False, False)


def _targets(node: ast.AST, base: str, known: set[str]) -> Iterator[str]:
    """Modules that a statement imports; ``from package import module`` is an import of the
    module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:
            above = base.split(".")[: len(base.split(".")) - node.level + 1]
            origin = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            name = f"{origin}.{alias.name}"
            yield name if name in known else origin
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
        if isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value)


def violations(root: Path) -> list[str]:
    found = modules(root)
    known = set(found)
    every = [item for module, path in found.items() for item in imports_of(module, path, known)]
    problems = [f"{module} belongs to no layer" for module in found if layer_of(module) is None]
    for item in every:
        problems.extend(f"{item}: {rule}" for rule in broken_rules(item))
    return problems + cycles(every) + room_cycles(every)


def broken_rules(item: Import) -> Iterator[str]:
    layer = layer_of(item.importer)
    target = layer_of(item.target)
    if layer is None:
        return
    if target is not None and target > layer:
        yield f"layer {layer} may not use layer {target}"
    if item.package in NATIVE_PACKAGES and layer > 1 and item.importer != DOOR and layer != 6:
        yield f"native code is used through {DOOR} only"
    returns_arrays = item.package == "numpy" and (item.is_lazy or item.is_typing)
    if layer == 1 and item.package not in STANDARD | {item.importer.partition(".")[0]} and not returns_arrays:
        yield "native packages stand alone, on the standard library"
    if layer == 0 and item.package not in STANDARD | {"ratel", "tomli"}:
        yield "layer 0 uses the standard library only"
    if layer == 2 and item.package in HEAVY - {"numpy"} and not item.is_typing:
        yield "the planner is pure"
    is_heavy = item.package in HEAVY or (target or 0) in range(2, 6)
    if layer == 6 and is_heavy and not item.is_lazy and not item.is_typing:
        yield "heavy imports belong inside functions, so that --help is instant"


def cycles(every: list[Import]) -> list[str]:
    """Components of one layer may use each other, but not in a circle."""
    uses: dict[str, set[str]] = {}
    for item in every:
        source, target = component_of(item.importer), component_of(item.target)
        if source and target and source != target and layer_of(source) == layer_of(target) and layer_of(source) != 6:
            uses.setdefault(source, set()).add(target)

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(other == goal or (other not in seen and reaches(other, goal, seen | {other}))
                   for other in uses.get(start, ()))

    return [f"{name} takes part in a circle of imports" for name in uses if reaches(name, name, {name})]


def room_of(module: str, known: set[str]) -> str:
    """The folder that a module lies in; the modules of a package beside its rooms are a room,
    too."""
    return module if any(other.startswith(module + ".") for other in known) else module.rpartition(".")[0]


def room_cycles(every: list[Import]) -> list[str]:
    """Rooms of one package may use each other, but not in a circle. What is imported for types
    alone does not count."""
    known = {item.importer for item in every} | {item.target for item in every}
    uses: dict[str, set[str]] = {}
    for item in every:
        source, target = room_of(item.importer, known), room_of(item.target, known)
        if item.is_typing or source == target or source == "ratel" or target == "ratel" or not item.target.startswith("ratel."):
            continue
        uses.setdefault(source, set()).add(target)

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        for other in uses.get(start, ()):
            if other == goal:
                return True
            if other not in seen:
                seen.add(other)
                if reaches(other, goal, seen):
                    return True
        return False

    return [f"room {name} takes part in a circle of imports" for name in sorted(uses) if reaches(name, name, set())]


def test_this_project_obeys() -> None:
    assert len(modules(ROOT)) > 10
    assert violations(ROOT) == []


PLANTED = {
    "upward": ("ratel/units.py", "from ratel.planner import shape", "layer 0 may not use layer 2"),
    "upward in a function": ("ratel/store/files.py", "def f():\n    import ratel.runtime.session.session", "layer 3 may not"),
    "upward by name": ("ratel/planner/forecast/cost.py", "import importlib as i\ni.import_module('ratel.store')", "layer 2 may"),
    "upward, relative": ("ratel/planner/forecast/cost.py", "from ...runtime.session import session", "layer 2 may not use layer 4"),
    "the package itself": ("ratel/data/text.py", "import ratel", "layer 3 may not use layer 6"),
    "native knows ratel": ("op_ds/pool.py", "from ratel.errors import RatelError", "native packages stand alone"),
    "native knows torch": ("nvme_ds/engine.py", "def f():\n    import torch", "native packages stand alone"),
    "native needs numpy": ("op_ds/pool.py", "import numpy", "native packages stand alone"),
    "native beside the door": ("ratel/store/files.py", "from nvme_ds import Engine", "through ratel.native only"),
    "third party in layer 0": ("ratel/errors.py", "def f():\n    import numpy", "standard library only"),
    "torch in the planner": ("ratel/planner/forecast/cost.py", "def f():\n    import torch", "the planner is pure"),
    "heavy at the top": ("ratel/cli.py", "import torch", "so that --help is instant"),
    "heavy of our own at the top": ("ratel/__init__.py", "from ratel.runtime import session", "so that --help is instant"),
    "no layer": ("ratel/helpers.py", "", "ratel.helpers belongs to no layer"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_violation_is_found(tmp_path, name: str) -> None:
    path, source, expected = PLANTED[name]
    _write(tmp_path, {"ratel/runtime/session/session.py": "", "ratel/planner/shape.py": "", path: source})
    assert any(expected in problem for problem in violations(tmp_path)), violations(tmp_path)


def test_a_circle_is_found(tmp_path) -> None:
    _write(tmp_path, {"ratel/store/a.py": "import ratel.memory.b", "ratel/memory/b.py": "from ratel import data",
                      "ratel/data/__init__.py": "import ratel.store.a"})
    assert any("circle" in problem for problem in violations(tmp_path))


def test_what_is_allowed_is_not_reported(tmp_path) -> None:
    _write(tmp_path, {
        "ratel/native.py": "import op_ds", "ratel/store/a.py": "from ratel import native\nimport torch, ratel.errors",
        "ratel/cli.py": "from ratel.config import x\ndef f():\n    import torch, ratel.training.loop, op_ds.bench",
        "ratel/planner/a.py": "from typing import TYPE_CHECKING\nimport ratel.planner.b\nif TYPE_CHECKING:\n    import torch",
        "op_ds/pool.py": "import ctypes\nfrom . import library\ndef f():\n    import numpy", "op_ds/library.py": "",
    })
    assert violations(tmp_path) == []


def _write(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source)
