"""What a long run of a test found, as a JSON file under benchmarks/results."""

import json
import subprocess
from pathlib import Path
from typing import Any


def write_results(path: Path, benchmark: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """With the machine and the commit, so that it can be done again."""
    from ratel.hardware.host import describe_host

    host = describe_host()
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    content = {"benchmark": benchmark, "settings": settings, "machine": {key: host[key] for key in ("os", "cpu", "python")},
               "commit": done.stdout.strip() or None, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
