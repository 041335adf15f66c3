"""A chat template as transformers renders it, with the origin of every character."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from ratel.data.chat import limits
from ratel.data.chat.traced import Traced, formatted, joined, marked, origins_of, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
_AFTER_LOOP = "_after_a_loop"


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """``origins``: a code for each character of ``text``. ``end``: where the last message ends;
    what follows there is written once, after all messages (Phi-3 closes a conversation with another
    token than a turn)."""

    text: str
    origins: str
    end: int


@dataclass(frozen=True, kw_only=True)
class Habits:
    """What a template does with the plainest talk. ``header``: what it writes for the model to go
    on from. ``closes``: it writes something after an answer that is not the beginning of the next
    turn. ``in_parts``: it takes contents in parts only."""

    header: str
    closes: bool
    in_parts: bool


class Template:
    def __init__(self, source: str, tokenizer: "PreTrainedTokenizerBase", today: date) -> None:
        """``today``: what a template that writes the date writes (Llama 3.2, gpt-oss)."""
        self._compiled = _compile(source)
        self.writes_date, self._strftime = "strftime_now" in source, today.strftime
        self._special = dict(tokenizer.special_tokens_map)
        self.knows_generation_prompt = "add_generation_prompt" in source
        self.modes = [{"enable_thinking": mode, "thinking": mode} for mode in (False, True) if "thinking" in source]

    def text(self, messages: Messages, tools: Sequence[Any] | None) -> str:
        return "".join(self._chunks(messages, tools))

    def prompt(self, messages: Messages, tools: Sequence[Any] | None, **mode: bool) -> Rendering | None:
        """What a model is given to answer these messages; None where the template refuses them."""
        try:
            chunks = self._chunks(messages, tools, add_generation_prompt=True, **mode)
        except Exception:  # whatever a template's Jinja raises about a conversation that ends here
            return None
        text = "".join(chunks)
        return Rendering(text=text, origins="".join(map(origins_of, chunks)), end=len(text))

    @cached_property
    def habits(self) -> Habits:
        for in_parts in (False, True):
            contents: list[Any] = [Traced("a", chr(2)), Traced("b", chr(4))]
            if in_parts:
                contents = [[{"type": "text", "text": text}] for text in contents]
            asked, answered = ({"role": role, "content": content} for role, content in zip(("user", "assistant"), contents))
            try:
                before, after = self.trace([asked], None), self.trace([asked, answered], None)
                prompt = self.prompt([asked], None)
            except Exception:  # a template that wants contents in parts, or not
                continue
            if chr(4) not in after.origins:
                continue
            given = before.text[:before.end]
            header = prompt.text[len(given):] if prompt is not None and prompt.text.startswith(given) else ""
            said = after.origins.index(chr(4)) + 1
            return Habits(header=header, closes=bool(after.text[said:after.end].strip()), in_parts=in_parts)
        return Habits(header="", closes=True, in_parts=False)

    def trace(self, messages: Messages, tools: Sequence[Any] | None) -> Rendering:
        chunks = self._chunks(messages, tools)
        origins = "".join(map(origins_of, chunks))
        said = len(origins.rstrip("\0\1"))
        position, ends = 0, []
        for chunk in chunks:
            position += len(chunk)
            if isinstance(chunk, _AfterLoop) and position >= said:
                ends.append(position)
        return Rendering(text="".join(chunks), origins=origins, end=min(ends, default=len(origins)))

    def _chunks(self, messages: Messages, tools: Sequence[Any] | None, **options: bool) -> list[str]:
        given = {**self._special, "strftime_now": self._strftime, "messages": list(messages), "tools": None if tools is None else list(tools),
                 "documents": None, "add_generation_prompt": False, _AFTER_LOOP: _AfterLoop(), **options}
        limits.begin()
        return list(map(limits.written, self._compiled.root_render_func(self._compiled.new_context(given))))


class _AfterLoop(str):
    """An empty string that a template writes where one of its outermost loops has ended."""

    def __str__(self) -> str:
        return self


@lru_cache(maxsize=16)
def _compile(source: str) -> Any:
    environment = _environment()
    tree = environment.parse(source)
    limits.count_turns(tree)
    _mark_ends_of_loops(tree)
    template = environment.from_string(tree)
    template.root_render_func.__globals__["str_join"] = lambda parts: joined(map(str, parts))
    return template


def _environment() -> Any:
    """What transformers gives a template, and filters that keep origins."""
    from jinja2 import TemplateError

    class Environment(limits.LimitedEnvironment):
        concat = staticmethod(joined)

        def operate(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            is_format = operator == "%" and isinstance(left, str)
            return formatted(left, right) if is_format else super().operate(context, operator, left, right)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True,
                              extensions=[_generation_tag(), "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.filters["join"] = _join
    environment.filters["format"] = lambda text, *args, **named: formatted(str(text), named or args)
    environment.limit_filters()
    environment.globals["raise_exception"] = refuse
    return environment


def _join(parts: Any, separator: str = "", attribute: str | None = None) -> str:
    chosen = [part[attribute] if attribute else part for part in parts]
    return joined(text for number, part in enumerate(chosen) for text in ((separator, str(part)) if number else (str(part),)))


def _generation_tag() -> type:
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}``: what is between was said by the assistant."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return marked(caller())

    return Generation


def _mark_ends_of_loops(node: Any) -> None:
    """Write an ``_AfterLoop`` after every loop that is in no other loop and in no block that is put
    together first."""
    from jinja2 import nodes

    for name, value in list(node.iter_fields()):
        if not isinstance(value, list):
            continue
        changed = []
        for child in value:
            changed.append(child)
            if isinstance(child, nodes.For):
                mark = nodes.Output([nodes.Name(_AFTER_LOOP, "load")]).set_lineno(child.lineno)
                mark.set_environment(child.environment)
                changed.append(mark)
            elif isinstance(child, (nodes.If, nodes.With, nodes.Scope)):
                _mark_ends_of_loops(child)
        setattr(node, name, changed)


def json_text(value: Any) -> str:
    """A value as APIs write a call's arguments."""
    return json.dumps(value, ensure_ascii=False)
