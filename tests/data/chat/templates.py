"""The chat templates that TRL ships as files, the talks that they are tried with, and how two masks
differ."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ratel.data import byte_level_tokenizer
from ratel.data.chat import ChatEncoder
from ratel.data.sources.records import Chat, RecordError

MARKER = re.compile(r"<[|｜][^<>|｜{}\s]{1,40}[|｜]>|</?(?:start_of_turn|end_of_turn|end_of_utterance|turn\||\|turn|s)>"
                    r"|<\|[a-z_]+>|<[a-z_]+\|>|\[gMASK\]|<sop>")


def directory() -> Path | None:
    """Without importing the package, which needs more than its files."""
    found = importlib.util.find_spec("trl")
    return None if found is None or not found.origin else Path(found.origin).parent / "chat_templates"


def names(*, twins: bool) -> list[str]:
    """The names of the templates with a twin, or without one."""
    folder = directory()
    stems = {path.stem for path in folder.glob("*.jinja")} if folder else set()
    return sorted(stem for stem in stems if not stem.endswith("_training") and (f"{stem}_training" in stems) == twins)


def require() -> Path:
    folder = directory()
    if folder is None:
        reason = "the package trl is not installed, whose chat templates are read: pip install --no-deps trl"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def source(name: str) -> str:
    return (require() / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_for(*sources: str) -> PreTrainedTokenizerBase:
    """Bytes, and the templates' own markers as tokens."""
    tokenizer = byte_level_tokenizer()
    markers = {marker for text in sources for marker in MARKER.findall(text)}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(markers)})
    tokenizer.chat_template = sources[0]
    return tokenizer


def messages(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def call(content: str | None = None, thought: str | None = None, *more: tuple[str, Any]) -> dict[str, Any]:
    calls = [("look", {"city": "Paris"}), *more]
    message = {"role": "assistant", "content": content, "reasoning_content": thought, "tool_calls": [
        {"id": f"call{index}2345", "type": "function", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(calls)]}
    return {key: value for key, value in message.items() if value is not None}


def result(content: str = "twenty degrees", index: int = 0, name: str = "look") -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": name, "tool_call_id": f"call{index}2345"}


def thought(text: str, content: str) -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": text, "content": content}


ASKED = messages(("user", "How warm?"))
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look it up.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "where"}}, "required": ["city"]}}}]
TALKS: dict[str, list[dict[str, Any]]] = {
    "single turn": messages(("user", "Hi"), ("assistant", "Hello.")),
    "several turns": messages(("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?"), ("assistant", "four")),
    "system": messages(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "x"), ("assistant", "Yes.")),
    "tools": [*ASKED, call(), result(), *messages(("assistant", "Mild."))],
    "tools, then more": [*ASKED, call(), result(), *messages(("assistant", "Mild."), ("user", "Thanks"), ("assistant", "Bye."))],
    "two calls at once": [*ASKED, call(None, None, ("find", {"n": 2, "deep": True})), result(), result("seven", 1, "find"),
                          *messages(("assistant", "Mild."))],
    "call with content": [*ASKED, call("I will look."), result(), *messages(("assistant", "Mild."))],
    "ends with a call": [*ASKED, call()],
    "thought in the last turn": [*messages(("user", "Hi")), thought("A greeting.", "Hello.")],
    "thought in every turn": [*messages(("user", "Hi")), thought("A greeting.", "Hello."), *messages(("user", "2+2?")),
                              thought("A sum.", "four")],
    "thought in the content": messages(("user", "Hi"), ("assistant", "<think>\nA greeting.\n</think>\n\nHello.")),
    "thought and call": [*ASKED, call(None, "Look first."), result(), thought("Now say it.", "Mild.")],
    "assistant twice": messages(("user", "Hi"), ("assistant", "Hello."), ("assistant", "More.")),
    "ends with the user": messages(("user", "Hi"), ("assistant", "Hello."), ("user", "So long")),
    "empty answer": messages(("user", "Hi"), ("assistant", ""), ("user", "x"), ("assistant", "Yes.")),
    "spaces around": messages(("user", " Hi \n"), ("assistant", "  Hello.\n\n"), ("user", "x\n"), ("assistant", "\n\nYes. ")),
    "markers in the text": messages(("user", "<|im_end|>\n<|im_start|>assistant\n<|user|><|eot_id|>"),
                                    ("assistant", "say <|im_end|> and <|end|><end_of_turn><turn|> now")),
    "other scripts": messages(("user", "é😀語"), ("assistant", "ﷺ e\u0301 😀\u200d語")),
    "names of roles": messages(("user", "assistant"), ("assistant", "assistant"), ("user", "user"), ("assistant", "user")),
    "JSON": messages(("user", '{"a": "b"}'), ("assistant", '{"a": ["\\n", "\\"q\\""]}')),
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]},
              {"role": "assistant", "content": [{"type": "text", "text": "Hello."}, {"type": "text", "text": " You."}]}],
}


class Learned:
    """What is learned of a talk: ``stretches`` with the text ``before`` each, in ``texts``; or why
    it is ``refused``."""

    def __init__(self, encoder: ChatEncoder, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.stretches: list[str] = []
        self.before: list[str] = []
        self.texts: list[str] = []
        self.refused: str | None = None
        tools = tuple(TOOLS) if name.startswith("tools") else None
        try:
            found = encoder.sequences(Chat(messages=tuple(TALKS[name]), tools=tools))
        except RecordError as error:
            self.refused = str(error)
            return
        for one in found:
            self.texts.append(tokenizer.decode(one.ids))
            for start, end in runs(one.targets):
                self.stretches.append(tokenizer.decode(one.ids[start:end]))
                self.before.append(tokenizer.decode(one.ids[:start]))


def runs(mask: Any) -> list[tuple[int, int]]:
    starts = [at for at, is_in in enumerate(mask) if is_in and not (at and mask[at - 1])]
    ends = [at + 1 for at, is_in in enumerate(mask) if is_in and (at + 1 == len(mask) or not mask[at + 1])]
    return list(zip(starts, ends))


def render(tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> tuple[list[str], str] | None:
    """What transformers says that a template marks, and the whole text; None where the template
    refuses the talk. Contents are given as they are, then joined, then in parts, until all of the
    talk is in the text."""
    # Older transformers give a thought by the one name that it was written under.
    talk = [{"thinking": message["reasoning_content"], **message} if "reasoning_content" in message else message
            for message in TALKS[name]]
    joined = [{**message, "content": "".join(part["text"] for part in message["content"])}
              if isinstance(message.get("content"), list) else message for message in talk]
    parted = [{**message, "content": [{"type": "text", "text": message["content"]}]}
              if isinstance(message.get("content"), str) else message for message in talk]
    first: tuple[list[str], str] | None = None
    for shape in (talk, joined, parted):
        try:
            [text], [marks] = render_jinja_template([shape], TOOLS if name.startswith("tools") else None, chat_template=template,
                                                    return_assistant_tokens_mask=True, **tokenizer.special_tokens_map)
        except Exception:  # whatever a template's Jinja raises
            continue
        found = _stretches(text, marks), text
        if not lost(name, text) and "{'type'" not in text:
            return found
        first = first or found
    return first


def _stretches(text: str, marks: list[tuple[int, int]]) -> list[str]:
    """Marks that meet are one."""
    is_marked = [False] * len(text)
    for start, end in marks:
        is_marked[start:end] = [True] * (end - start)
    return [text[start:end] for start, end in runs(is_marked)]


def lost(name: str, text: str) -> list[str]:
    """What the assistant says in a talk and a text does not."""
    squeezed = "".join(text.split())
    said = ["Look it up."] if name.startswith("tools") else []
    for message in TALKS[name]:
        if message["role"] == "assistant":
            content = message.get("content") or ""
            said += [part["text"] for part in content] if isinstance(content, list) else [content]
            said += [message.get("reasoning_content") or ""]
            said += [item for one in message.get("tool_calls", ()) for item in
                     (one["function"]["name"], *one["function"]["arguments"])]
    return [text for text in said if "".join(text.split()) not in squeezed]


def compare(name: str, learned: Learned, twin: tuple[list[str], str] | None, plain: str) -> str:
    """A word for how the mask of a template differs from that of its twin; "unexplained" is none.
    ``plain``: the talk as transformers renders it with the template."""
    if learned.refused is not None:
        return "refused" if lost(name, plain) or "another </think>" in learned.refused else "unexplained"
    if twin is None:
        return "twin fails"
    if len(learned.texts) > 1 or lost(name, plain) and not lost(name, learned.texts[0]):
        agrees = _agreement(learned.stretches[-1:], learned.before[-1:], twin[0][-1:]) != "unexplained"
        return "rewritten" if agrees else "unexplained"
    return _agreement(learned.stretches, learned.before, twin[0])


def _agreement(ours: list[str], before: list[str], theirs: list[str]) -> str:
    ours, theirs = [text.rstrip() for text in ours], [text.rstrip() for text in theirs]
    if ours == theirs:
        return "equal"
    if len(ours) == len(theirs) and all(_is_given(one, context, other) for one, context, other in zip(ours, before, theirs)):
        return "given"
    rest, found = "\n".join(theirs), "end"
    for one, context in zip(ours, before):
        bare = _without_ends(one)
        head, found_it, rest = rest.partition(bare)
        head = _without_ends(head)
        if not found_it or head.strip() and not context.endswith(head.strip("\n")) and not context.endswith(head):
            return "unexplained"
    return found if not _without_ends(rest).strip() else "unexplained"


def _is_given(one: str, context: str, other: str) -> bool:
    return other.endswith(one) and context.endswith(other[:len(other) - len(one)])


def _without_ends(text: str) -> str:
    """Without markers (and spaces) at its end."""
    while (cut := re.sub(rf"(?:{MARKER.pattern})\s*$", "", text.rstrip())) != text:
        text = cut
    return text
