"""The command ``ratel doctor``."""

import argparse
import json
import sys
from typing import Any

from ratel.cli.parser import add_command, directories
from ratel.errors import RatelError


def add(commands: Any) -> None:
    parser = add_command(commands, "doctor", "show what this machine has, what is missing and how fast it is", run)
    parser.add_argument("--ssd", metavar="DIR[,DIR]", type=directories, default=[],
                        help="directories to examine and measure")
    parser.add_argument("--no-measure", action="store_true", help="facts only, no measurements")
    parser.add_argument("--probe", action="store_true",
                        help="measure all that a planner needs, in under a minute; kept for the next time")
    parser.add_argument("--model", metavar="DIR|PRESET", help="with --probe: time its blocks (default: 4096 wide)")
    parser.add_argument("--refresh", action="store_true", help="with --probe: measure again what is kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    if args.probe:
        return _probe(args)
    for flag, value in (("--model", args.model), ("--refresh", args.refresh)):
        if value:
            raise RatelError("needs --probe", field=flag, value=value, remedy="Add --probe")
    from ratel.hardware import doctor

    report = doctor.examine(args.ssd, measure=not args.no_measure)
    print(json.dumps(report, indent=2) if args.json else doctor.render(report))


def _probe(args: argparse.Namespace) -> None:
    if args.no_measure:
        raise RatelError("a probe does nothing but measure", field="--no-measure", remedy="Leave out one of the two")
    from ratel.hardware import doctor, probe, probe_report

    found = probe.probe(directories=[doctor.existing(path) for path in args.ssd], model=args.model, refresh=args.refresh,
                        progress=lambda text: print(f"measuring {text}", file=sys.stderr))
    if args.json:
        print(json.dumps(found.hardware.to_json(), indent=2))
    else:
        print(probe_report.render(found))
