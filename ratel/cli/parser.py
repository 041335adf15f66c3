"""argparse as Ratel wants it: mistakes are RatelErrors, flags come from the table of options."""

import argparse
import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from ratel.config import TrainConfig, flag_of, number_reader, option_of
from ratel.errors import RatelError


class Parser(argparse.ArgumentParser):
    """Mistakes become RatelErrors: one line, with the flag that was probably meant."""

    def error(self, message: str) -> NoReturn:
        raise RatelError(message, remedy=f"See `{self.prog} --help`")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag, parser = unknown[0].partition("=")[0], getattr(args, "parser", self)
            raise RatelError("is not an option here", field=flag, remedy=parser.hint(flag))
        return args

    def hint(self, unknown: str) -> str:
        known = [flag for action in self._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown, known, n=1)
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
    """The configuration's options, or some of them, as flags. A flag not given stays out of the namespace: the file may set it."""
    sections: dict[str, Any] = {}
    for spec in fields(TrainConfig):
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
