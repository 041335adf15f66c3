"""The command line. Heavy imports stay inside the commands, so that ``--help`` and mistakes in flags answer at once."""

import argparse
import difflib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from ratel.config import TrainConfig, flag_of, option_of, resolve
from ratel.errors import NonFiniteError, RatelError, WorkerError

EXIT_OK, EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Mistakes become RatelErrors: one line, with the flag that was probably meant."""

    def error(self, message: str) -> NoReturn:
        raise RatelError(message, remedy=f"See `{self.prog} --help`")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            raise RatelError("is not an option here", field=unknown[0].partition("=")[0], remedy=self._hint(unknown[0], args))
        return args

    def _hint(self, unknown: str, args: argparse.Namespace) -> str:
        close = difflib.get_close_matches(unknown.partition("=")[0], getattr(args, "flags", ()), n=1)
        return f"Did you mean {close[0]}?" if close else f"See `{self.prog} --help`"


def build_parser() -> _Parser:
    parser = _Parser(prog="ratel", allow_abbrev=False, description="Fine-tune every parameter of a model far larger than "
                     "GPU memory, on one GPU, with its states in GPU memory, DRAM and on SSDs.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    _add_train(commands)
    _add_doctor(commands)
    return parser


def _add_command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _add_train(commands: Any) -> None:
    parser = _add_command(commands, "train", "fine-tune a model", _train)
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the options below; flags override it")
    add_options(parser)
    parser.set_defaults(flags=_flags_of(parser))


def _add_doctor(commands: Any) -> None:
    parser = _add_command(commands, "doctor", "show what this machine has, what is missing and how fast it is", _doctor)
    parser.add_argument("--ssd", metavar="DIR[,DIR]", default="", help="directories to examine and measure")
    parser.add_argument("--no-measure", action="store_true", help="facts only, no measurements")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(flags=_flags_of(parser))


def add_options(parser: argparse.ArgumentParser, groups: Sequence[str] | None = None) -> None:
    """The configuration's options as flags. A flag not given stays out of the namespace: the file may set it."""
    sections: dict[str, Any] = {}
    for spec in fields(TrainConfig):
        option = option_of(spec)
        if groups is not None and option.group not in groups:
            continue
        section = sections.setdefault(option.group, None) or parser.add_argument_group(option.group)
        sections[option.group] = section
        kind: dict[str, Any] = ({"action": argparse.BooleanOptionalAction} if option.is_switch
                                else {"metavar": option.metavar})
        section.add_argument(flag_of(spec.name), default=argparse.SUPPRESS, help=_help(option.help, spec.default), **kind)


def _help(text: str, default: Any) -> str:
    if default in (None, (), False) or "default:" in text:
        shown = ""
    else:
        shown = f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    return (text + shown).replace("%", "%%")


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def train_config(args: argparse.Namespace) -> TrainConfig:
    names = {spec.name for spec in fields(TrainConfig)}
    return resolve({name: value for name, value in vars(args).items() if name in names}, args.config)


def _train(args: argparse.Namespace) -> int:
    config = train_config(args)
    if config.model is None:
        raise RatelError("is missing", field="--model", remedy="Give a Hugging Face directory, or a preset such as demo")
    from ratel.train import run

    run.run(config, model=config.model)
    return EXIT_OK


def _doctor(args: argparse.Namespace) -> int:
    from ratel.hardware import doctor

    report = doctor.examine([path for path in args.ssd.split(",") if path], measure=not args.no_measure)
    print(json.dumps(report, indent=2) if args.json else doctor.render(report))
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status says whose turn it is: 0 nobody's, 1 the program's, 2 the user's."""
    try:
        status = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where an error of it is still handled
        return status
    except RatelError as error:
        return _fail(f"ratel: {error}", EXIT_MISUSED)
    except (NonFiniteError, WorkerError) as error:
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        return _fail(f"ratel: {error}{cause}", EXIT_FAILED)
    except KeyboardInterrupt as error:
        return _fail(f"ratel: {str(error) or 'interrupted'}", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a reader like `head` has gone: no traceback
        return EXIT_OK
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED


def _dispatch(argv: Sequence[str]) -> int:
    parser = build_parser()
    args = parser.parse_all(argv)
    if args.version:
        from ratel import __version__

        print(__version__)
        return EXIT_OK
    if args.command is None:
        parser.print_help()
        return EXIT_MISUSED
    return args.run(args)


def _fail(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
