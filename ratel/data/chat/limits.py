"""What a chat template may do: it comes with a model, from anywhere, and is a program.

Jinja's sandbox keeps it from everything but its arguments. It may still loop for ever, or make a
text of a terabyte out of one letter. So work is counted: a unit for each turn of a loop and each
call, and one for every 64 characters that a call or an operator makes. More than any conversation
needs is an error, and always the same one: no clock has a say in it.
"""

import functools
import re
import threading
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_WORK = 1_000_000
MOST_CHARACTERS = 64 << 20
"""The most characters of one text that a call, an operator, or the template as a whole makes."""

_LARGEST_ARGUMENT = 1_000_000
_COUNTED = "_turn_of_a_loop"
_WIDE = re.compile(r"[%:][^a-zA-Z%{}]*[0-9]{6}")
_OPEN_WIDTH = re.compile(r"%[-+ #0-9.]*\*|:[^{}]*\{")
_LIMITED = "_is_limited"
_left = threading.local()


class TooMuchError(TemplateError):
    """A template does more than a conversation can need."""


def begin() -> None:
    """Note that a rendering starts, in this thread."""
    _left.work, _left.characters = MOST_WORK, MOST_CHARACTERS


def spend(units: int = 1) -> None:
    _left.work = getattr(_left, "work", MOST_WORK) - units
    if _left.work < 0:
        raise TooMuchError("it does more work for one conversation than any can need: does a loop in it end?")


def written(chunk: str) -> str:
    """A piece of the text that comes out."""
    _left.characters -= len(chunk)
    if _left.characters < 0:
        raise TooMuchError(f"it writes more than {MOST_CHARACTERS >> 20} million characters for one conversation")
    return chunk


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum", None)  # makes text of any length out of nothing
        self.globals[_COUNTED] = _Turn()
        self.limit_filters()

    def limit_filters(self) -> None:
        """Limit the filters; this is called once more when others take the place of some."""
        self.filters = {name: function if hasattr(function, _LIMITED) else _counted(name, function)
                        for name, function in self.filters.items()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return _measured(self.operate(context, operator, left, right))

    def operate(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """What the operator makes, once it may."""
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        method = getattr(function, "__wrapped__", function)  # the sandbox puts its own in the place of str.format
        if isinstance(getattr(method, "__self__", None), str) and getattr(method, "__name__", "").startswith("format"):
            _check_format(method.__self__)
        _check_arguments(args, kwargs)
        return _measured(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What a text here has more than in transformers, no template may see: it could do another
        thing there."""
        return attr != "origins" and super().is_safe_attribute(obj, attr, value)


def count_turns(tree: Any) -> None:
    """Have every turn of every loop counted."""
    for loop in tree.find_all(nodes.For):
        statement = nodes.Output([nodes.Name(_COUNTED, "load")]).set_lineno(loop.lineno)
        statement.set_environment(loop.environment)
        loop.body.insert(0, statement)


class _Turn(str):
    """Nothing, that is counted when it is written."""

    def __str__(self) -> str:
        spend()
        return ""


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _check_format(args[0] if args else "")
        _check_arguments(args, kwargs)
        return _measured(function(*args, **kwargs))

    setattr(filtered, _LIMITED, True)
    return filtered


def _measured(value: Any) -> Any:
    size = len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0
    if size > MOST_CHARACTERS:
        raise TooMuchError(f"it makes a text or a list of {size:,} entries")
    spend(1 + size // 64)
    return value


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse numbers that would be widths, repetitions or lengths of millions."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > _LARGEST_ARGUMENT:
            raise TooMuchError(f"it calls a function with the number {value:,.0f}" if abs(value) < 1e300 else "it calls a function with a huge number")


def _check_format(form: Any) -> None:
    if isinstance(form, str) and (_WIDE.search(form) or _OPEN_WIDTH.search(form)):
        raise TooMuchError("it formats to a width of millions, or to one that is not known")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 4096:
        raise TooMuchError("it raises a number to a huge power")
    if operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, (str, list, tuple)) and isinstance(times, int) and len(text) * times > MOST_CHARACTERS:
                raise TooMuchError(f"it repeats a text {times:,} times" if times < 10**300 else "it repeats a text for ever")
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 1 << 16:
            raise TooMuchError("it multiplies huge numbers")
    if operator == "+" and isinstance(left, str) and isinstance(right, str) and len(left) + len(right) > MOST_CHARACTERS:
        raise TooMuchError(f"it makes a text of {len(left) + len(right):,} characters")
    if operator == "%":
        _check_format(left)
