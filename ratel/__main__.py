"""``python -m ratel`` is the command ``ratel``."""

import sys

from ratel import process


def main() -> int:
    process.begin()  # before the imports of the commands: a signal may come at any time
    from ratel.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
