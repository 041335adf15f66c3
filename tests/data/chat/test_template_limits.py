"""A chat template that does not end, or makes a text without end, is an error at the first
conversation."""

from datetime import date

import pytest

from ratel.data import byte_level_tokenizer
from ratel.data.chat import limits
from ratel.data.chat.encoder import ChatEncoder
from ratel.data.chat.template import Template
from ratel.data.sources.records import Chat, RecordError

pytestmark = pytest.mark.unit
SAID = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}{{ eos_token }}"
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops with output": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "repeated": "{{ 'x' * 10**9 }}", "repeated list": "{{ [1] * 999999999 }}", "power": "{{ 10 ** (10 ** 8) }}", "power loop": "{{ (9 ** 999) ** 999 }}",
    "doubled": "{% set n = namespace(x='x' * 99) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "tilde": "{% set n = namespace(x='x' * 99) %}{% for i in range(99) %}{% set n.x = (n.x ~ n.x)|trim %}{% endfor %}",
    "replaced": "{% set n = namespace(x='x' * 99) %}{% for i in range(99) %}{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
    "filter replaced": "{% set n = namespace(x='x' * 99) %}{% for i in range(99) %}{% set n.x = n.x|replace('x', 'xx') %}{% endfor %}",
    "center": "{{ 'x'.center(10 ** 9) }}", "center filter": "{{ 'x'|center(999999999) }}", "indent": "{{ 'x\ny'|indent(999999999) }}",
    "percent": "{{ '%0999999999d' % 1 }}", "percent star": "{{ '%*d' % (999999999, 1) }}", "format filter": "{{ '%0999999999d'|format(1) }}",
    "str.format": "{{ '{:>999999999}'.format(1) }}", "str.format nested": "{{ '{:>{}}'.format(1, 99999) }}", "lipsum": "{{ lipsum(100000) }}",
    "macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "large calls": "{% for i in range(99999) %}{{ ('y' * 9999999)|length }}{% endfor %}",
    "long output": "{% set x = 'z' * 9999999 %}{% for i in range(99999) %}{{ x }}{% endfor %}"}
CHAT = Chat(messages=({"role": "user", "content": "100% of 1234567 ** {0:>9999999}"}, {"role": "assistant", "content": "yes %d"}))


def encode(template: str, chat: Chat = CHAT) -> int:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    return len(ChatEncoder(tokenizer).encode(chat)[0])


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_an_error(bomb: str) -> None:
    with pytest.raises(RecordError, match="chat template"):
        encode(bomb + SAID)


def test_what_conversations_need_is_far_below() -> None:
    assert encode(SAID) > 0
    long = [{"role": role, "content": "word " * 500} for _ in range(200) for role in ("user", "assistant")]
    assert len(Template(SAID, byte_level_tokenizer(), date.today()).text(long, None)) > 1_000_000
    assert 400 <= limits.MOST_WORK - limits._left.work < limits.MOST_WORK / 20


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% include '/etc/passwd' %}",
                                      "{{ cycler.__init__.__globals__ }}", "{{ messages[0].__setitem__('role', 'x') }}"])
def test_the_sandbox_is_that_of_transformers(template: str) -> None:
    with pytest.raises(RecordError):
        encode(template + SAID)


def test_a_template_cannot_tell_where_it_is_rendered() -> None:
    assert encode("{% if messages[0].content.origins is defined %}{{ raise_exception('here') }}{% endif %}" + SAID) > 0
