"""Interrupts a small run at every line of start, steps, saving and shutdown, one fork each.

    python tests/interrupt_run.py DIRECTORY command|library [--part I/N] [--every N]

``command``: SIGINT is sent at the line, to a `ratel train`. ``library``: KeyboardInterrupt is raised at the line, in a session that
somebody's program uses. Lines are those of ratel, nvme_ds and op_ds in the main thread; each one is tried when it is come to for
the first time and for the last. Prints one JSON object per try that has a problem, and one with the sums; status 1 if there was one.
"""

import argparse
import json
import sys
from pathlib import Path

from forks_common import Site
from interrupt_common import COMMAND, LIBRARY, Interrupting, as_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("form", choices=(COMMAND, LIBRARY))
    parser.add_argument("--part", default="0/1", help="of the moments, the I-th of N parts")
    parser.add_argument("--every", type=int, default=1, help="only each N-th moment")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    site = Site(args.directory.resolve())
    site.prepare()
    interrupting = Interrupting(site, args.form)
    part, parts = map(int, args.part.split("/"))
    found = interrupting.measure()
    mine = found[:: args.every][part::parts]
    came = bad = 0
    for moment in mine:
        tried = interrupting.attempt(moment)
        came += tried.came
        if tried.problems:
            bad += 1
            print(as_json(tried), flush=True)
    print(json.dumps({"form": args.form, "moments": len(found), "tried": len(mine), "came": came, "with_problems": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
