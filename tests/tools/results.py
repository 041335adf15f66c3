"""What a long run of a test found, as a JSON file under benchmarks/results."""

import json
import subprocess
from pathlib import Path
from typing import Any


def write_results(path: Path, benchmark: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """With the machine and the commit, so that it can be done again. Counts are added to those the
    file has already."""
    from ratel.hardware.host import describe_host

    host = describe_host()
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    content = {"benchmark": benchmark, "settings": settings, "machine": {key: host[key] for key in ("os", "cpu", "python")},
               "commit": done.stdout.strip() or None, "results": results}
    if path.exists():
        before = json.loads(path.read_text())
        content |= {"settings": _joined(before["settings"], settings), "results": _joined(before["results"], results)}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Sums of numbers, lists one after the other; key by key."""
    result = dict(one)
    for key, value in other.items():
        if key in one:
            value = _joined(one[key], value) if isinstance(value, dict) else one[key] + value
        result[key] = value
    return result
