"""Messages in the shapes that templates want, each string marked with the field it is.

Templates differ in what they read: content as a string or in parts, a call's arguments as an object
or as its JSON. What an absent content, a ``null`` and a thought's field mean does not differ:
absent is absent, as transformers has it, and a thought is given under every name that is in use.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ratel.data.chat.template import json_text
from ratel.data.chat.traced import Traced

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
CHOICES = ("weight", "train")
"""Keys by which a message says whether it is learned; no template is given them."""

_HEADERS = ("role", "name", "tool_call_id")
"""What a message has beside its text. No model writes it."""

TOOLS = -1
"""Stands for the list of tools, in place of a message's index."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """``code``: the origin of its characters. ``is_said``: text of the message, not a name or a
    role. ``is_required``: to be found in the text, all of it, where it is to be learned."""

    message: int
    name: str
    text: str
    code: str
    is_said: bool
    is_required: bool


@dataclass(frozen=True, kw_only=True)
class Shape:
    """``content``: "string", "parts", or None for as it is. ``empties``: write "" where there is no
    content."""

    content: str | None = None
    arguments: str = "object"
    empties: bool = False


@dataclass(frozen=True, kw_only=True)
class Shaped:
    """A conversation in one shape: for a rendering (``plain``) and for one with origins
    (``traced``)."""

    plain: tuple[dict[str, Any], ...]
    traced: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None
    traced_tools: tuple[Any, ...] | None
    fields: tuple[Field, ...]


def shapes_of(messages: Sequence[Mapping[str, Any]], *, in_parts: bool) -> Iterator[Shape]:
    """The messages first as they are written, then what else they can be turned into without a
    loss. ``in_parts``: the template takes contents in no other way."""
    contents: list[str | None] = [None]
    if any(isinstance(message.get("content"), list) for message in messages):
        contents.append("string")
    if any(isinstance(message.get("content"), str) for message in messages):
        contents.insert(0 if in_parts else len(contents), "parts")
    calls = any(message.get("tool_calls") for message in messages)
    empties = [False, True] if any(message.get("content") is None for message in messages) else [False]
    for content, empty, arguments in product(contents, empties, ["object", "string"] if calls else ["object"]):
        yield Shape(content=content, arguments=arguments, empties=empty)


def in_shape(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, shape: Shape) -> Shaped:
    plain = tuple(_message(message, shape) for message in messages)
    marker = _Marker()
    traced = tuple(marker.message(index, message) for index, message in enumerate(plain))
    listed = tuple(tools) if tools else None
    traced_tools = None if listed is None else tuple(marker.value(tool, TOOLS, "tools") for tool in listed)
    return Shaped(plain=plain, traced=traced, tools=listed, traced_tools=traced_tools, fields=tuple(marker.fields))


def _message(message: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    shaped = {key: value for key, value in message.items() if value is not None and key not in CHOICES}
    thought = next((shaped[key] for key in THOUGHTS if key in shaped), None)
    if thought is not None:
        shaped = {**shaped, "thinking": shaped.get("thinking", thought), "reasoning_content": thought}
    if shaped.get("tool_calls"):
        shaped["tool_calls"] = [_call(call, shape.arguments) for call in shaped["tool_calls"]]
    else:
        shaped.pop("tool_calls", None)
    content = shaped.get("content")
    if content is None and shape.empties:
        content = ""
    if shape.content == "parts" and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif shape.content == "string" and isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return shaped if content is None else {**shaped, "content": content}


def _call(call: Mapping[str, Any], arguments: str) -> dict[str, Any]:
    function = call["function"] if "function" in call else call
    given = function.get("arguments")
    value = given
    if arguments == "object":
        value = {} if given is None or given == "" else json.loads(given) if isinstance(given, str) else given
    elif not isinstance(given, str):
        value = json_text({} if given is None else given)
    outer = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return {"type": "function", **outer, "function": {**function, "arguments": value}}


class _Marker:
    """Hands out codes, and remembers of which field each is."""

    def __init__(self) -> None:
        self.fields: list[Field] = []

    def message(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        marked: dict[str, Any] = {}
        for key, value in message.items():
            if key in THOUGHTS and marked.get(next((k for k in THOUGHTS if k in marked), key)) == value:
                marked[key] = marked[next(k for k in THOUGHTS if k in marked)]  # the same thought by another name
            elif key == "tool_calls":
                marked[key] = [self._call(call, index) for call in value]
            elif key == "content" and isinstance(value, list):
                marked[key] = [{**part, "text": self._text(part["text"], index, key)} for part in value]
            else:
                marked[key] = self.value(value, index, key)
        return marked

    def value(self, value: Any, index: int, name: str, *, keys: bool = False) -> Any:
        """``keys``: mark an object's keys as well, which the assistant wrote in a call's
        arguments."""
        if isinstance(value, str):
            return self._text(value, index, name)
        if isinstance(value, list):
            return [self.value(item, index, name, keys=keys) for item in value]
        if isinstance(value, dict):
            return {self._text(key, index, name) if keys else key: self.value(item, index, name, keys=keys)
                    for key, item in value.items()}
        return value

    def _call(self, call: Mapping[str, Any], index: int) -> dict[str, Any]:
        marked = {key: self.value(value, index, "tool_calls, beside the function") for key, value in call.items()
                  if key != "function"}
        function = {key: self.value(value, index, "tool_calls", keys=True) for key, value in call["function"].items()}
        return {**marked, "function": function}

    def _text(self, text: str, index: int, name: str) -> Traced:
        code = chr(2 * len(self.fields) + 2)
        required = name in ("content", "tool_calls", *THOUGHTS)
        self.fields.append(Field(message=index, name=name, text=text, code=code, is_said=name not in _HEADERS,
                                 is_required=required and bool(text.strip())))
        return Traced(text, code * len(text))


def field_finder(fields: Sequence[Field]) -> Callable[[str], str]:
    """A function from origins of fields to origins of messages: ``chr(2 + index)``, ``\\1`` for
    names and roles, ``\\0`` for what the template writes and for the tools' list, with or without
    marks."""
    table: dict[int, str] = {0: "\0", 1: "\0"}
    for field in fields:
        owner = "\0" if field.message == TOOLS else chr(2 + field.message) if field.is_said else "\1"
        table[ord(field.code)] = table[ord(field.code) + 1] = owner
    return lambda origins: origins.translate(table)
