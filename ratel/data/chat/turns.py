"""Which characters of a conversation the assistant wrote.

What counts is what a model sees and writes at inference. Before a turn it is given the earlier
messages and the generation prompt: what a template renders of those is context. The turn ends where
the conversation up to it ends. As long as the text of all messages begins with both, one text holds
all turns; a template that renders a turn otherwise once others follow (Qwen3 drops its thought,
gpt-oss changes its end) gives that turn a text of its own, as it was when the turn was written.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ratel.data.chat.shapes import THOUGHTS, TOOLS, Field, Shaped, field_finder
from ratel.data.chat.template import Rendering, Template
from ratel.data.chat.traced import Traced
from ratel.data.sources.records import RecordError

_STRANGER = chr(2)
"""The origin of a content that stands in for another."""
_THOUGHT_END = "</think>"
CharSpan = tuple[int, int]


@dataclass(kw_only=True, eq=False)
class Row:
    """A rendering of the messages before ``until``, and where the turns lie in it that are learned
    here.

    ``owners``: of each character, the message that it is the text of (see ``field_finder``).
    """

    rendering: Rendering
    owners: str
    until: int
    spans: list[CharSpan] = field(default_factory=list)


class Turns:
    """``markers``: the tokens that end or begin something, as texts (added tokens), longest
    first."""

    def __init__(self, template: Template, shaped: Shaped, learned: list[int], markers: Callable[[str], str]) -> None:
        self._template, self._shaped, self._learned, self._marker_at = template, shaped, learned, markers
        self._owners_of = field_finder(shaped.fields)

    def rows(self) -> list[Row]:
        """The rows in the order of the turns; each learned turn is in one of them, as the model
        will have to write it."""
        rows = [self.whole]
        for turn in reversed(self._learned):
            row, start, end = self._find(turn, rows)
            if row not in rows:
                rows.append(row)
            row.spans[:0] = self._spans(row, turn, start, end)
        used = [row for row in reversed(rows) if row.spans]
        for row in used:
            self._check_context(row)
        return used

    @cached_property
    def whole(self) -> Row:
        return self._row(len(self._shaped.plain))

    def _row(self, until: int) -> Row:
        return self._make_row(self._template.trace(self._shaped.traced[:until], self._shaped.traced_tools), until)

    def _make_row(self, rendering: Rendering, until: int) -> Row:
        return Row(rendering=rendering, owners=self._owners_of(rendering.origins), until=until)

    def _find(self, turn: int, rows: list[Row]) -> tuple[Row, int, int]:
        """The row that has this turn as it is when it is the last, and where the turn begins and
        ends there."""
        row, end = self._find_end(turn, rows)
        prompt = self._template.prompt(self._shaped.plain[:turn], self._shaped.tools)
        start = self._start(row, turn, end, None if prompt is None else prompt.text)
        header = self._template.habits.header
        if prompt is not None and prompt.text.endswith(header):
            if not row.rendering.text.startswith(prompt.text.removesuffix(header)):
                return self._after_prompt(turn, row, start, end)  # the turn changes what stands before it (gpt-oss)
        return row, start, end

    def _find_end(self, turn: int, rows: list[Row]) -> tuple[Row, int]:
        if turn + 1 == len(self._shaped.plain):
            return self.whole, len(self.whole.rendering.text)
        try:
            alone = self._template.text(self._shaped.plain[:turn + 1], self._shaped.tools)
        except Exception as error:  # whatever a template's Jinja raises about a conversation that is cut here
            raise RecordError(f"the chat template renders message {turn + 1} only together with what follows, so where "
                              f"it ends cannot be told ({error})", "Cut the conversation there") from error
        for row in reversed(rows):
            if row.rendering.text.startswith(alone):
                return row, len(alone)
        own = self._row(turn + 1)
        end = own.rendering.end
        for row in reversed(rows):
            if row.rendering.text.startswith(own.rendering.text[:end]) and self._is_ended(own, turn):
                return row, end
        return own, len(own.rendering.text)

    def _is_ended(self, row: Row, turn: int) -> bool:
        """Whether the turn has an end of its own before what the template writes after all
        messages."""
        after = row.owners.rfind(chr(2 + turn)) + 1
        return bool(row.rendering.text[after:row.rendering.end].strip()) or not row.rendering.text[after:].strip()

    def _after_prompt(self, turn: int, row: Row, start: int, end: int) -> tuple[Row, int, int]:
        prompt = self._template.prompt(self._shaped.traced[:turn], self._shaped.traced_tools)
        assert prompt is not None
        added = slice(start, end)
        rendering = Rendering(text=prompt.text + row.rendering.text[added], end=prompt.end + end - start,
                              origins=prompt.origins + row.rendering.origins[added])
        return self._make_row(rendering, turn + 1), prompt.end, rendering.end

    def _spans(self, row: Row, turn: int, start: int, end: int) -> list[CharSpan]:
        text, owner, habits = row.rendering.text, chr(2 + turn), self._template.habits
        said = max(start, row.owners.rfind(owner, 0, end) + 1)
        marker = text[said:end]
        if marker.strip():
            end = said + len(marker.rstrip())
        if not habits.closes:  # nothing ends a turn but what begins the next one (GLM)
            following = self._marker_at(text[end:])
            end += 0 if habits.header.lstrip().startswith(following) else len(following)
        if row.owners[start:end].strip("\0\1" + owner):
            raise RecordError(f"the chat template writes other messages inside message {turn + 1}, so what the "
                              "assistant said cannot be told from them", "Use a template that keeps turns apart")
        self._check_said(row, turn, text[:end])
        self._check_thought(turn, text[start:end])
        return self._marked(row, turn, start, end, said)

    def _start(self, row: Row, turn: int, end: int, prompt: str | None) -> int:
        """Where the model begins to write: after what it is given; else after the header that the
        template writes before every answer; else where the message's own text begins."""
        text, said, habits = row.rendering.text, row.owners.find(chr(2 + turn), 0, end), self._template.habits
        given = self._given(text[:end], row.owners, turn, prompt)
        if given >= 0 and self._template.knows_generation_prompt:
            # After a tool's result some templates give nothing to go on from, and write a header
            # all the same.
            return given + len(habits.header) * (bool(habits.header) and text.startswith(habits.header, given))
        if given >= 0 and not text[given:max(said, given)].strip():
            return given
        first = end if said < 0 else said
        others = len(row.owners[:first].rstrip("\0\1"))
        header = text.rfind(habits.header, others, first) if habits.header else -1
        if header >= 0:
            return header + len(habits.header)
        before = self._header_of(turn)
        if before is not None and len(before) <= first and text.startswith(before):
            first = len(before)
        elif said < 0:
            raise RecordError(f"where message {turn + 1} begins cannot be told: the chat template writes none of it",
                              "Use a template that renders every answer")
        return len(text[:first].rstrip(" "))  # a space before the first word is written with it

    def _given(self, text: str, owners: str, turn: int, prompt: str | None) -> int:
        """How much of a text the model is given: the prompt by default, or the one with thinking
        switched off or on that fits better (an empty thought that is not the model's). -1: none
        fits."""
        given = len(prompt) if prompt is not None and text.startswith(prompt) else -1
        if owners[given:given + 1] == chr(2 + turn):
            return given
        for mode in self._template.modes:
            other = self._template.prompt(self._shaped.plain[:turn], self._shaped.tools, **mode)
            if other is not None and text.startswith(other.text):
                given = max(given, len(other.text))
        return given

    def _header_of(self, turn: int) -> str | None:
        """What the template writes before the content of an answer that has nothing but a
        content."""
        kept = {key: value for key, value in self._shaped.plain[turn].items() if key in ("role", "name")}
        word: Any = Traced("x", _STRANGER)
        in_parts = any(isinstance(message.get("content"), list) for message in self._shaped.plain)
        content = [{"type": "text", "text": word}] if in_parts else word
        try:
            found = self._template.trace((*self._shaped.plain[:turn], {**kept, "content": content}), self._shaped.tools)
        except Exception:  # whatever a template's Jinja raises about a conversation that is cut here
            return None
        at = found.origins.find(_STRANGER)
        return found.text[:at] if at >= 0 else None

    def _marked(self, row: Row, turn: int, start: int, end: int, said: int) -> list[CharSpan]:
        """What is learned by the template's own marks, where it has some: what they leave out of
        its own writing is not learned."""
        is_marked, owners = _codes(row.rendering.origins) & 1 == 1, _codes(row.owners)
        if not is_marked.any():
            return [(start, end)]
        assistants = [2 + index for index, message in enumerate(self._shaped.plain) if message["role"] == "assistant"]
        foreign = owners[is_marked & (owners > 1) & ~np.isin(owners, assistants)]
        if len(foreign):
            raise RecordError(f"the chat template marks what message {foreign[0] - 1} says as the assistant's",
                              "Repair its {% generation %} marks, or remove them: the answers are found without")
        if (~is_marked & (owners == 2 + turn))[start:end].any():
            raise RecordError(f"the chat template's {{% generation %}} marks leave out a part of message {turn + 1}",
                              "Repair its {% generation %} marks, or remove them: the answers are found without")
        is_marked[said:end] = True  # the end of a turn belongs to it in any case
        steps = np.diff(is_marked[start:end].astype(np.int8), prepend=0, append=0)
        return [(start + int(at), start + int(to)) for at, to in zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1))]

    def _check_said(self, row: Row, turn: int, text: str) -> None:
        """All that the assistant said is in the text up to the end of its turn."""
        for item in self._shaped.fields:
            if item.message == turn and item.is_required and not _is_written(row.rendering, item, text):
                raise RecordError(f'the chat template leaves out what message {turn + 1} says, or a part of it: its '
                                  f'"{item.name}" ({_shortened(item.text)})', "Use a template that renders all of every answer, "
                                  "or remove the part from the data")

    def _check_thought(self, turn: int, text: str) -> None:
        """A thought in a content may be taken for no thought, and an empty one be written before it
        (Qwen3.8; others where a content only ends it)."""
        own = [item for item in self._shaped.fields if item.message == turn and item.is_required]
        ends = sum(item.text.count(_THOUGHT_END) for item in own)
        if ends and text.count(_THOUGHT_END) > ends + any(item.name in THOUGHTS for item in own):
            raise RecordError(f"the chat template writes another {_THOUGHT_END} before that of message {turn + 1}",
                              'Write the thought as "reasoning_content"')

    def _check_context(self, row: Row) -> None:
        origins = set(row.rendering.origins)
        missing: dict[tuple[int, str], Field] = {}
        for item in self._shaped.fields:
            role = "" if item.message == TOOLS else self._shaped.plain[item.message]["role"]
            # What an assistant said before may be left out of a history: that is the template's way
            # at inference, too.
            must = item.is_required and role != "assistant" or item.name == "tools" or item.name == "name" and role != "tool"
            if must and item.message < row.until:
                missing.setdefault((item.message, item.name), item)
        for item in self._shaped.fields:
            if item.code in origins or chr(ord(item.code) + 1) in origins:
                missing.pop((item.message, item.name), None)
        for (message, name), _ in missing.items():
            what = '"tools"' if message == TOOLS else f'"{name}" of message {message + 1}'
            raise RecordError(f"the chat template leaves out what is said: {what}",
                              "Use a template that renders it, or remove it from the data")


def _is_written(rendering: Rendering, item: Field, text: str) -> bool:
    codes = (item.code, chr(ord(item.code) + 1))
    if sum(rendering.origins.count(code, 0, len(text)) for code in codes) >= len(item.text):
        return True
    wanted = sum(not char.isspace() for char in item.text)
    found = sum(origin in codes and not char.isspace() for char, origin in zip(text, rendering.origins))
    # A template may write a part of a content itself that it took out: the tags around a thought.
    is_said_again = item.name != "tool_calls" and found > 0 and "".join(item.text.split()) in "".join(text.split())
    return found >= wanted or is_said_again


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 40 else line[:39] + "…")
