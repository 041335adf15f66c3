"""Where an answer begins and ends, for the kinds of templates there are: one small template for
each kind."""

import json
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from ratel.data import byte_level_tokenizer
from ratel.data.batches.encode import Document, Encoder
from ratel.data.batches.packing import NO_LOSS, Packer
from ratel.data.review.survey import texts_of
from ratel.data.sources.records import RecordError, parse_line

pytestmark = pytest.mark.unit

TALK = [("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?"), ("assistant", "four")]
# Each turn closed by a token, and the model's own header as the generation prompt.
CLOSED = ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
PHI = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
# Nothing closes a turn but the next one.
GLM = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function.name }}</call>"
       "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
# The results of tools are written while the turn of the call is.
INSIDE = ("{% for m in messages %}{% if m.role == 'tool' %}{% elif m.role == 'assistant' %}"
          "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|assistant|>\n{% endif %}"
          "{% for c in m.tool_calls or [] %}[call {{ c.function.name }}]{% endfor %}"
          "{% for t in messages[loop.index0 + 1:] if m.tool_calls and t.role == 'tool' %}[result {{ t.content }}]{% endfor %}"
          "{{ m.content }}{% if not m.tool_calls %}<|end|>\n{% endif %}{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
          "{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}<|assistant|>\n{% endif %}")
# Thoughts of the last turn only; without one, or with thinking switched off in the prompt, an empty
# one.
THINKS = ("{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}"
          "</think>{% endif %}{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
          "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}")
# The thought of a call stays until there is a final answer: adding a turn changes what stands
# before it.
FORGETS = ("{% set final = messages[-1].role == 'assistant' and not messages[-1].tool_calls %}{% for m in messages %}"
           "<|{{ m.role }}|>{% if m.reasoning_content and (loop.last or not final) %}[thought {{ m.reasoning_content }}]{% endif %}"
           "{% for c in m.tool_calls or [] %}[call {{ c.function.name }}]{% endfor %}{{ m.content }}<|end|>{% endfor %}"
           "{% if add_generation_prompt %}<|assistant|>{% endif %}")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}


def messages(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def tokenizer_for(template: str, **special: str) -> PreTrainedTokenizerBase:
    tokenizer = byte_level_tokenizer()
    markers = ["<|end|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|system|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": markers, **special})
    tokenizer.chat_template = template
    return tokenizer


def encoded(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, Any]], **more: Any) -> Document:
    record = parse_line(json.dumps({"messages": talk, **more}).encode())
    return Encoder(tokenizer).encode(record)


def said(template: str, talk: list[dict[str, Any]], **more: Any) -> list[str]:
    """The stretches that are learned."""
    tokenizer = tokenizer_for(template)
    document = encoded(tokenizer, talk, **more)
    stretches = []
    for start, end in texts_of(document):
        ids, targets = document.ids[start:end], np.append(document.targets[start:end], False)
        borders = np.flatnonzero(np.diff(targets.astype(int), prepend=0)).tolist()
        stretches += [tokenizer.decode(ids[a:b]) for a, b in zip(borders[::2], borders[1::2])]
    return stretches


def texts(template: str, talk: list[dict[str, Any]]) -> list[str]:
    tokenizer = tokenizer_for(template)
    document = encoded(tokenizer, talk)
    return [tokenizer.decode(document.ids[start:end]) for start, end in texts_of(document)]


def refused(template: str, talk: list[dict[str, Any]], message: str, **more: Any) -> None:
    with pytest.raises(RecordError, match=message):
        said(template, talk, **more)


def test_the_end_of_a_turn_is_learned_in_every_turn_and_the_next_role_never() -> None:
    for template in (CLOSED, PHI.replace("eos_token", "''")):
        assert said(template, messages(*TALK)) == ["Hello.<|end|>", "four<|end|>"]
        assert said(template, messages(*TALK[:3])) == ["Hello.<|end|>"]
    assert said(PHI, messages(*TALK)) == ["Hello.<|end|>", "four<|end|>\n<|eos|>"]
    assert len(texts(PHI, messages(*TALK))) == 1


def test_the_end_is_learned_where_it_pads_too() -> None:
    tokenizer = tokenizer_for(CLOSED.replace("<|end|>", "{{ eos_token }}"), pad_token="<|end|>", eos_token="<|end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    document = encoded(tokenizer, messages(*TALK))
    assert document.targets[document.ids == tokenizer.eos_token_id].tolist() == [False, True, False, True]


def test_eos_is_added_but_not_learned_after_a_turn_s_own_end() -> None:
    tokenizer = tokenizer_for(CLOSED.replace("<|end|>\n", "<|end|>"))
    document = encoded(tokenizer, messages(*TALK))
    assert document.ids[-1] == tokenizer.eos_token_id and document.targets[-2:].tolist() == [True, False]


def test_bos_is_there_once() -> None:
    document = encoded(tokenizer_for(CLOSED), messages(*TALK))
    assert (document.ids == 256).sum() == 1 and document.ids[0] == 256
    assert (encoded(tokenizer_for(PHI), messages(*TALK)).ids == 256).sum() == 0  # the template wants none


def test_what_begins_the_next_turn_ends_one_that_nothing_else_ends() -> None:
    assert said(GLM, messages(*TALK)) == ["Hello.<|user|>", "four<|eos|>"]
    talk = [*messages(("user", "a")), CALL, *messages(("tool", "20"), ("assistant", "Mild."), ("assistant", "More."))]
    assert said(GLM, talk) == ["<call>look</call><|tool|>", "Mild.", "More.<|eos|>"]


def test_a_tool_s_result_inside_a_turn_is_not_learned() -> None:
    talk = [*messages(("user", "Warm?")), CALL, *messages(("tool", "20 DEGREES"), ("assistant", "Mild."))]
    assert said(INSIDE, talk) == ["[call look]", "Mild.<|end|>"]
    assert said(INSIDE, [*talk, *messages(*TALK[:2])]) == ["[call look]", "Mild.<|end|>", "Hello.<|end|>"]
    two = [talk[0], CALL, *messages(("tool", "one"), ("tool", "two"), ("assistant", "Mild."))]
    assert said(INSIDE, two) == ["[call look]", "Mild.<|end|>"]


def test_what_the_generation_prompt_writes_is_not_learned() -> None:
    opens = CLOSED.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think></think>{% endif %}").replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}")
    assert said(opens, messages(*TALK)) == ["Hello.<|end|>", "four<|end|>"]
    begun = CLOSED.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>{% endif %}")
    assert said(begun, messages(("user", "Hi"), ("assistant", "<think>hm</think>Hello."))) == ["hm</think>Hello.<|end|>"]
    assert said(begun, messages(*TALK)) == ["Hello.<|end|>", "four<|end|>"]


def test_each_turn_is_learned_as_it_was_when_it_was_the_last() -> None:
    talk = messages(*TALK)
    assert said(THINKS, talk) == ["Hello.<|end|>", "four<|end|>"]  # an empty thought is what the prompt writes
    assert texts(THINKS, talk)[0] == "<|user|>\nHi<|end|>\n<|assistant|>\n<think></think>Hello.<|end|>\n<|eos|>"
    talk[1]["reasoning_content"], talk[3]["reasoning_content"] = "greet", "add"
    assert said(THINKS, talk) == ["<think>greet</think>Hello.<|end|>", "<think>add</think>four<|end|>"]
    assert "greet" not in texts(THINKS, talk)[1]  # as the model will see it
    calls = [*messages(("user", "Warm?")), {**CALL, "reasoning_content": "look"}, *messages(("tool", "20")),
             {"role": "assistant", "content": "Mild.", "reasoning_content": "say"}]
    assert said(FORGETS, calls) == ["[thought look][call look]<|end|>", "[thought say]Mild.<|end|>"]
    assert texts(FORGETS, calls)[-1] == ("<|user|>Warm?<|end|><|assistant|>[thought look][call look]<|end|><|tool|>20<|end|>"
                                         "<|assistant|>[thought say]Mild.<|end|><|eos|>")


def test_several_texts_of_a_conversation_are_packed_apart() -> None:
    tokenizer = tokenizer_for(THINKS)
    document = encoded(tokenizer, messages(*TALK))
    first, second = texts_of(document)
    drawn = iter([(0, document)])
    packer = Packer(lambda: next(drawn, None), seq_len=len(document), pad_id=0)
    row = packer.next_row()
    assert row is not None and packer.next_row() is None
    assert np.flatnonzero(row.position_ids == 0).tolist() == [0, second[0]]
    assert row.num_targets == document.targets.sum() and (row.labels != NO_LOSS).sum() == len("Hello.four") + 2
    # One that waits is taken up again by its number and start.
    drawn = iter([(7, document)])
    packer = Packer(lambda: next(drawn, None), seq_len=first[1], pad_id=0)
    packer.next_row()
    assert packer.waiting == [(7, second[0])]


def test_what_is_to_be_learned_can_be_chosen() -> None:
    talk = messages(*TALK)
    for key, no, yes in (("weight", 0, 1), ("train", False, True)):
        assert said(CLOSED, [talk[0], {**talk[1], key: no}, *talk[2:]]) == ["four<|end|>"]
        assert said(CLOSED, [talk[0], {**talk[1], key: yes}, talk[2], {**talk[3], key: no}]) == ["Hello.<|end|>"]
        assert said(CLOSED, [{**talk[0], key: no}, {**talk[1], key: None}]) == ["Hello.<|end|>"]
    prints = CLOSED.replace("{{ m.content }}", "{{ m.content }}{{ m.weight }}{{ m.train }}")
    assert said(prints, [{**message, "weight": int(message["role"] == "assistant")} for message in talk])[0] == "Hello.<|end|>"


def test_contents_come_in_the_shape_that_the_template_takes() -> None:
    parts = [{"role": role, "content": [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]}
             for role, text in TALK]
    adds, in_parts = (CLOSED.replace("{{ m.content }}", "{{ '' + m.content }}"),
                      CLOSED.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"))
    for template in (CLOSED, adds, in_parts):  # the first prints Python's list of the parts, if it is given them
        assert said(template, messages(*TALK)) == said(template, parts) == ["Hello.<|end|>", "four<|end|>"]
    mixed = [messages(*TALK)[0], parts[1]]
    assert said(in_parts, mixed) == said(adds, mixed) == ["Hello.<|end|>"]


@pytest.mark.parametrize("arguments", [{"city": "Paris é", "n": 2}, '{"city": "Paris é", "n": 2}'])
def test_arguments_come_in_the_shape_that_the_template_takes(arguments: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}
    talk = [*messages(("user", "Warm?")), call]
    for how in ("c.function.arguments | tojson", "'' + c.function.arguments", "c.function.arguments"):
        template = CLOSED.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ " + how + " }}{{ c.function.name"
                                  " }}{% endfor %}")
        assert said(template, talk) == ['{"city": "Paris é", "n": 2}look<|end|>']
    items = CLOSED.replace("{{ m.content }}", "{% for c in m.tool_calls %}{{ c.function.name }}{% for k, v in "
                           "c.function.arguments.items() %}({{ k }}={{ v }}){% endfor %}{% endfor %}")
    with pytest.raises(RecordError, match='leaves out what is said: "content" of message 1'):
        said(items, talk)
    assert said(items.replace("{% for c", "{{ m.content }}{% for c"), talk) == ["look(city=Paris é)(n=2)<|end|>"]


def test_absent_calls_are_absent() -> None:
    raises = CLOSED.replace("{{ m.content }}", "{% if 'tool_calls' in m %}{{ raise_exception('calls') }}{% endif %}{{ m.content }}")
    for nothing in (None, []):
        talk = [*messages(TALK[0]), {"role": "assistant", "content": "Hello.", "tool_calls": nothing, "refusal": None}]
        assert said(raises, talk) == ["Hello.<|end|>"]


def test_a_thought_has_many_names_and_is_not_lost() -> None:
    for reads in ("reasoning_content", "thinking"):
        template = CLOSED.replace("{{ m.content }}", "{% if m." + reads + " %}({{ m." + reads + " }}){% endif %}{{ m.content }}")
        for written in ("reasoning_content", "thinking", "reasoning"):
            talk = [*messages(TALK[0]), {"role": "assistant", "content": "Hello.", written: "greet"}]
            assert said(template, talk) == ["(greet)Hello.<|end|>"]
    talk = [*messages(TALK[0]), {"role": "assistant", "content": "Hello.", "reasoning": "greet"}]
    refused(CLOSED, talk, "leaves out what message 2 says, or a part of it: its \"reasoning\" \\('greet'\\)")
    splits = CLOSED.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    refused(splits, messages(("user", "Hi"), ("assistant", "<think>greet</think>Hello.")), 'message 2 .* its "content"')


def test_a_thought_that_is_only_ended_is_not_ended_twice() -> None:
    adds = CLOSED.replace("{{ m.content }}", "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}"
                          "{{ m.content }}")
    refused(adds, messages(("user", "Hi"), ("assistant", "greet</think>Hello.")), "writes another </think> before that of message 2")
    talk = messages(("user", "Hi"), ("assistant", "<think>greet</think>Hello."))
    assert said(adds, talk) == ["<think>greet</think>Hello.<|end|>"]
    assert said(adds, messages(*TALK)) == ["<think></think>Hello.<|end|>", "<think></think>four<|end|>"]


def test_what_a_template_leaves_out_is_refused() -> None:
    drops = CLOSED.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    refused(drops, messages(("system", "Be brief."), *TALK), 'leaves out what is said: "content" of message 1')
    refused(CLOSED, messages(*TALK), '"tools"', tools=[{"type": "function", "function": {"name": "look"}}])
    refused(CLOSED, [{**messages(TALK[0])[0], "name": "Ann"}, *messages(TALK[1])], '"name" of message 1')
    adds = CLOSED.replace("{{ m.content }}", "{{ '' + m.content }}")
    refused(adds, [*messages(TALK[0]), CALL], 'leaves out what message 2 says.* "tool_calls"')  # not what Jinja makes of no content
    refused(CLOSED, [*messages(TALK[0]), CALL], 'leaves out what message 2 says.* "tool_calls"')
    named = CLOSED.replace("{{ m.content }}", "{{ m.name }}:{{ m.content }}")
    talk = [{**message, "name": "Ann"} for message in messages(*TALK)]
    assert said(named, talk) == ["Ann:Hello.<|end|>", "Ann:four<|end|>"]  # the prompt does not say it, so the model must
    calls = GLM.replace("{{ m.content }}", "{{ m.content }}")
    assert said(calls, [*messages(TALK[0]), CALL, {"role": "tool", "content": "20", "name": "look"}]) == [
        "<call>look</call><|tool|>"]


def test_what_cannot_be_split_is_refused() -> None:
    whole = CLOSED.replace("{{ bos_token }}", "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}")
    refused(whole, messages(*TALK), "renders message 2 only together with what follows.*too short")
    late = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}|{{ messages[0].content }}"
    refused(late, messages(*TALK[:2]), "writes other messages inside message 2")


MARKS = "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"


def marked(inner: str) -> str:
    return CLOSED.replace("{{ m.content }}<|end|>\n", "{% if m.role == 'assistant' %}" + inner + "{% else %}{{ m.content }}<|end|>\n"
                          "{% endif %}")


def test_marks_are_believed_where_they_lie_right() -> None:
    assert said(marked(MARKS), messages(*TALK)) == ["Hello.<|end|>", "four<|end|>"]
    before = "[note]{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    assert said(marked(before), messages(*TALK)) == ["Hello.<|end|>", "four<|end|>"]
    without_end = "{% generation %}{{ m.content }}{% endgeneration %}<|end|>\n"
    assert said(marked(without_end), messages(*TALK)) == ["Hello.<|end|>", "four<|end|>"]
    header = CLOSED.replace("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "{% if m.role == 'assistant' %}{% generation %}"
                            "<|assistant|>\n{{ m.content }}<|end|>{% endgeneration %}\n{% else %}<|{{ m.role }}|>\n{{ m.content }}"
                            "<|end|>\n{% endif %}")
    assert said(header, messages(*TALK)) == ["Hello.<|end|>", "four<|end|>"]


def test_marks_that_lie_wrong_are_refused() -> None:
    calls = marked("{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}" + MARKS)
    refused(calls, [*messages(TALK[0]), CALL], "marks leave out a part of message 2")
    every = CLOSED.replace("{{ m.content }}<|end|>\n", MARKS)
    refused(every, messages(*TALK), "marks what message 1 says as the assistant's")


@pytest.mark.parametrize("how", [
    "m.content | trim", "m['content'].strip()", "m.content | upper | lower | replace('HELLO', 'x') | capitalize", "m.content | tojson",
    "m.content.split('l') | join('l')", "m.content[:1] ~ m.content[1:]", "' ' ~ m.content", "m.content | string | trim",
    "m.content.replace('zz', 'y')", "(m.content | list) | join", "'%s' % m.content", "'%s%s!' % ('', m.content)", "'[%s]' | format(m.content)",
"m.content.rpartition('.') | join('')",
])
def test_whatever_a_template_does_to_a_content(how: str) -> None:
    template = CLOSED.replace("{{ m.content }}", "{{ " + how + " }}")
    tokenizer = tokenizer_for(template)
    talk = messages(("user", "Hello."), ("assistant", "Hello."), ("user", "Hello."), ("assistant", "Hello."))
    document = encoded(tokenizer, talk)
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.decode(document.ids) == text + "<|eos|>"
    answer = text.partition("<|assistant|>\n")[2].partition("\n")[0]
    assert said(template, talk) == [answer, answer]


@pytest.mark.parametrize("template", [
    "{% for i in range(messages | length) %}<|{{ messages[i].role }}|>\n{{ messages[i].content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "{% macro turn(m) %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text + '<|' + m.role + '|>\n' + m.content + '<|end|>"
    "\n' %}{% endfor %}{{ ns.text }}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "{% set all %}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% endset %}{{ all }}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "{% if messages %}{% for m in messages %}<|{{ m['role'] }}|>\n{% filter trim %}{{ m['content'] }}{% endfilter %}<|end|>\n"
    "{% endfor %}{% endif %}{{ '<|assistant|>\n' if add_generation_prompt }}",
])
def test_however_a_template_goes_through_the_messages(template: str) -> None:
    assert said(template, messages(*TALK)) == ["Hello.<|end|>", "four<|end|>"]
    assert len(texts(template, messages(*TALK))) == 1


def test_a_record_gives_the_same_tokens_whatever_came_before_it() -> None:
    tokenizer = tokenizer_for(CLOSED)
    encoder = Encoder(tokenizer)
    lines = [json.dumps({"messages": talk}).encode() for talk in (
        messages(*TALK), [{"role": "user", "content": [{"type": "text", "text": "x"}]}, *messages(TALK[1])])]
    alone = [Encoder(tokenizer).encode(parse_line(line)).ids.tolist() for line in lines]
    assert [encoder.encode(parse_line(line)).ids.tolist() for line in (*lines, *lines[::-1])] == [*alone, *alone[::-1]]


def test_half_a_character_in_a_call_is_refused() -> None:
    template = CLOSED.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}")
    half = {**CALL, "tool_calls": [{"function": {"name": "look", "arguments": {"city": "\ud800"}}}]}
    refused(template, [*messages(TALK[0]), half], "half of a surrogate pair")


def test_a_stand_in_content_is_not_looked_for_in_the_text() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    assert said(bare, messages(("user", "\uf8ff x \x02"), ("assistant", "Hello."))) == [" Hello.|<|eos|>"]


def test_a_turn_that_only_the_end_of_all_messages_ends_is_learned_with_that_end() -> None:
    ends_once = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
                 "{% else %}{{ eos_token }}{% endif %}")
    assert said(ends_once, messages(*TALK)) == ["Hello.\n<|eos|>", "four\n<|eos|>"]
    assert len(texts(ends_once, messages(*TALK))) == 2
