"""run.sh with stand-ins for Python and pip: what it checks first, when it installs, and what it
passes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import patience

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]

FAKE_PYTHON = """#!/usr/bin/env bash
# Makes environments of itself, notes what pip is asked for, and leaves the rest to a real Python.
if [[ $1 == -m && $2 == venv ]]; then
    venv=${!#}; mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python"
    printf '#!/usr/bin/env bash\\nprintf "%%s\\\\n" ratel "$@"\\n' >"$venv/bin/ratel"; chmod +x "$venv/bin/ratel"
    echo "venv $*" >>"$FAKE_LOG"
elif [[ $1 == -m && $2 == pip ]]; then
    [[ -f $(dirname "$0")/ratel ]] || exit 1
    if [[ $* == *install* ]]; then echo "pip ${*: -1}" >>"$FAKE_LOG"; fi
elif [[ $1 == -m && $2 == pytest ]]; then
    shift 2; echo pytest "$@"
elif [[ $* == *sysconfig* ]]; then
    site=$(dirname "$0")/../site; mkdir -p "$site"; echo "$site"
elif [[ $* == *"import torch"* ]]; then
    if [[ -n ${FAKE_PARENT_IS_VENV:-} && $0 == *.venv* ]]; then [[ -f $(dirname "$0")/../site/ratel_parent.pth ]]; exit; fi
    exit "${FAKE_TORCH_STATUS:-0}"
else
    exec REAL_PYTHON "$@"
fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files run.sh looks at, and native libraries as if built."""
    root = tmp_path / "a checkout"
    for name in ("run.sh", "setup.py", "pyproject.toml", "nvme_ds/build.py", "op_ds/build.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for package in ("nvme_ds", "op_ds"):
        (root / package / "csrc").mkdir()
        (root / package / "csrc" / "a.cpp").write_text("int a;")
        (root / package / "_lib").mkdir()
        (root / package / "_lib" / f"lib{package}.so").write_text("")
    fake = tmp_path / "fake" / "python3"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON.replace("REAL_PYTHON", sys.executable))
    fake.chmod(0o755)
    return root


def start(root: Path, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    names = {"PYTHON": str(root.parent / "fake" / "python3"), "FAKE_LOG": str(root.parent / "log"), **environment}
    return subprocess.run(["bash", str(root / "run.sh"), *arguments], cwd=cwd or root.parent, capture_output=True,
                          text=True, timeout=patience(60), env={**os.environ, **names}, stdin=subprocess.DEVNULL)


def installs(root: Path) -> list[str]:
    log = root.parent / "log"
    return [line.removeprefix("pip ") for line in log.read_text().splitlines() if line.startswith("pip ")]


def test_the_first_start_installs_and_the_second_does_not(checkout: Path) -> None:
    first = start(checkout, "--model", "my model")
    assert first.stdout.splitlines() == ["ratel", "train", "--model", "my model"], first
    assert installs(checkout) == ["wheel", str(checkout)]
    second = start(checkout, "--model", "other")
    assert second.stdout.splitlines()[-1] == "other" and second.stderr == ""
    assert len(installs(checkout)) == 2


def test_the_pytorch_of_a_virtual_environment_is_used_too(checkout: Path) -> None:
    """`--system-site-packages` shows what the system has, not what the environment it was called
    from has."""
    done = start(checkout, "doctor", FAKE_PARENT_IS_VENV="1")
    assert done.returncode == 0 and installs(checkout) == ["wheel", str(checkout)], done
    link = (checkout / ".venv" / "site" / "ratel_parent.pth").read_text().strip()
    assert Path(link).resolve() == (checkout.parent / "site").resolve()


@pytest.mark.parametrize("changed", ["setup.py", "nvme_ds/csrc/a.cpp", "op_ds/build.py"])
def test_a_change_of_what_is_installed_installs_again(checkout: Path, changed: str) -> None:
    start(checkout, "doctor")
    with (checkout / changed).open("a") as file:
        file.write("\n")
    start(checkout, "doctor")
    assert len(installs(checkout)) == 4


def test_a_lost_library_is_built_again(checkout: Path) -> None:
    start(checkout, "doctor")
    (checkout / "op_ds" / "_lib" / "libop_ds.so").unlink()
    start(checkout, "doctor")
    assert len(installs(checkout)) == 4


def test_tests_are_installed_with_their_needs_and_run(checkout: Path) -> None:
    done = start(checkout, "test", "-k", "some thing")
    assert done.stdout == "pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -k some thing\n", done
    assert installs(checkout)[-2].startswith("trl==")  # its chat templates: see data/chat/test_templates.py
    assert installs(checkout)[-1] == f"{checkout}[test]"


def test_torch_is_installed_where_there_is_none(checkout: Path) -> None:
    start(checkout, "doctor", FAKE_TORCH_STATUS="1", RATEL_TORCH="torch==2.7.1")
    assert installs(checkout)[0] == "torch==2.7.1"
    assert "--system-site-packages" not in (checkout.parent / "log").read_text()


def test_torch_of_the_machine_is_used(checkout: Path) -> None:
    start(checkout, "doctor")
    assert "--system-site-packages" in (checkout.parent / "log").read_text()
    assert not any(line.startswith("torch") for line in installs(checkout))


def test_paths_stay_relative_to_where_the_user_is(checkout: Path) -> None:
    (checkout.parent / "here").mkdir()
    done = start(checkout, "--data", "my.jsonl", cwd=checkout.parent / "here")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "my.jsonl"


@pytest.mark.parametrize(("environment", "message"), [
    ({"CXX": "nonesuch"}, "the compiler named by CXX (nonesuch) was not found"),
    ({"PYTHON": "false"}, "PYTHON (false) is not a Python of version 3.10 or later"),
])
def test_what_is_missing_is_named_before_anything_is_made(checkout: Path, environment: dict[str, str],
                                                          message: str) -> None:
    done = start(checkout, **environment)
    assert done.returncode == 1 and message in done.stderr
    assert not (checkout / ".venv").exists()


def test_without_a_compiler_the_package_to_install_is_named(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "sed", "env"):
        (tools / name).symlink_to(shutil.which(name))
    done = start(checkout, PATH=str(tools), CXX="")
    assert done.returncode == 1 and "no C++ compiler was found. Install the package g++" in done.stderr


def test_help_explains_the_uses(checkout: Path) -> None:
    done = start(checkout, "--help")
    assert "bash run.sh test" in done.stdout and "RATEL_TORCH" in done.stdout and not (checkout / ".venv").exists()
