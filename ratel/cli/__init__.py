"""The command line: one module per command, each with ``add(commands)``.

Heavy imports stay inside the functions that run a command, so that ``--help`` and mistakes in flags
answer at once.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence

from ratel import interrupt, process
from ratel.cli import bench, check, cost, data, doctor, export, plan, train
from ratel.cli.parser import Parser
from ratel.errors import DamagedError, NonFiniteError, RatelError, WorkerError, out_of

COMMANDS = (train, plan, cost, data, check, export, doctor, bench)
EXIT_OK, EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 0, 1, 2, process.EXIT_INTERRUPTED


def build_parser() -> Parser:
    parser = Parser(prog="ratel", allow_abbrev=False, description="Fine-tune every parameter of a model far larger "
                    "than GPU memory, on one GPU, with its states in GPU memory, DRAM and on SSDs.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status says whose turn it is: 0 nobody's, 1 the program's, 2 the
    user's."""
    if argv is not None:
        return _main(argv)
    output, _ = process.begin()
    try:
        status = _main(sys.argv[1:])
    except SystemExit as done:  # --help
        status = done.code or EXIT_OK
    error = output.error
    if status == EXIT_OK and error is not None and not output.may_drop and not isinstance(error, BrokenPipeError):
        return _fail(f"ratel: standard output cannot be written: {error.strerror}", EXIT_FAILED)
    return status


def _main(argv: Sequence[str]) -> int:
    try:
        with interrupt.watching():
            return _dispatch(build_parser(), argv)
    except RatelError as error:
        return _fail(f"ratel: {error}", EXIT_MISUSED)
    except (NonFiniteError, WorkerError, DamagedError) as error:
        is_said = error.__cause__ is None or str(error.__cause__) in str(error)
        cause = "" if is_said else f" ({type(error.__cause__).__name__}: {error.__cause__})"
        return _fail(f"ratel: {error}{cause}", EXIT_FAILED)
    except KeyboardInterrupt as error:
        return _fail(f"ratel: {str(error) or 'interrupted'}", EXIT_INTERRUPTED)
    except Exception as error:
        refused = out_of(error)
        if refused is not None:
            return _fail(f"ratel: {refused}", EXIT_FAILED)
        if isinstance(error, OSError) and error.filename:
            return _fail(f"ratel: {error}", EXIT_FAILED)  # a drive or a file: which one is all there is to know
        traceback.print_exc()
        return EXIT_FAILED


def _dispatch(parser: Parser, argv: Sequence[str]) -> int:
    args: argparse.Namespace = parser.parse_all(argv)
    if args.version:
        from ratel import __version__

        print(__version__)
        return EXIT_OK
    if args.command is None:
        parser.print_help()
        return EXIT_MISUSED
    process.may_drop(args.command == "train")  # whose results are files
    return args.run(args) or EXIT_OK


def _fail(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status
