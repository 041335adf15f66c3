"""Only what the assistant says in a conversation is learned, whatever the template looks like."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ratel.data import byte_level_tokenizer, open_dataset
from ratel.data.batches.encode import Encoder
from ratel.data.chat import ChatEncoder
from ratel.data.sources.records import Chat, RecordError
from ratel.errors import RatelError

pytestmark = pytest.mark.unit

MARKED = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}[end]{% endgeneration %}\n"
    "{% else %}{{ m.content }}[end]\n{% endif %}{% endfor %}")
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}")
# Writes an empty thought before the last answer only, and drops the thoughts of earlier ones.
THINKING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.thought | default('') }}</think>{% endif %}"
    "{{ m.content }}[end]\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
# Strict: begins with the user, alternates, and an answer ends with EOS that nothing follows.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}")
CALLS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | default('') }}"
    "{% for call in m.tool_calls | default([]) %}<call>{{ call.function.name }}</call>{% endfor %}[end]\n{% endfor %}")

TALK = [("system", "Be brief."), ("user", "one"), ("assistant", "two"), ("user", "two"), ("assistant", "two two")]


def messages(*turns: tuple[str, str]) -> tuple[dict[str, Any], ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def said(template: str | None, talk: tuple[dict[str, Any], ...]) -> list[str]:
    """The stretches that are learned."""
    tokenizer = tokenizer_with(template)
    ids, mask = ChatEncoder(tokenizer).encode(Chat(messages=talk))
    stretches: list[list[int]] = []
    for index, learned in enumerate(mask):
        if learned and (index == 0 or not mask[index - 1]):
            stretches.append([])
        if learned:
            stretches[-1].append(int(ids[index]))
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_answers_and_their_end_marker(template: str) -> None:
    assert said(template, messages(*TALK)) == ["two[end]", "two two[end]"]


def test_the_default_template() -> None:
    assert said(None, messages(*TALK)) == ["two<|eos|>", "two two<|eos|>"]
    document = Encoder(tokenizer_with(None)).encode(Chat(messages=messages(*TALK)))
    assert document.whole and document.ids[0] == 256
    assert document.ids[-2:].tolist() == [257, ord("\n")]  # closed already: no second EOS


def test_answers_equal_to_what_the_user_says_and_answers_that_are_trimmed_or_empty() -> None:
    assert said(PLAIN, messages(("user", "x"), ("assistant", "x"), ("user", "x"), ("assistant", "x"))) == ["x[end]"] * 2
    assert said(PLAIN, messages(("user", "a"), ("assistant", "  b \n"))) == ["b[end]"]
    assert said(PLAIN, messages(("user", "a"), ("assistant", ""))) == ["[end]"]
    assert said(PLAIN, messages(("user", "a"), ("assistant", "é😀語"))) == ["é😀語[end]"]
    assert said(PLAIN, messages(("user", "a"), ("assistant", "[end]\n[user]"))) == ["[end]\n[user][end]"]


def test_a_conversation_may_begin_with_the_assistant_or_end_with_the_user() -> None:
    assert said(PLAIN, messages(("assistant", "a"), ("user", "b"))) == ["a[end]"]
    assert said(PLAIN, messages(("assistant", "a"), ("assistant", "b"))) == ["a[end]", "b[end]"]


def test_what_a_template_writes_before_the_last_answer_is_learned_with_it() -> None:
    """This holds for every answer, since each was the last when it was written."""
    talk = messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert said(THINKING, talk) == ["<think></think>b[end]", "<think></think>d[end]"]
    talk[3]["thought"] = "hm"
    assert said(THINKING, talk) == ["<think></think>b[end]", "<think>hm</think>d[end]"]


def test_a_template_that_is_strict_about_turns_and_ends_with_eos() -> None:
    assert said(STRICT, messages(*TALK[1:])) == [" two<|eos|>", " two two<|eos|>"]
    with pytest.raises(RecordError, match="refuses these messages: roles must alternate"):
        said(STRICT, messages(*TALK))


def test_a_first_word_that_shares_its_token_with_a_space_is_learned() -> None:
    """As with sentencepiece, where ``▁two`` is one token; but no token reaches from the prompt into
    the answer."""
    for splitter, gap, learned in ((pre_tokenizers.Metaspace(prepend_scheme="never"), " ", "▁two"),
                                   (pre_tokenizers.Split(":two", "isolated"), "", "two ")):
        words = Tokenizer(models.WordLevel({"?": 0, "▁two": 1, ":two": 2, "two ": 3}, unk_token="?"))
        words.pre_tokenizer = splitter
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="?")
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:" + gap + "{{ m.content }} {% endfor %}"
        ids, mask = ChatEncoder(tokenizer).encode(Chat(messages=messages(("user", "one"), ("assistant", "two"))))
        assert tokenizer.convert_ids_to_tokens(ids[mask].tolist())[0] == learned


def test_calls_of_tools_are_learned() -> None:
    talk = (*messages(("user", "a")), {"role": "assistant", "content": None,
                                       "tool_calls": [{"type": "function", "function": {"name": "look"}}]},
            *messages(("tool", "b"), ("assistant", "c")))
    assert said(CALLS, talk) == ["<call>look</call>[end]", "c[end]"]


def test_a_template_that_leaves_an_answer_out_is_refused() -> None:
    with pytest.raises(RecordError, match="leaves out what message 2 says"):
        said("{{ messages[0].content }}", messages(("user", "a"), ("assistant", "b")))


def test_tokenizers_without_offsets_are_cut_at_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with(PLAIN)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    ids, mask = ChatEncoder(tokenizer).encode(Chat(messages=messages(*TALK)))
    assert tokenizer.decode(ids[mask]) == "two[end]two two[end]"
    assert tokenizer.decode(ids) == "[system]Be brief.[end]\n[user]one[end]\n[assistant]two[end]\n" \
                                    "[user]two[end]\n[assistant]two two[end]\n"


def test_a_refusal_names_the_line_and_the_template_given_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    lines = [{"messages": messages(*TALK[1:])}] * 2 + [{"messages": messages(*TALK)}]
    path.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = tokenizer_with(STRICT)
    with pytest.raises(RatelError, match="chat.jsonl, line 3: .*roles must alternate"):
        open_dataset(path, tokenizer, seq_len=64, batch_size=1, seed=0, eval_fraction=0)
    bare = tokenizer_with(None)
    open_dataset(path, bare, seq_len=64, batch_size=1, seed=0)
    assert tokenizer.chat_template == STRICT and "generation" in bare.chat_template


def test_what_is_done_to_the_tokenizer_later_does_not_matter(tmp_path: Path) -> None:
    """The thread has a copy: a tokenizer in use by two threads at once fails now and then."""
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages(*TALK)}))
    first, second = (tokenizer_with(PLAIN) for _ in range(2))
    with open_dataset(path, first, seq_len=64, batch_size=2, seed=0) as one, \
            open_dataset(path, second, seq_len=64, batch_size=2, seed=0) as other:
        second.chat_template = CALLS.replace('[end]', '[stop]')
        assert next(one.batches())["labels"].tolist() == next(other.batches())["labels"].tolist()
