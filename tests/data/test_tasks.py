"""Data of tasks: what stands in lines, which labels there are, what becomes of them in batches, and
what is refused where."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ratel.config import resolve
from ratel.data.batches.hiding import Hiding, uniform
from ratel.data.dataset import Dataset
from ratel.errors import RatelError
from ratel.models import load
from ratel.models.calls.tasks import MULTI, REGRESSION, SINGLE, Task
from ratel.training.task_inputs import TaskInputs, open_task
from tests.support.tasks import VOCAB, WORDS, config, directory, tokenizer

pytestmark = pytest.mark.unit


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def opened(tmp_path: Path, task: str, lines: list[Any], settings: Any = None, eval_lines: list[Any] | None = None) -> TaskInputs:
    evaluated = None if eval_lines is None else write(tmp_path / "eval.jsonl", eval_lines)
    return open_task(resolve({"task": task}), model=settings or config("bert"), data=write(tmp_path / "data.jsonl", lines),
                     eval_data=evaluated, tokenizer=tokenizer())


def dataset(inputs: TaskInputs, **options: Any) -> Dataset:
    parts = load(config("bert"), dtype=torch.float32, device=torch.device("cpu"), task=inputs.task)
    settings = resolve({"task": inputs.task.name, "batch_size": 4, "seq_len": 16, **options})
    try:
        return inputs.open(inputs.fitted(settings, parts), parts, 0.0)
    finally:
        parts.close()


def texts(*labels: Any) -> list[Any]:
    return [{"text": f"{WORDS[number % 8]} film", "label": label} for number, label in enumerate(labels)]


# -- labels ------------------------------------------------------------------------------------------------------

FOUND = {
    "strings, sorted": (("pos", "neg", "pos"), SINGLE, ("neg", "pos")),
    "whole numbers, by size": ((10, 2, 2), SINGLE, ("2", "10")),
    "numbers": ((1, 2.5), REGRESSION, ()),
    "lists": ((["b"], [], ["a", "b"]), MULTI, ("a", "b")),
}


@pytest.mark.parametrize("case", FOUND)
def test_labels_are_found_in_the_data(case: str, tmp_path: Path) -> None:
    given, problem, names = FOUND[case]
    inputs = opened(tmp_path, "classify", texts(*given))
    assert (inputs.task.problem, inputs.task.labels) == (problem, names)
    settings = config("bert")
    inputs.task.configure(settings)
    assert settings.problem_type == problem
    assert settings.num_labels == (len(names) or 1)
    if names:
        assert settings.id2label == dict(enumerate(names)) and settings.label2id == {n: i for i, n in enumerate(names)}


def with_head(**changes: Any) -> Any:
    made = config("bert", **changes)
    made.architectures = ["BertForSequenceClassification"]
    return made


def test_labels_of_the_model_stay_in_their_order(tmp_path: Path) -> None:
    inputs = opened(tmp_path, "classify", texts("no", "yes"), with_head(id2label={0: "yes", 1: "no"}))
    assert inputs.task.labels == () and inputs.labels.names == ("yes", "no")
    batch = next(dataset(inputs, batch_size=2).batches())
    assert sorted(zip(batch["input_ids"][:, 1].tolist(), batch["labels"].tolist())) == [(5, 1), (6, 0)]


def test_numbers_are_places_among_labels_that_have_no_such_name(tmp_path: Path) -> None:
    inputs = opened(tmp_path, "classify", texts(0, 2), with_head())
    assert [inputs.labels.number(label) for label in (0, 1, 2, "LABEL_1")] == [0, 1, 2, 1]
    named = opened(tmp_path, "classify", texts(1, 5), with_head(id2label={0: "1", 1: "5"}))
    assert [named.labels.number(label) for label in (1, 5)] == [0, 1]


def test_a_head_of_another_task_does_not_say_the_labels(tmp_path: Path) -> None:
    settings = with_head(id2label={0: "yes", 1: "no"})
    inputs = opened(tmp_path, "tokens", [{"tokens": ["good", "film"], "labels": ["ADJ", "NOUN"]}], settings)
    assert inputs.task.labels == ("ADJ", "NOUN")


REFUSED = {
    "no label": ("classify", [*texts("a"), {"text": "film"}], 'line 2: "label" is missing'),
    "no text": ("classify", [*texts("a"), {"label": "a"}], 'line 2: "text" is missing'),
    "empty text": ("classify", [*texts("a"), {"text": " ", "label": "a"}], 'line 2: "text" is empty'),
    "null": ("classify", texts("a", None), "line 2: a label cannot be null"),
    "an empty label": ("classify", texts("a", ""), "line 2: a label cannot be an empty string"),
    "text that is none": ("classify", [{"text": 1, "label": "a"}], 'line 1: "text" must be a string, not a number. Write one JSON '
                          'object per line, {"text": ..., "label": ...}'),
    "no object": ("tokens", [["a"]], 'line 1: a JSON object is expected, not a list. Write one JSON object per line, {"tokens"'),
    "a boolean": ("classify", texts(True), "line 1: a label cannot be a boolean"),
    "not finite": ("classify", texts(1.0, float("nan")), "line 2: a label cannot be nan"),
    "mixed": ("classify", texts("a", 1), "line 2: the label 1 is a whole number, and one before was a string"),
    "mixed with lists": ("classify", texts("a", ["a"]), 'line 2: "label" is a list here'),
    "numbers in a list": ("classify", texts([0.5]), "line 1: a label cannot be 0.5"),
    "one label": ("classify", texts("a", "a"), "all of it has the same label"),
    "plain words": ("tokens", [{"text": "good film", "label": "a"}], 'line 1: "tokens" is missing'),
    "too few labels": ("tokens", [{"tokens": ["good", "film"], "labels": ["a"]}], "line 1: 2 words have 1 labels"),
    "no words": ("tokens", [{"tokens": [], "labels": []}], 'line 1: "tokens" must be a list of strings'),
    "a word that is none": ("tokens", [{"tokens": ["a", 1], "labels": ["x", "y"]}], 'line 1: "tokens" must be a list of strings'),
    "a conversation": ("masked-lm", [{"messages": [{"role": "assistant", "content": "x"}]}], "line 1: tokens are hidden in plain"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_lines_that_are_refused(case: str, tmp_path: Path) -> None:
    task, lines, message = REFUSED[case]
    with pytest.raises(RatelError) as caught:
        opened(tmp_path, task, lines)
    assert message in str(caught.value) and caught.value.field == "data" and "\n" not in str(caught.value)


UNKNOWN = {
    "a name": (with_head, texts("LABEL_0", "new"), "line 2: the label 'new' is none of the model's 3"),
    "a number": (with_head, texts(0, 3), "line 2: the label 3 is none of the model's 3"),
    "a fraction": (with_head, texts(1, 1.5), "line 2: the label 1.5 is not a whole number"),
    "a list": (lambda: with_head(problem_type=SINGLE), texts([1]), "line 1: the model is one for single_label_classification"),
    "a name to predict": (lambda: with_head(problem_type=REGRESSION, num_labels=1), texts(1, "a"), "line 2: the label 'a' is not a "),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_labels_that_the_model_does_not_have(case: str, tmp_path: Path) -> None:
    settings, lines, message = UNKNOWN[case]
    with pytest.raises(RatelError, match="data.jsonl") as caught:
        opened(tmp_path, "classify", lines, settings())
    assert message in str(caught.value)


def test_labels_of_the_evaluation_are_those_of_the_training(tmp_path: Path) -> None:
    opened(tmp_path, "classify", texts("a", "b"), eval_lines=texts("b"))
    with pytest.raises(RatelError, match="eval.jsonl, line 2: the label 'c' is none of the data's 2") as caught:
        opened(tmp_path, "classify", texts("a", "b"), eval_lines=texts("a", "c"))
    assert caught.value.field == "eval_data"


def test_text_files_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good film")
    for data, message in ((tmp_path / "a.txt", "has no labels"), (None, "is missing")):
        with pytest.raises(RatelError, match=message):
            open_task(resolve({"task": "classify"}), model=config("bert"), data=data, eval_data=None, tokenizer=tokenizer())


# -- batches -----------------------------------------------------------------------------------------------------

def test_a_batch_is_what_transformers_tokenizer_makes(tmp_path: Path) -> None:
    lines = [{"text": "good film", "text_pair": "the plot was awful", "label": "a"},
             {"text": "bad " * 20, "text_pair": "film " * 30, "label": "b"}]
    batch = next(dataset(opened(tmp_path, "classify", lines), batch_size=2).batches())
    assert batch["input_ids"].shape == (2, 16)  # cut to --seq-len, and padded to no more
    for row in range(2):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        line = lines[batch["labels"][row]]
        expected = tokenizer()(line["text"], line["text_pair"], truncation=True, max_length=16)
        assert ids == expected["input_ids"]
        assert batch["token_type_ids"][row, : len(ids)].tolist() == expected["token_type_ids"]


def test_batches_are_as_long_as_their_longest_row_up_to_a_multiple(tmp_path: Path) -> None:
    lines = [{"text": "good " * count, "label": label} for count, label in ((3, "a"), (70, "b"))]
    data = dataset(opened(tmp_path, "classify", lines), batch_size=1, seq_len=1000)
    batches = data.batches()
    assert {next(batches)["input_ids"].shape[1] for _ in range(2)} == {64, 128}
    assert data.seq_len == 512  # what the model handles


def test_the_first_token_of_a_word_has_its_label(tmp_path: Path) -> None:
    lines = [{"tokens": ["goods", "film", "endings", "is"], "labels": ["A", "B", "C", "B"]}]
    batch = next(dataset(opened(tmp_path, "tokens", lines), batch_size=1).batches())
    made = tokenizer()(lines[0]["tokens"], is_split_into_words=True)
    words, expected = made.word_ids(), []
    for place, word in enumerate(words):
        first = word is not None and (place == 0 or words[place - 1] != word)
        expected.append("ABC".index(lines[0]["labels"][word]) if first else -100)
    assert words.count(0) == 2 and words.count(2) == 3
    assert batch["labels"][0, : len(words)].tolist() == expected
    assert (batch["labels"][0, len(words):] == -100).all()


def test_values_of_labels_in_batches(tmp_path: Path) -> None:
    many = next(dataset(opened(tmp_path, "classify", texts(["b"], ["a", "b"])), batch_size=2).batches())
    assert many["labels"].dtype is torch.float32 and sorted(many["labels"].tolist()) == [[0.0, 1.0], [1.0, 1.0]]
    one = next(dataset(opened(tmp_path, "classify", texts(1, 2.5)), batch_size=2).batches())
    assert one["labels"].dtype is torch.float32 and sorted(one["labels"].tolist()) == [1.0, 2.5]


# -- hidden tokens -----------------------------------------------------------------------------------------------

def test_shares_of_hidden_tokens() -> None:
    given = np.random.default_rng(0).integers(5, len(tokenizer()), 200_000).astype(np.int32)
    given[::10] = 2  # [CLS] in the middle of a text
    hidden, labels = Hiding(tokenizer(), 0).hide(given, (0, 7), 0)
    target = labels != -100
    assert not target[::10].any() and (labels[target] == given[target]).all() and (hidden[~target] == given[~target]).all()
    assert target.sum() / (0.9 * len(given)) == pytest.approx(0.15, abs=0.005)
    assert (hidden[target] == 4).mean() == pytest.approx(0.8 + 0.1 / len(tokenizer()), abs=0.01)
    others = hidden[target & (hidden != 4)]
    assert (hidden[target] == given[target]).mean() == pytest.approx(0.1 + 0.1 / len(tokenizer()), abs=0.01)
    assert set(others.tolist()) >= set(range(4))  # any token of the vocabulary, as transformers' collator has it


def test_what_is_hidden_depends_on_seed_epoch_document_and_place_alone() -> None:
    ids = np.full(500, 9, dtype=np.int32)
    whole, labels = Hiding(tokenizer(), 3).hide(ids, (0, 7), 0)
    end, end_labels = Hiding(tokenizer(), 3).hide(ids[200:], (0, 7), 200)
    assert (whole[200:] == end).all() and (labels[200:] == end_labels).all()
    for seed, key in ((4, (0, 7)), (3, (1, 7)), (3, (0, 8)), (3, (-1, 7))):
        assert (Hiding(tokenizer(), seed).hide(ids, key, 0)[1] != labels).any()


def test_the_hash_is_fixed() -> None:
    """Resumed runs hide what they would have hidden, in every version."""
    values = uniform(np.arange(3, dtype=np.uint64), (0, 1, 2))
    assert values.tolist() == [0.836878842815936, 0.48623118282727007, 0.4319313070000538]


def test_long_text_goes_on_in_further_rows(tmp_path: Path) -> None:
    lines = [{"text": " ".join(WORDS[n % 20] for n in range(50))}, {"text": "good film"}]
    data = dataset(opened(tmp_path, "masked-lm", lines), batch_size=1, seed=5)
    seen: list[list[int]] = []
    batches = data.batches()
    for _ in range(12):
        batch = next(batches)
        ids = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])[0]
        seen.append(ids[batch["attention_mask"][0].bool()].tolist())
        assert (batch["labels"] != -100).any()
    assert all(row[0] == 2 and row[-1] == 3 for row in seen)
    pieces = [row[1:-1] for row in seen if len(row) > 4]
    assert {len(piece) for piece in pieces} == {14, 8}
    long = [5 + n % 20 for n in range(50)]
    assert all(piece in (long[at : at + 14] for at in range(0, 50, 14)) for piece in pieces)


@pytest.mark.parametrize("task", ["classify", "masked-lm"])
def test_a_position_is_taken_up_again_bit_for_bit(task: str, tmp_path: Path) -> None:
    lines = [{"text": " ".join(WORDS[(n * k) % 20] for n in range(5 + 9 * k)), "label": "ab"[k % 2]} for k in range(7)]
    first = dataset(opened(tmp_path, task, lines), batch_size=2, seed=2)
    batches, states = first.batches(), []
    expected = []
    for _ in range(20):
        states.append(json.loads(json.dumps(first.state_dict())))
        expected.append(next(batches))
    for at in (0, 1, 3, 11):
        again = dataset(opened(tmp_path, task, lines), batch_size=2, seed=2)
        again.load_state_dict(states[at])
        found = again.batches()
        for batch in expected[at:]:
            other = next(found)
            assert batch.keys() == other.keys() and all(torch.equal(batch[key], other[key]) for key in batch)
    assert states[-1]["epoch"] > 1


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    own = tokenizer()
    own.mask_token = None
    with pytest.raises(RatelError, match="no mask token"):
        open_task(resolve({"task": "masked-lm"}), model=config("bert"), data=write(tmp_path / "d.jsonl", [{"text": "film"}]),
                  eval_data=None, tokenizer=own)


def test_a_model_that_cannot_do_the_task_is_refused_before_its_data_is_read(tmp_path: Path) -> None:
    with pytest.raises(RatelError, match="no class of model type 'llama'"):
        open_task(resolve({"task": "masked-lm"}), model=config("llama"), data="nowhere.jsonl", eval_data=None, tokenizer=tokenizer())


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    assert len(tokenizer()) <= VOCAB
    directory(tmp_path / "m", "bert", None, vocab_size=20)
    inputs = opened(tmp_path, "classify", texts("a", "b"), config("bert", vocab_size=20))
    parts = load(config("bert", vocab_size=20), dtype=torch.float32, device=torch.device("cpu"), task=Task(name="classify"))
    with pytest.raises(RatelError, match="vocabulary"):
        inputs.open(resolve({"task": "classify", "seq_len": 16}), parts, 0.0)
    parts.close()
