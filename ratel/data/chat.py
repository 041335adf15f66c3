"""A conversation as tokens, and which of them the assistant said.

Templates differ in every respect but one: they turn messages into a text. So what the assistant said is found in that
text. A template that marks it itself (``{% generation %}``) is believed. For the others each answer is replaced by a
character that occurs nowhere, and what differs between the two texts is the answer; what the template writes after the
answer whatever follows (the end-of-turn marker) belongs to it, because the model must learn to stop.
"""

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np

from ratel.data.records import Chat, RecordError
from ratel.data.tokenizer import DEFAULT_CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = Sequence[Any]


class ChatEncoder:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer

    def encode(self, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and whether each is the assistant's; the template's text exactly, nothing added."""
        try:
            template = self._template(chat)
            if self._tokenizer.is_fast and _MARKS_GENERATION.search(template):
                marked = self._encode_marked(chat, template)
                if marked is not None:
                    return marked
            return self._encode_by_difference(chat, template)
        except RecordError:
            raise
        except Exception as error:  # whatever a template's Jinja raises, its own raise_exception() included
            raise RecordError(f"the tokenizer's chat template refuses these messages: {error}",
                              "Change the messages to what the template allows, or the template") from error

    def _template(self, chat: Chat) -> str:
        if not self._tokenizer.chat_template:
            return DEFAULT_CHAT_TEMPLATE
        return self._tokenizer.get_chat_template(tools=_tools(chat))

    def _encode_marked(self, chat: Chat, template: str) -> tuple[np.ndarray, np.ndarray] | None:
        """By the template's own marks; None where they lead to no token (some tokenizers lose the positions)."""
        out = self._tokenizer.apply_chat_template(
            list(chat.messages), tools=_tools(chat), chat_template=template, return_dict=True,
            return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False})
        mask = np.array(out["assistant_masks"], dtype=bool)
        return (np.array(out["input_ids"], dtype=np.int32), mask) if mask.any() else None

    def _encode_by_difference(self, chat: Chat, template: str) -> tuple[np.ndarray, np.ndarray]:
        def render(messages: Messages, prompt: bool = False) -> str:
            return self._tokenizer.apply_chat_template(list(messages), tools=_tools(chat), chat_template=template,
                                                       tokenize=False, add_generation_prompt=prompt)

        text = render(chat.messages)
        turns = [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]
        return self._tokenize(text, [_answer_span(render, chat.messages, turn, text) for turn in turns])

    def _tokenize(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        if not self._tokenizer.is_fast:
            return self._tokenize_parts(text, spans)
        out = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = np.array(out["input_ids"], dtype=np.int32), np.array(out["offset_mapping"]).reshape(-1, 2)
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            inside = (offsets[:, 1] > start) & (offsets[:, 0] < end)
            for index in np.flatnonzero(inside & (offsets[:, 0] < start)):
                # A token with a space before the first word is the answer's; one with more of the prompt is not.
                inside[index] = text[offsets[index, 0]:start].isspace()
            mask |= inside
        return ids, mask

    def _tokenize_parts(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """For tokenizers that cannot say which characters a token covers: part by part, cut at the spans."""
        ids: list[int] = []
        mask: list[bool] = []
        cursor = 0
        for start, end in [*spans, (len(text), len(text))]:
            for part, said in ((text[cursor:start], False), (text[start:end], True)):
                part_ids = self._tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] if part else []
                ids += part_ids
                mask += [said] * len(part_ids)
            cursor = end
        return np.array(ids, dtype=np.int32), np.array(mask, dtype=bool)


def _answer_span(render: Any, messages: Messages, turn: int, text: str) -> tuple[int, int]:
    """Where in ``text`` (all messages, rendered) the answer of one turn begins and ends, its end marker included."""
    start, end = _content_span(render, messages, turn, text)
    so_far = messages[:turn + 1]
    until_here = render(so_far)
    tail = until_here[_content_span(render, so_far, turn, until_here)[1]:]
    # What stands after the answer both when the conversation ends there and when it goes on.
    marker = commonprefix([tail, text[end:]])
    return _own_start(render, messages[:turn], start, text), end + (len(marker.rstrip()) or len(marker))


def _content_span(render: Any, messages: Messages, turn: int, text: str) -> tuple[int, int]:
    stranger = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in text)
    changed = render([*messages[:turn], {**messages[turn], "content": stranger}, *messages[turn + 1:]])
    if stranger not in changed:
        raise RecordError(f"the tokenizer's chat template leaves out what message {turn + 1} says",
                          "Use a template that renders every answer")
    start = len(commonprefix([text, changed]))
    tail = len(commonprefix([text[start:][::-1], changed[start:][::-1]]))
    return start, len(text) - tail


def _own_start(render: Any, messages: Messages, start: int, text: str) -> int:
    """Where the model's own writing begins: after the generation prompt (so thoughts that the template writes before
    the content count), else at the content, with what space the template puts before it."""
    try:
        before, prompt = render(messages), render(messages, prompt=True)
    except Exception:  # whatever a template's Jinja raises about a conversation that is cut here
        return start
    if not text.startswith(prompt) or len(prompt) > start:
        return start
    return len(prompt) if prompt != before or text[len(prompt):start].isspace() else start


def _tools(chat: Chat) -> list[Any] | None:
    return list(chat.tools) if chat.tools else None
