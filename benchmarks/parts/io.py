"""The I/O engine against a plain O_DIRECT loop: ``python -m benchmarks.parts.io DIR [DIR ...] [--json FILE]``."""

from nvme_ds.bench import main

if __name__ == "__main__":
    main()
