"""The I/O engine against a plain O_DIRECT loop: ``python benchmarks/io.py DIR [DIR ...] [--json FILE]``."""

from nvme_ds.bench import main

if __name__ == "__main__":
    main()
