"""One line of a ``.jsonl`` file as a record: what may stand there, and what is said when something else does."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ratel.reading import first_twice
from ratel.schema import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
EXPECTED = ('Write one JSON object per line, with "text", with "prompt" and "completion", or with "messages" '
            '(a list of {"role": ..., "content": ...})')
_KEYS = ("text", "prompt", "completion", "messages")
_BOM = b"\xef\xbb\xbf"


class RecordError(ValueError):
    """What is wrong with one record. Whoever knows the file and the line makes a RatelError of it."""

    def __init__(self, message: str, expected: str = EXPECTED, *, line: int = 0) -> None:
        """``line``: how many lines below the record's first one."""
        super().__init__(message)
        self.expected = expected
        self.line = line


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text: every token is a target."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt and what should follow it: only the completion is a target."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation: only what the assistant says is a target."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None = None


Record = Text | Completion | Chat


def parse_line(line: bytes) -> Record | None:
    """The record on a line, or None where its text is blank: such a row holds nothing to learn and is passed over."""
    return _record(read_object(line))


def read_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line."""
    text = decode(line)
    try:
        fields = json.loads(text, object_pairs_hook=_each_once)
    except RecordError:
        raise
    except json.JSONDecodeError as error:
        raise RecordError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RecordError("JSON nested too deeply") from None
    except ValueError:  # of Python itself, which reads 4300 digits at most
        raise RecordError("not readable JSON: a number has too many digits") from None
    if not isinstance(fields, dict):
        raise RecordError(f"a JSON object is expected, not {type_name(fields)}")
    return fields


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that stands twice, one value would be lost unseen."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RecordError(f"the key {shown(first_twice(pairs))} stands twice in one object", "Remove one of them")
    return fields


def decode(data: bytes) -> str:
    """Text of UTF-8, without the mark that some editors write at a file's start."""
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        before = error.object[:error.start]
        column = error.start - before.rfind(b"\n")
        raise RecordError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at column {column}",
                          "Convert the file to UTF-8", line=before.count(b"\n")) from None


def _record(fields: dict[str, Any]) -> Record | None:
    present = [key for key in _KEYS if key in fields]
    if present == ["text"]:
        text = string_of(fields, "text")
        return Text(text=text) if text.strip() else None
    if present == ["prompt", "completion"]:
        return _completion(fields)
    if present == ["messages"]:
        return _chat(fields)
    if not present:
        seen = ", ".join(f'"{key}"' for key in list(fields)[:6]) or "no keys at all"
        raise RecordError(f"no key that is known here; the object has {seen}")
    if len(present) == 1:
        other = "completion" if present[0] == "prompt" else "prompt"
        raise RecordError(f'"{present[0]}" without "{other}"')
    raise RecordError("keys of more than one kind of record: " + ", ".join(f'"{key}"' for key in present))


def _completion(fields: dict[str, Any]) -> Completion:
    prompt, completion = string_of(fields, "prompt"), string_of(fields, "completion")
    if not completion.strip():
        raise RecordError('"completion" is empty, so there is nothing to learn', "Fill it in or remove the line")
    return Completion(prompt=prompt, completion=completion)


def _chat(fields: dict[str, Any]) -> Chat:
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise RecordError('"messages" must be a list of messages that is not empty')
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"message {number}")
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordError('no message has the role "assistant", so there is nothing to learn',
                          "Add the assistant's answer or remove the line")
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RecordError(f'"tools" must be a list, not {type_name(tools)}')
    return Chat(messages=tuple(messages), tools=tuple(tools) if tools else None)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or "role" not in message:
        raise RecordError(f'{where} is not an object with "role" and "content"')
    role = message["role"]
    if role not in ROLES:
        raise RecordError(f"{where} has the unknown role {role!r}", f"Use one of {', '.join(ROLES)}")
    if role == "assistant" and message.get("tool_calls") and message.get("content") is None:
        return
    if "content" not in message:
        raise RecordError(f'{where} has no "content"')
    try:
        string_of(message, "content")
    except RecordError as error:
        raise RecordError(f"{where}: {error}", error.expected) from None


def string_of(fields: Mapping[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise RecordError(f'"{key}" must be a string, not {type_name(value)}')
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError(f'"{key}" holds half of a surrogate pair (\\ud800 to \\udfff), which is no character',
                              "Write the whole character") from None
    return value


def type_name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object"}
    return names[type(value)]
