"""``ratel doctor``."""

import argparse
import json
from typing import Any

from ratel.cli.parser import add_command, directories


def add(commands: Any) -> None:
    parser = add_command(commands, "doctor", "show what this machine has, what is missing and how fast it is", run)
    parser.add_argument("--ssd", metavar="DIR[,DIR]", type=directories, default=[],
                        help="directories to examine and measure")
    parser.add_argument("--no-measure", action="store_true", help="facts only, no measurements")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    from ratel.hardware import doctor

    report = doctor.examine(args.ssd, measure=not args.no_measure)
    print(json.dumps(report, indent=2) if args.json else doctor.render(report))
