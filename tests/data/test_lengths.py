"""The lengths of texts: those of the rows that a run makes, kept, and the same in any order."""

import json
from pathlib import Path

import pytest

from ratel.data.dataset import open_dataset
from ratel.data.review import lengths as module
from ratel.data.review.lengths import TextLengths, text_lengths
from ratel.data.tokens.tokenizer import load_tokenizer

pytestmark = pytest.mark.unit
SEQ_LEN = 64


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, texts: list[str], *, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"prompt": "say", "completion": text} if key == "completion" else {key: text}) + "\n" for text in texts))
    return path


TEXTS = ["word " * (1 + number * 7 % 23) for number in range(200)]


@pytest.mark.parametrize("key", ["text", "completion"])
def test_rows_are_about_as_many_as_a_run_makes(key: str, tmp_path: Path) -> None:
    """Within the few rows that the order of texts makes: `completion`s must stay whole."""
    path = write(tmp_path / "a.jsonl", TEXTS, key=key)
    found = text_lengths(path, model=None, tokenizer=None, seq_len=SEQ_LEN)
    with open_dataset(path, load_tokenizer(None), seq_len=SEQ_LEN, batch_size=1, seed=3, eval_fraction=0.0) as dataset:
        batches = dataset.batches()
        rows, tokens = 0, 0
        while tokens < found.lengths.tokens:
            batch = next(batches)
            rows, tokens = rows + 1, tokens + found_tokens(batch)
    assert found.packed_rows(SEQ_LEN) == pytest.approx(rows, rel=0.03)


def found_tokens(batch: dict) -> int:
    """Tokens of documents in a row: what comes after the last target is padding."""
    labels = batch["labels"][0]
    return int((labels >= 0).nonzero().max()) + 1


def test_the_order_of_texts_does_not_matter(tmp_path: Path) -> None:
    there = text_lengths(write(tmp_path / "a.jsonl", TEXTS, key="completion"), model=None, tokenizer=None, seq_len=SEQ_LEN)
    back = text_lengths(write(tmp_path / "b.jsonl", TEXTS[::-1], key="completion"), model=None, tokenizer=None, seq_len=SEQ_LEN)
    assert there == back and there.packed_rows(SEQ_LEN) == back.packed_rows(SEQ_LEN)


def test_texts_are_made_into_tokens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    first = text_lengths(path, model=None, tokenizer=None, seq_len=SEQ_LEN)
    counted = []
    monkeypatch.setattr(module, "_count", lambda survey: counted.append(survey) or TextLengths(((1, False, 1),)))
    assert text_lengths(path, model=None, tokenizer=None, seq_len=SEQ_LEN) == first and not counted
    write(path, [*TEXTS, "more"])
    assert text_lengths(path, model=None, tokenizer=None, seq_len=SEQ_LEN) != first and counted


def test_bad_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    path.write_text(path.read_text() + "{}\n")
    found = text_lengths(path, model=None, tokenizer=None, seq_len=SEQ_LEN)
    assert found.bad == 1 and found.lengths.rows == 2


def test_plain_text_fills_rows_without_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a line of text\n" * 500)
    found = text_lengths(path, model=None, tokenizer=None, seq_len=SEQ_LEN)
    assert found.packed_rows(SEQ_LEN) == -(-found.lengths.tokens // SEQ_LEN)


def test_of_many_texts_a_sample_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    every = TextLengths(tuple((tokens, True, 50) for tokens in range(5, 60)))
    exact = every.packed_rows(SEQ_LEN)
    monkeypatch.setattr(module, "_PACKED", 500)
    assert every.packed_rows(SEQ_LEN) == pytest.approx(exact, rel=0.02) and len(every._shuffled()) <= 501


def test_without_data_the_bundled_text_is_counted() -> None:
    assert text_lengths(None, model=None, tokenizer=None, seq_len=SEQ_LEN).lengths.tokens > 100_000
