"""Every conversation is rendered, not only parsed, before a run comes to it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ratel.data import byte_level_tokenizer, open_dataset
from ratel.data.dataset import Dataset
from ratel.data.review import check as check_module
from ratel.data.sources.corpus import Corpus
from ratel.data.sources.files import find_sources
from ratel.data.sources.records import Chat
from ratel.errors import RatelError
from tests.support.patience import wait_until

pytestmark = pytest.mark.unit

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
BAD = {"messages": [*GOOD["messages"], {"role": "tool", "content": "c"}]}
TEMPLATE = ("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}[{{ m.role }}]"
            "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def opened(path: Path, **options: Any) -> Dataset:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return open_dataset(path, tokenizer, seq_len=16, batch_size=1, seed=0, **{"eval_fraction": 0, **options})


def test_a_line_that_the_template_refuses_ends_the_run_at_its_start(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[GOOD] * 50, BAD)
    with pytest.raises(RatelError, match="data: .*a.jsonl, line 51: .*no tools"):
        opened(path)
    opened(write(tmp_path / "b.jsonl", *[GOOD] * 50)).close()
    with pytest.raises(RatelError, match="eval_data: .*a.jsonl, line 51: .*no tools"):
        opened(tmp_path / "b.jsonl", eval_data=path, eval_max_sequences=1)


def test_what_is_not_checked_at_once_is_checked_beside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "AT_ONCE_S", 0.0)
    with opened(write(tmp_path / "a.jsonl", *[GOOD] * 300, BAD)) as dataset:
        assert dataset.num_documents == 301  # the order of the first epoch has the bad line far behind
        batches = dataset.batches()
        next(batches)
        wait_until(lambda: dataset._check.is_done)
        with pytest.raises(RatelError, match="line 301: .*no tools"):
            next(batches)


def test_only_the_checked_part_is_rendered_and_other_records_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "x"}, GOOD, {"prompt": "p", "completion": "c"}, GOOD, GOOD)
    rendered: list[Any] = []

    def encode(record: Any) -> None:
        rendered.append(record)

    corpus = Corpus(find_sources(path), checked_bytes=len(path.read_bytes()) - 5)
    check_module.ConversationCheck([corpus], encode, seq_len=16).at_once()
    assert rendered == [Chat(messages=tuple(GOOD["messages"]))] * 3
    rendered.clear()
    corpus = Corpus(find_sources(path), checked_bytes=100)
    check_module.ConversationCheck([corpus], encode, seq_len=16).at_once()
    assert len(rendered) == 1


def test_a_check_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[GOOD] * 40)
    seen: list[int] = []

    def slow(record: Any) -> None:
        seen.append(len(seen))
        time.sleep(0.002)

    check = check_module.ConversationCheck([Corpus(find_sources(path))], slow, seq_len=16)
    check.at_once(0.0)
    assert not seen
    check.go_on(lambda: slow)
    wait_until(lambda: len(seen) > 3)
    check.stop()
    stopped = len(seen)
    time.sleep(0.05)
    assert len(seen) == stopped < 40
    check.go_on(lambda: slow)
    wait_until(lambda: check.is_done)
    assert len(seen) == 40
    check.raise_found()


def test_a_file_that_vanishes_is_left_to_who_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    corpus = Corpus(find_sources(path))
    path.unlink()
    check = check_module.ConversationCheck([corpus], lambda record: None, seq_len=16)
    check.at_once()
    assert check.is_done


def test_the_start_says_what_is_rewritten_and_what_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[GOOD] * 5)
    with opened(path) as dataset:
        assert "of the first 5 conversations 5 texts are longer than a sequence and cut" in dataset.describe()
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{% if loop.last %}!{% endif %}{{ m.content }}")
    path = write(tmp_path / "b.jsonl", GOOD, {"messages": [*GOOD["messages"], *GOOD["messages"]]})
    with open_dataset(path, tokenizer, seq_len=64, batch_size=1, seed=0, eval_fraction=0) as dataset:
        assert "of the first 2 conversations 1 are learned in 2 texts, because the template rewrites" in dataset.describe()
