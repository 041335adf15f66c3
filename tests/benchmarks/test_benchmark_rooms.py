"""The rooms of `benchmarks/`: few modules each, and every script of them says what it measures when
it is asked."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]
MOST_MODULES = 15
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if "parser = argparse" in path.read_text(encoding="utf-8"))


def test_no_room_is_crowded() -> None:
    rooms = Counter(path.parent for path in (ROOT / "benchmarks").rglob("*.py"))
    assert len(rooms) > 5
    assert {room.name: count for room, count in rooms.items() if count > MOST_MODULES} == {}


def test_every_script_shows_its_help() -> None:
    """As commands are given in the docs: from the repository's root, with nothing else on the
    path."""
    assert len(SCRIPTS) >= 20
    code = ("import importlib, runpy, sys\n"
            "for name in sys.argv[1:]:\n"
            "    sys.argv = [name, '--help']\n"
            "    try:\n"
            "        runpy.run_module(name, run_name='__main__')\n"
            "    except SystemExit as end:\n"
            "        assert not end.code, (name, end.code)\n"
            "    else:\n"
            "        raise SystemExit(f'{name} did not stop at its help')\n")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SCRIPTS]
    done = subprocess.run([sys.executable, "-W", "ignore::RuntimeWarning", "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(names)
