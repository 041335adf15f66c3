"""A conversation as tokens, and which of them the assistant said."""

import re
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from ratel.data.chat.own_tokens import renders_itself, token_rows
from ratel.data.chat.shapes import Shape, in_shape, shapes_of
from ratel.data.chat.template import Template
from ratel.data.chat.turns import Row, Turns
from ratel.data.sources.records import Chat, RecordError, is_learned
from ratel.data.tokens.pieces import Pieces
from ratel.data.tokens.tokenizer import DEFAULT_CHAT_TEMPLATE, added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Token ids int32 [n] of one text, and whether each is to be learned. ``is_ended``: the last
    token is the end of an answer that the template writes itself, or no answer stands last."""

    ids: np.ndarray
    targets: np.ndarray
    is_ended: bool


class ChatEncoder:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase", today: date | None = None) -> None:
        self._tokenizer, self._today = tokenizer, today or date.today()
        self._pieces = Pieces(tokenizer)
        self._templates: dict[str, Template] = {}
        self._renders_itself = renders_itself(tokenizer)
        added = sorted(added_tokens(tokenizer), key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, added)) or r"(?!)")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_templates": {}}  # code that Jinja made, which is made again

    def encode(self, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        """All of ``sequences``, one after the other."""
        found = self.sequences(chat)
        return np.concatenate([one.ids for one in found]), np.concatenate([one.targets for one in found])

    def sequences(self, chat: Chat) -> list[Sequence]:
        """One, or several where the template rewrites what was said before (see ``turns``)."""
        if self._renders_itself:
            return [Sequence(ids=ids, targets=targets, is_ended=True) for ids, targets in token_rows(self._tokenizer, chat)]
        return [self._tokenize(row) for row in self.rows(chat)]

    def rows(self, chat: Chat) -> list[Row]:
        """The rows of a conversation, in the first shape of the messages in which the template
        writes all that they say."""
        source = self._source(chat)
        template = self._template(source)
        refusal: RecordError | None = None
        for shape in shapes_of(chat.messages, in_parts=template.habits.in_parts):
            try:
                return self._rows_in(chat, source, shape)
            except RecordError as error:
                # What is wrong with them as they are written; rather that something is left out
                # than Jinja's words.
                if refusal is None or shape.content is None and refusal.__cause__ and not error.__cause__:
                    refusal = error
        assert refusal is not None
        raise refusal

    def _rows_in(self, chat: Chat, source: str, shape: Shape) -> list[Row]:
        learned = [turn for turn, message in enumerate(chat.messages) if is_learned(message)]
        try:
            shaped = in_shape(chat.messages, chat.tools, shape)
            turns = Turns(self._template(source), shaped, learned, self._marker_at)
            ours = turns.whole.rendering.text  # first, since only here a template that does not end is stopped
            theirs = self._tokenizer.apply_chat_template(
                list(shaped.plain), tools=None if shaped.tools is None else list(shaped.tools), chat_template=source,
                tokenize=False)
            if self._template(source).writes_date:  # transformers writes that of now
                ours = Template(source, self._tokenizer, datetime.now()).text(shaped.plain, shaped.tools)
            theirs.encode("utf-8")
            if theirs == ours:
                return turns.rows()
        except RecordError:
            raise
        except UnicodeEncodeError:
            raise RecordError("the conversation holds half of a surrogate pair (\\ud800 to \\udfff), which is no character",
                              "Write the whole character") from None
        except Exception as error:  # whatever a template's Jinja raises, its own raise_exception() included
            raise RecordError(f"the tokenizer's chat template refuses these messages: {error}",
                              "Change the messages to what the template allows, or the template") from error
        raise RecordError("the chat template renders these messages otherwise in transformers than here",
                          "Report this, with the template")

    def _template(self, source: str) -> Template:
        if source not in self._templates:
            try:
                self._templates[source] = Template(source, self._tokenizer, self._today)
            except Exception as error:  # of Jinja, about its own language
                raise RecordError(f"the tokenizer's chat template cannot be read: {error}", "Repair the template") from error
        return self._templates[source]

    def _source(self, chat: Chat) -> str:
        if not self._tokenizer.chat_template:
            return DEFAULT_CHAT_TEMPLATE
        try:
            return self._tokenizer.get_chat_template(tools=list(chat.tools) if chat.tools else None)
        except ValueError as error:  # several templates, and none of them is the default
            raise RecordError(f"the tokenizer has no chat template for this conversation: {error}",
                              'Name one of its templates "default"') from error

    def _marker_at(self, text: str) -> str:
        """The added token that a text begins with, or nothing."""
        found = self._marker.match(text)
        return found.group() if found else ""

    def _tokenize(self, row: Row) -> Sequence:
        """Part by part, cut where turns begin and end: at inference, too, the last token of what a
        model is given ends where the generation prompt does."""
        text, parts, cursor, answer, is_begun = row.rendering.text, list[np.ndarray](), 0, "", False
        for start, end in [*row.spans, (len(text), len(text))]:
            context = self._pieces.after(answer, text[cursor:start]) if is_begun else self._pieces.first(text[cursor:start])
            cursor, answer = end, text[start:end]
            is_begun = is_begun or len(context) > 0
            parts += [context, self._pieces.next(answer) if is_begun else self._pieces.first(answer)]
            is_begun = is_begun or len(parts[-1]) > 0
        ids = np.concatenate(parts)
        targets = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in parts])
        ended = not targets[-1] or bool(self._marker_at(self._tokenizer.decode(ids[-1:].tolist())))
        return Sequence(ids=ids, targets=targets, is_ended=ended)
