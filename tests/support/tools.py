"""The scripts of tests/tools, each run in a process of its own. No tests here."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.patience import patience

ROOT = Path(__file__).resolve().parents[2]


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"tests.tools.{name}", *map(str, arguments)]


def environment() -> dict[str, str]:
    """What such a process starts itself finds this tree, too, wherever it runs."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_tool(name: str, *arguments: object, limit_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(name, *arguments), env=environment(), cwd=ROOT, capture_output=True, text=True,
                          timeout=patience(limit_s))
