"""Chat templates that are in use, with talks of many kinds: what is learned with a template is what
its twin marks.

TRL ships some of the templates twice: as they are, and with ``{% generation %}`` around what the
assistant says. The table in docs/data.md says where the two masks differ, and the words for why.
"""

from collections import Counter
from pathlib import Path

import pytest

from ratel.data.chat import ChatEncoder
from tests.data.chat import templates as common
from tests.data.chat.templates import TALKS, Learned

pytestmark = pytest.mark.unit

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"
BEGIN, END = "<!-- templates: written by tests/data/chat/test_templates.py, which compares -->", "<!-- end of templates -->"
WORDS = ("equal", "given", "end", "rewritten", "refused", "twin fails")
WITH_TWIN, ALONE = common.names(twins=True), common.names(twins=False)


def test_the_templates_are_there() -> None:
    common.require()
    assert len(WITH_TWIN) >= 30 and len(ALONE) >= 10 and len(TALKS) >= 15


@pytest.mark.parametrize("name", WITH_TWIN)
def test_masks_are_those_of_the_twin(name: str) -> None:
    plain, twin = common.source(name), common.source(f"{name}_training")
    tokenizer = common.tokenizer_for(plain, twin)
    encoder = ChatEncoder(tokenizer)
    words = {}
    for talk in TALKS:
        learned = Learned(encoder, tokenizer, talk)
        marks, rendered = common.render(tokenizer, twin, talk), common.render(tokenizer, plain, talk)
        words[talk] = common.compare(talk, learned, marks, rendered[1] if rendered else "")
        assert words[talk] in WORDS, f"{talk}: learned {learned.stretches or learned.refused}\nmarked {marks}"
        check(learned, talk)
    assert table_row(name, words) in documented(), f"put this into docs/data.md:\n{table_row(name, words)}"


@pytest.mark.parametrize("name", ALONE)
def test_a_template_without_a_twin(name: str) -> None:
    """Everything that the assistant says is learned and nothing of others, or the talk is
    refused."""
    tokenizer = common.tokenizer_for(common.source(name))
    encoder = ChatEncoder(tokenizer)
    learned = {talk: Learned(encoder, tokenizer, talk) for talk in TALKS}
    for talk, one in learned.items():
        check(one, talk)
    refused = sorted(talk for talk, one in learned.items() if one.refused)
    assert len(refused) < 10 and not {"single turn", "several turns", "ends with the user", "JSON"} & set(refused), refused


@pytest.mark.parametrize("name", WITH_TWIN)
def test_marks_of_a_template_are_believed(name: str) -> None:
    """The twin as the user's own template: what its marks hold of the model's own writing, and
    nothing else."""
    twin = common.source(f"{name}_training")
    tokenizer = common.tokenizer_for(twin)
    encoder = ChatEncoder(tokenizer)
    for talk in ("several turns", "ends with the user"):
        learned = Learned(encoder, tokenizer, talk)
        assert not learned.refused, learned.refused
        check(learned, talk)


def check(learned: Learned, talk: str) -> None:
    """What must hold with any template."""
    if learned.refused is not None:
        return
    text = "\n".join(learned.stretches)
    # A tag that begins a thought may be given by the prompt.
    shown = "\n".join(before[-len("<think>\n"):] + one for before, one in zip(learned.before, learned.stretches))
    assert set(common.lost(talk, shown)) <= {"Look it up."}, (talk, shown)
    if talk not in ("names of roles", "markers in the text"):
        others = [message["content"] for message in TALKS[talk] if message["role"] != "assistant"]
        assert not [one for one in others if isinstance(one, str) and len(one) > 2 and one.strip() in text], (talk, text)


def table_row(name: str, words: dict[str, str]) -> str:
    counts = Counter(words.values())
    return f"| {name} | " + " | ".join(str(counts[word] or "") for word in WORDS) + " |"


def documented() -> list[str]:
    return DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
