"""The oldest Python that is promised: its syntax, its standard library, and that every module can
be imported on the Python at hand.

Without an interpreter of 3.10: names that came later are listed here by module. `.ci/run` runs a
part of the tests on 3.10 where the machine has one.
"""

import ast
import importlib
import io
import pkgutil
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 10)
FILES = sorted(path for name in ("ratel", "nvme_ds", "op_ds", "tests", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py"))
LATER = {
    "": "tomllib annotationlib compression",
    "asyncio": "TaskGroup timeout timeout_at Runner Barrier",
    "builtins": "ExceptionGroup BaseExceptionGroup PythonFinalizationError",
    "collections.abc": "Buffer",
    "contextlib": "chdir",
    "copy": "replace",
    "datetime": "UTC",
    "enum": "StrEnum ReprEnum EnumCheck verify member nonmember property global_enum EnumType",
    "functools": "Placeholder",
    "glob": "translate",
    "hashlib": "file_digest",
    "inspect": "getmembers_static markcoroutinefunction BufferFlags",
    "itertools": "batched",
    "logging": "getLevelNamesMapping getHandlerByName getHandlerNames",
    "math": "cbrt exp2 sumprod fma isnormal issubnormal",
    "operator": "call is_none is_not_none",
    "os": "process_cpu_count setns unshare listdrives",
    "queue": "ShutDown",
    "random": "binomialvariate",
    "re": "NOFLAG RegexFlag.NOFLAG",
    "statistics": "kde kde_random",
    "sys": "exception monitoring activate_stack_trampoline",
    "threading": "setprofile_all_threads settrace_all_threads",
    "types": "get_original_bases CapsuleType",
    "typing": "Self Never LiteralString Required NotRequired Unpack TypeVarTuple TypeAliasType ReadOnly NoDefault TypeIs override "
              "assert_never assert_type reveal_type dataclass_transform get_overloads clear_overloads get_protocol_members is_protocol",
    "warnings": "deprecated",
}
LATER_METHODS = {"add_note", "enterContext", "is_junction", "full_match", "as_uri_", "from_uri", "walk_up"}
LATER_KEYWORDS = {"TemporaryDirectory": {"delete"}, "NamedTemporaryFile": {"delete_on_close"}, "rmtree": {"onexc"}, "Popen": {"process_group"},
                  "run": {"process_group"}, "dataclass": {"weakref_slot"}, "add_argument": {"deprecated"}, "relative_to": {"walk_up"},
                  "exists": {"follow_symlinks"}, "is_file": {"follow_symlinks"}, "is_dir": {"follow_symlinks"},
                  "create_task": {"eager_start"}, "rglob": {"case_sensitive"}, "glob": {"case_sensitive"}}


def problems(text: str) -> list[str]:
    """Lines that Python 3.10 would refuse, with what it would not know."""
    try:
        tree = ast.parse(text, feature_version=OLDEST)
    except SyntaxError as error:
        return [f"{error.lineno}: {error.msg}"]
    caught = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Try)
              and any("ImportError" in ast.dump(h) or "ModuleNotFoundError" in ast.dump(h) for h in node.handlers)
              for line in node.body for part in ast.walk(line)}
    modules = {alias.asname or alias.name: alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found = [found for node in ast.walk(tree) if id(node) not in caught for found in _of_node(node, modules, text)]
    return [*found, *_nested_quotes(text)]


def _of_node(node: ast.AST, modules: dict[str, str], text: str) -> Iterator[str]:
    line = getattr(node, "lineno", 0)
    if isinstance(node, ast.Import):
        yield from (f"{line}: import {alias.name}" for alias in node.names if alias.name.split(".")[0] in _later(""))
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        names = _later(node.module) | ({alias.name for alias in node.names} if node.module.split(".")[0] in _later("") else set())
        yield from (f"{line}: {node.module}.{alias.name}" for alias in node.names if alias.name in names)
    elif isinstance(node, ast.Attribute):
        of = modules.get(node.value.id, "-") if isinstance(node.value, ast.Name) else "-"
        if node.attr in _later(of) or node.attr in LATER_METHODS:
            yield f"{line}: .{node.attr}"
    elif isinstance(node, ast.Name) and node.id in _later("builtins"):
        yield f"{line}: {node.id}"
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        yield from (f"{line}: {called}({word.arg}=)" for word in node.keywords if word.arg in LATER_KEYWORDS.get(called, ()))
    elif isinstance(node, ast.Subscript) and _has_bare_star(node, text):
        yield f"{line}: a star in an index"


def _later(module: str) -> set[str]:
    return set(LATER.get(module, "").split())


def _has_bare_star(node: ast.Subscript, text: str) -> bool:
    if not isinstance(node.slice, ast.Tuple) or not any(isinstance(part, ast.Starred) for part in node.slice.elts):
        return False
    return not (ast.get_source_segment(text, node.slice) or "").startswith("(")


def _nested_quotes(text: str) -> list[str]:
    """From 3.12 on an f-string may have its own quotes inside; an older Python says so itself when
    it parses."""
    if sys.version_info < (3, 12):
        return []
    begun, found = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "STRING"):
            quotes = token.string.lstrip("rRbBfFuU")
            quotes = quotes[:3] if quotes[:3] in ('"""', "'''") else quotes[:1]
            if quotes in begun:
                found.append(f"{token.start[0]}: quotes of an f-string inside of it")
            if name == "FSTRING_START":
                begun.append(quotes)
        elif name == "FSTRING_END":
            begun.pop()
    return found


def test_nothing_is_newer_than_the_oldest_python() -> None:
    assert len(FILES) > 300
    assert {str(path.relative_to(ROOT)): found for path in FILES if (found := problems(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize("text", [
    "from typing import Self", "import typing\nx: typing.Self", "import tomllib", "from tomllib import loads", "import asyncio\nasyncio.TaskGroup()",
    "try:\n    x()\nexcept* ValueError:\n    pass", "def f[T](x: T) -> T: ...", "type X = int", "raise ExceptionGroup('x', [])",
    "error.add_note('x')", "import itertools as i\ni.batched(x, 2)", "TemporaryDirectory(delete=False)", "x[*a, 1]",
    "from datetime import UTC", "from enum import StrEnum"])
def test_what_is_newer_is_found(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize("text", [
    "try:\n    import tomllib\nexcept ModuleNotFoundError:\n    import tomli as tomllib", "match x:\n    case 1:\n        pass",
    "with (open('a') as a, open('b') as b):\n    pass", "x: int | None = None", "x[(*a, 1)]", "self.replace(1)", "zip(a, b, strict=True)"])
def test_what_is_old_enough_is_not(text: str) -> None:
    assert problems(text) == []


@pytest.mark.skipif(sys.version_info < (3, 12), reason="an older Python does not parse it")
def test_quotes_inside_of_an_f_string_are_found() -> None:
    assert problems("f'{x['a']}'") and not problems("f'{x[\"a\"]}'")


def test_every_module_can_be_imported() -> None:
    """But for what needs a package that is for GPUs or pictures alone."""
    optional, failed = {"triton", "matplotlib", "deepspeed"}, {}
    for package in ("ratel", "nvme_ds", "op_ds"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            try:
                if not module.name.endswith("__main__"):
                    importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name not in optional:
                    failed[module.name] = str(error)
    assert failed == {}
