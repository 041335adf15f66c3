"""One line of a ``.jsonl`` file as a record: what may stand there, and what is said when something
else does."""

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
_ELSEWHERE = {"function_call": 'Write it as "tool_calls"', "audio": "Only text is trained on: remove it",
              "images": "Only text is trained on: remove it", "videos": "Only text is trained on: remove it",
              "refusal": 'Write it as "content"'}
"""Keys of a message that hold something said elsewhere than in its content."""
_OTHER_FORMS: tuple[tuple[set[str], str], ...] = (
    ({"instruction", "output"}, 'Write {"prompt": instruction and input, "completion": output}, or both as "messages"'),
    ({"conversations"}, 'Call them "messages", each {"role": "user" or "assistant", "content": ...}'),
    ({"question", "answer"}, 'Call them "prompt" and "completion"'), ({"input", "output"}, 'Call them "prompt" and "completion"'),
    ({"prompt", "response"}, 'Call the response "completion"'), ({"content"}, 'Call it "text"'))
"""Lines as other programs have them."""
_BOM = b"\xef\xbb\xbf"


class RecordError(ValueError):
    """What is wrong with one record. Whoever knows the file and the line makes a RatelError of
    it."""

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
    """The record on a line, or None where its text is blank: such a row holds nothing to learn and
    is passed over."""
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
    """The pairs as a dictionary. A key that stands twice is refused: one of its values would be
    lost unseen."""
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
        other = next((remedy for keys, remedy in _OTHER_FORMS if keys <= fields.keys()), EXPECTED)
        raise RecordError(f"no key that is known here; the object has {seen}", other)
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
    if not any(is_learned(message) for message in messages):
        raise RecordError('every message of the assistant has "weight" 0 or "train" false, so there is nothing to learn',
                          "Learn one of them or remove the line")
    _check_links(messages)
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RecordError(f'"tools" must be a list, not {type_name(tools)}')
    return Chat(messages=tuple(messages), tools=tuple(tools) if tools else None)


def is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0 and message.get("train") is not False


def _check_links(messages: list[dict[str, Any]]) -> None:
    """A tool's message answers a call that was made before it, where it says which; in the calls'
    order, because most templates go by it and leave ids out."""
    made: list[str] = []
    last = -1
    for number, message in enumerate(messages, start=1):
        if message.get("tool_calls"):
            made += [call["id"] for call in message["tool_calls"] if isinstance(call.get("id"), str)]
            last = -1
        answered = message.get("tool_call_id")
        if answered is not None and (message["role"] != "tool" or made and answered not in made):
            raise RecordError(f'message {number} has the "tool_call_id" {json.dumps(answered)}, which is the id of no tool '
                              "call before it", 'Give the id of the call that the message with the role "tool" answers')
        if answered in made:
            if made.index(answered) < last:
                raise RecordError(f"message {number} answers a tool call that stands before the one answered last",
                                  "Put the tools' results in the order of the calls")
            last = made.index(answered)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or "role" not in message:
        raise RecordError(f'{where} is not an object with "role" and "content"')
    role = message["role"]
    if role not in ROLES:
        raise RecordError(f"{where} has the unknown role {role!r}", f"Use one of {', '.join(ROLES)}")
    for key in _ELSEWHERE:
        if message.get(key) is not None:
            raise RecordError(f'{where} has "{key}", which is not trained on', _ELSEWHERE[key])
    _check_choice(message, where)
    calls = message.get("tool_calls")
    if calls:
        _check_calls(calls, role, where)
    if calls and message.get("content") is None:
        return
    if "content" not in message:
        raise RecordError(f'{where} has no "content"')
    try:
        _check_content(message)
        for key in ("reasoning_content", "thinking", "reasoning", "name"):
            if message.get(key) is not None:
                string_of(message, key)
    except RecordError as error:
        raise RecordError(f"{where}: {error}", error.expected) from None


def _check_choice(message: Mapping[str, Any], where: str) -> None:
    """Whether a message is learned: ``weight`` (0 or 1) or ``train``."""
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RecordError(f'{where}: "weight" is {json.dumps(weight)}', "Write 1 to learn a message or 0 not to; parts of a weight "
                                                                     "are not supported")
    if train is not None and not isinstance(train, bool):
        raise RecordError(f'{where}: "train" must be true or false, not {type_name(train)}')
    if weight is not None and train is not None and bool(weight) != train:
        raise RecordError(f'{where}: "weight" and "train" contradict each other', "Keep one of them")
    if message["role"] != "assistant" and (weight == 1 or train):
        raise RecordError(f'{where} is to be learned, but has the role "{message["role"]}"',
                          "Only what the assistant says is learned: remove the key, or change the role")


def _check_calls(calls: Any, role: str, where: str) -> None:
    if role != "assistant":
        raise RecordError(f'{where} has "tool_calls", but the role "{role}"', "Only the assistant calls tools")
    if not isinstance(calls, list):
        raise RecordError(f'{where}: "tool_calls" must be a list, not {type_name(calls)}')
    for number, call in enumerate(calls, start=1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(f"{where}: tool call {number} names no function",
                              'Write {"type": "function", "function": {"name": ..., "arguments": {...}}}')
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments.strip():
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = "no JSON"
        elif isinstance(arguments, str):
            arguments = {}
        if arguments is not None and not isinstance(arguments, dict):
            raise RecordError(f"{where}: the arguments of tool call {number} are no JSON object",
                              'Write them as an object, or as the JSON of one: "{\\"city\\": \\"Paris\\"}"')


def _check_content(message: Mapping[str, Any]) -> None:
    content = message["content"]
    if not isinstance(content, list):
        string_of(message, "content")
        return
    for number, part in enumerate(content, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or "text" not in part:
            shown = f"of the type {json.dumps(kind)}" if isinstance(kind, str) and kind != "text" else "not a text"
            raise RecordError(f'part {number} of "content" is {shown}',
                              'Only text is trained on: write {"type": "text", "text": ...} parts, or one string')
        string_of(part, "text")


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
