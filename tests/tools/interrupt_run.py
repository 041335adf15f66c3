"""Interrupts a small run at every line of start, steps, saving and shutdown, one fork each.

    python -m tests.tools.interrupt_run DIRECTORY command|library [--part I/N] [--every N] [--seconds S] [--json FILE] [--done FILE]

``command``: SIGINT is sent at the line, to a `ratel train`. ``library``: KeyboardInterrupt is
raised at the line, in a session that somebody's program uses. Lines are those of ratel, nvme_ds and
op_ds in the main thread; each one is tried when it is come to for the first time and for the last,
in an order in which any beginning is a sample of the whole. Prints one JSON object per try that has
a problem, and one with the sums; status 1 if there was one.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.tools.forks import Site
from tests.tools.interrupting import COMMAND, LIBRARY, Interrupting, Moment, as_json


def main() -> int:
    args = _arguments()
    end_s = time.monotonic() + args.seconds
    args.directory.mkdir(parents=True, exist_ok=True)
    site = Site(args.directory.resolve())
    site.prepare()
    interrupting = Interrupting(site, args.form)
    part, parts = map(int, args.part.split("/"))
    done = set(json.loads(args.done.read_text())) if args.done else set()
    found = [moment for moment in interrupting.measure() if moment.place % parts == part]
    mine = [moment for moment in found[:: args.every] if f"{args.form} {moment.name}" not in done]
    result = _try_all(interrupting, mine, args, end_s)
    print(json.dumps({"form": args.form, "moments": len(found), "tried": len(result["tried"]), "came": result["came"],
                      "with_problems": len(result["problems"])}))
    return 1 if result["problems"] else 0


def _try_all(interrupting: Interrupting, mine: list[Moment], args: argparse.Namespace, end_s: float) -> dict[str, Any]:
    """Until they are done, or time is up. The file has at each moment what was found until then."""
    result: dict[str, Any] = {"moments": len(mine), "tried": [], "came": 0, "problems": []}
    for moment in mine:
        if time.monotonic() >= end_s:
            break
        tried = interrupting.attempt(moment)
        result["tried"].append(f"{args.form} {moment.name}")
        result["came"] += tried.came
        if tried.problems:
            result["problems"].append(json.loads(as_json(tried)))
            print(as_json(tried), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(result))
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("form", choices=(COMMAND, LIBRARY))
    parser.add_argument("--part", default="0/1", help="of the moments, the I-th of N parts")
    parser.add_argument("--every", type=int, default=1, help="only each N-th moment")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no try after so long")
    parser.add_argument("--json", type=Path, help="what is found, written after every try")
    parser.add_argument("--done", type=Path, help="a JSON list of moments that earlier runs have tried")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
