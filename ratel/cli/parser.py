"""argparse as Ratel wants it: mistakes are RatelErrors, flags come from the table of options."""

import argparse
import difflib
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from ratel.config import TrainConfig, flag_of, number_reader, option_of, options_of
from ratel.errors import RatelError
from ratel.other_names import meant_by


_NEGATIVE = re.compile(r"-\.?\d.*")
_WITHOUT_VALUE = re.compile(r"argument ([^\s/:]+)\S*: expected (?:one|at least one) argument")
_NO_COMMAND = re.compile(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """Mistakes become RatelErrors: one line, with the flag that was probably meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = _NEGATIVE  # else a value of an option that begins so counts as an option

    def error(self, message: str) -> NoReturn:
        lacking = _WITHOUT_VALUE.fullmatch(message)
        if lacking is not None:
            action = next(action for action in self._actions if lacking[1] in action.option_strings)
            raise RatelError("needs a value", field=lacking[1], remedy=f"Write {lacking[1]} {action.metavar or 'VALUE'}")
        command = _NO_COMMAND.match(message)
        if command is not None:
            close = difflib.get_close_matches(command[1], re.findall(r"'(\S+?)'", command[2]), n=1)
            raise RatelError("is not a command", value=command[1], remedy=f"{f'Did you mean {close[0]}? ' if close else ''}See `ratel --help`")
        raise RatelError(message, remedy=f"See `{self.prog} --help`")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag, parser = unknown[0].partition("=")[0], getattr(args, "parser", self)
            if not flag.startswith("-"):
                raise RatelError("stands where an option should", value=unknown[0], remedy="Values follow their options, as --model DIR --data FILE; "
                                 "those that switch something on take none")
            raise RatelError("is not an option here", field=flag, remedy=parser.hint(flag))
        return args

    def hint(self, unknown: str) -> str:
        known = [flag for action in self._actions for flag in action.option_strings]
        meant = meant_by(unknown.lstrip("-"))
        close = [flag_of(meant)] if meant and flag_of(meant) in known else difflib.get_close_matches(unknown, known, n=1)
        return f"Did you mean {close[0]}?" if close else f"See `{self.prog} --help`"


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that counts and is no option of a run."""
    read = number_reader(int, least)

    def count(text: str) -> int:
        try:
            return read(text, "")
        except RatelError as error:  # argparse names the flag
            raise argparse.ArgumentTypeError(str(error)) from None

    return count


def add_command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int | None] | None = None) -> Parser:
    """A command with its help; ``run`` does it, and prints; it may return the exit status."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    if run is not None:
        parser.set_defaults(run=run, parser=parser)
    return parser


def add_options(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """The configuration's options, or some of them, as flags. A flag not given stays out of the
    namespace: the file may set it."""
    sections: dict[str, Any] = {}
    for spec in options_of(TrainConfig):
        option = option_of(spec)
        if names is not None and spec.name not in names:
            continue
        if option.group not in sections:
            sections[option.group] = parser.add_argument_group(option.group)
        kind: dict[str, Any] = ({"action": argparse.BooleanOptionalAction} if option.is_switch
                                else {"metavar": option.metavar})
        sections[option.group].add_argument(flag_of(spec.name), default=argparse.SUPPRESS,
                                            help=_help(option.help, spec.default), **kind)


def _help(text: str, default: Any) -> str:
    if default in (None, (), False) or "default:" in text:
        shown = ""
    else:
        shown = f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    return (text + shown).replace("%", "%%")


def directories(text: str) -> list[str]:
    """``DIR[,DIR]`` as `ratel train --ssd` reads it."""
    return [part for part in text.split(",") if part]
