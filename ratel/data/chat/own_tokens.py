"""Conversations for tokenizers that render them themselves, to tokens and by no template
(mistral-common's, tekken).

The same rule on tokens: a turn begins where the tokens end that the model is given before it, and
its text is what the tokenizer adds for a last message that is to be continued. EOS ends it.
"""

from collections.abc import Sequence as List
from typing import TYPE_CHECKING, Any

import numpy as np

from ratel.data.chat.shapes import THOUGHTS, Shape, in_shape
from ratel.data.sources.records import Chat, RecordError, is_learned
from ratel.data.tokens.tokenizer import eos_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXPECTED = "Change the messages to what the tokenizer allows"


def renders_itself(tokenizer: "PreTrainedTokenizerBase") -> bool:
    try:
        tokenizer.get_chat_template("x")
    except NotImplementedError:
        return True
    return False


def token_rows(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and targets of each text, in the order of the turns."""
    messages = in_shape(chat.messages, chat.tools, Shape(arguments="string")).plain
    rows: list[tuple[list[int], list[tuple[int, int]]]] = []
    for turn in [index for index, message in enumerate(chat.messages) if is_learned(message)][::-1]:
        given = _render(tokenizer, messages[:turn], chat.tools)
        ids = [*_render(tokenizer, messages[:turn + 1], chat.tools, continue_final_message=True), eos_id(tokenizer)]
        if ids[:len(given)] != given:
            raise RecordError(f"the tokenizer renders what stands before message {turn + 1} otherwise with it than without", _EXPECTED)
        _check(tokenizer, messages[:turn + 1], chat.tools, given, ids)
        spans = next((spans for row, spans in rows if row[:len(ids)] == ids), None)
        if spans is None:
            rows.append((ids, spans := []))
        spans.insert(0, (len(given), len(ids)))
    return [_targets(ids, spans) for ids, spans in reversed(rows)]


def _render(tokenizer: "PreTrainedTokenizerBase", messages: List[Any], tools: Any, **options: bool) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template([dict(message) for message in messages], tools=list(tools) if tools else None,
                                                  tokenize=True, return_dict=False, **options))
    except Exception as error:  # the library has many, about all that a conversation may not be
        raise RecordError(f"the tokenizer refuses these messages: {error}", _EXPECTED) from error


def _check(tokenizer: "PreTrainedTokenizerBase", messages: List[Any], tools: Any, given: list[int], ids: list[int]) -> None:
    before, answer = ("".join(tokenizer.decode(part).split()) for part in (given, ids[len(given):]))
    for number, message in enumerate(messages, start=1):
        text = answer if number == len(messages) else before
        if message["role"] == "assistant" and number < len(messages):
            continue  # what is left out of a history is the tokenizer's way at inference, too
        for key in ("content", *THOUGHTS, "tool_calls"):
            if any("".join(said.split()) not in text for said in _said(message, key)):
                raise RecordError(f'the tokenizer leaves out what message {number} says: its "{key}"', _EXPECTED)
    if any(tool["function"]["name"] not in before for tool in tools or ()):
        raise RecordError('the tokenizer leaves out the "tools"', "Remove them from the data")


def _said(message: Any, key: str) -> list[str]:
    value = message.get(key) or ""
    if key == "tool_calls":
        return [call["function"]["name"] for call in value]
    return [part["text"] for part in value] if isinstance(value, list) else [value]


def _targets(ids: list[int], spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    targets = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        targets[start:end] = True
    return np.array(ids, dtype=np.int32), targets
