"""The I/O engine against a plain O_DIRECT loop: ``python -m benchmarks.parts.io DIR [DIR ...]
[--json FILE]``."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.harness.report import origin
from nvme_ds import bench


def main() -> None:
    """What ``python -m nvme_ds.bench`` does; a file that it writes also says from which commit."""
    bench.main()
    known = argparse.ArgumentParser()
    bench.add_arguments(known)
    written = known.parse_args(sys.argv[1:]).json
    if written:
        content = json.loads(Path(written).read_text(encoding="utf-8"))
        Path(written).write_text(json.dumps({**content, **origin()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
