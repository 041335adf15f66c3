"""The docs name what is there: files, links, and the classes, attributes and functions of the
tree."""

import ast
import builtins
import importlib
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PRODUCT = ("ratel", "nvme_ds", "op_ds", "benchmarks", "examples")
FOLDERS = (*PRODUCT, "tests", "docs")
PATH = re.compile(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/.*-]*[\w/*]")
SYMBOL = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*(?:\([^`]*\))?")
FILE = re.compile(r"[\w.]+\.(?:py|sh|md|json|jsonl|safetensors|svg|so|old|partial)")
FOREIGN = {"libasan.so", "mlp.up_proj", "from_pretrained", "LD_LIBRARY_PATH", "get_seq_length", "consolidated.safetensors"}
"""What docs speak of that is neither defined here nor to be imported: files, parameters and methods
of others."""
COMPOSED = {"optimizer.safetensors.index.json", *(f"{key}_{kind}{end}" for kind in ("busy", "at_rate")
                                                  for key, end in (("fraction_of_bound", ""), ("bound", "_by"), ("bound", "_s")))}
"""Names that the code puts together: the bounds in ratel/planner/report/utilization.py, the index
beside a file of moments."""
PLACEHOLDERS = re.compile(r"NAME|MACHINE|KIND|DIR|FILE|ROOM|SCRIPT")
OTHERS = {"nn": "torch.nn", "torch": "torch", "gc": "gc", "time": "time", "zlib": "zlib", "json": "json"}
LOG = {ROOT / "docs" / "log.md", *(ROOT / "docs" / "log").glob("*.md")}
"""What was tried stands there under the names of its day."""


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def symbols_in(text: str) -> set[str]:
    return {span for span in re.findall(r"`([^`\n]+)`", text) if SYMBOL.fullmatch(span) and re.search(r"[.(_]", span)}


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for folder in PRODUCT for path in sorted((ROOT / folder).rglob("*.py"))}


@cache
def source_text() -> str:
    native = [path for package in ("nvme_ds", "op_ds") for path in sorted((ROOT / package / "csrc").rglob("*")) if path.is_file()]
    return "\n".join(path.read_text(encoding="utf-8") for path in [*sources(), *native])


@cache
def members() -> dict[str, set[str]]:
    """The names that each class of the tree defines itself, and those of its bases in the tree."""
    own: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, set[str]] = defaultdict(set)
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                own[node.name] |= {name for inner in ast.walk(node) for name in _defined(inner)}
                bases[node.name] |= {base.id for base in node.bases if isinstance(base, ast.Name)}
    return {name: found.union(*(own.get(base, set()) for base in bases[name])) for name, found in own.items()}


def _defined(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, (ast.Name, ast.Attribute)):
        return {node.target.id if isinstance(node.target, ast.Name) else node.target.attr}
    if isinstance(node, ast.Assign):
        return {target.id if isinstance(target, ast.Name) else target.attr for target in node.targets
                if isinstance(target, (ast.Name, ast.Attribute))}
    return {node.arg} if isinstance(node, ast.arg) else set()


@cache
def defined() -> set[str]:
    return {name for tree in sources().values() for node in ast.walk(tree) for name in _defined(node)}


@cache
def file_names() -> set[str]:
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()} | {path.name for path in ROOT.iterdir()}


def is_module(dotted: str) -> bool:
    place = ROOT / dotted.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def is_known(symbol: str) -> bool:
    """``Class.member``, a function, a module or its member, a file that the sources speak of, or
    what another library has."""
    name = symbol.partition("(")[0]
    if name in FOREIGN | COMPOSED or PLACEHOLDERS.search(name):
        return True
    if FILE.fullmatch(name):
        return name in file_names() or (not name.endswith((".py", ".sh", ".md")) and name in source_text())
    first, *rest = name.split(".")
    if first in OTHERS and rest:
        return _imports(".".join([OTHERS[first], *rest]))
    if first in members() and rest:
        return rest[0] in members()[first]
    if first == "ratel" and rest:
        return _in_module(name)
    if not rest:
        return first in defined() or hasattr(builtins, first) or ("(" not in symbol and first in source_text())
    if f"{first}.py" in file_names() and rest[-1] in defined():
        return True
    if (ROOT / "benchmarks" / first).is_dir():
        return is_module(f"benchmarks.{name}")
    return all(part in defined() or part.isdigit() or f'"{part}"' in source_text() or f'{part}.' in source_text() for part in (first, rest[-1]))


def _in_module(name: str) -> bool:
    module, _, member = name.rpartition(".")
    return is_module(name) or (is_module(module) and member in defined())


def _imports(name: str) -> bool:
    module, _, member = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), member)
    except ImportError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = prose(page) if page in LOG else page.read_text(encoding="utf-8")  # what the log lists may be of a branch
    named = {path.rstrip(".") for path in PATH.findall(text) if not PLACEHOLDERS.search(path)}
    assert [path for path in sorted(named) if not any(ROOT.glob(path)) and not (ROOT / f"{path}.py").is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        place = page.parent / file if file else page
        if "://" not in target and (not place.exists() or (anchor and anchor not in _anchors(place))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in LOG], ids=lambda page: page.name)
def test_every_command_that_runs_a_module_names_one(page: Path) -> None:
    named = {name for name in re.findall(r"python -m ([\w.]+\w)", page.read_text(encoding="utf-8")) if not PLACEHOLDERS.search(name)}
    programs = {name for name in named if is_module(name) and _has_main(name)} | {"pip", "pytest"}
    assert named <= programs, named - programs


def _has_main(dotted: str) -> bool:
    place = ROOT / dotted.replace(".", "/")
    file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    return file.is_file() and "__main__" in file.read_text(encoding="utf-8")


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in LOG], ids=lambda page: page.name)
def test_every_symbol_that_a_page_names_is_defined(page: Path) -> None:
    text = prose(page)
    about_tests = text.partition("\n## Tests\n")[2].partition("\n## ")[0]
    tests = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests" / "support").glob("*.py")))
    missing = [symbol for symbol in symbols_in(text.replace(about_tests, "")) if not is_known(symbol)]
    missing += [symbol for symbol in symbols_in(about_tests) if not is_known(symbol) and symbol not in tests]
    assert sorted(missing) == []


@pytest.mark.parametrize("symbol", ["Plan.no_such_member", "no_such_function()", "torch.no_such_name", "ratel.planner.shape.no_such_name",
                                    "no_such_file.py", "speed.no_such_script", "never_said.never_said_either", "attach_grad()", "attach_grad"])
def test_a_name_that_is_not_there_is_found(symbol: str) -> None:
    assert not is_known(symbol)


WALKS = ("A gradient", "A weight", "An option", "A batch", "A save")
MOST_CHANGES = 8
"""The most changes of file in a walk: whoever follows one keeps in mind where it began."""
PLACE = re.compile(r"^\d+\. `([\w/]+\.py)`: ((?:`[\w.]+`(?:, | and )?)+)", re.MULTILINE)


def walks() -> dict[str, list[tuple[str, set[str]]]]:
    """For each walk of docs/architecture.md the files in order, and what is named in each."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("\n## Five walks\n")[2].partition("\n## ")[0]
    found = {}
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        places = [(file, set(re.findall(r"`([\w.]+)`", names))) for file, names in PLACE.findall(body)]
        assert len(places) == len(re.findall(r"^\d+\. ", body, flags=re.MULTILINE)), f"{title}: a line that names no file"
        found[title] = places
    return found


def test_there_are_five_short_walks() -> None:
    assert tuple(walks()) == WALKS
    assert {title: len(places) - 1 for title, places in walks().items() if not 3 <= len(places) - 1 <= MOST_CHANGES} == {}


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_goes_through_what_is_there(title: str) -> None:
    missing = []
    for file, names in walks()[title]:
        inside = {name for node in ast.walk(sources()[ROOT / file]) for name in _defined(node)}
        missing += [f"{file}: {name}" for name in sorted(names) if not set(name.split(".")) <= inside]
    assert missing == []


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_changes_file_at_every_line(title: str) -> None:
    files = [file for file, _ in walks()[title]]
    assert all(one != next_one for one, next_one in zip(files, files[1:]))
