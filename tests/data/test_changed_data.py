"""Data that was changed between a state and its resumption, bad lines that are passed over, files
that change under a run."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratel.data import byte_level_tokenizer, open_dataset
from ratel.data.dataset import Dataset
from ratel.data.sources.documents import DocumentList, digest, find, pack_numbers, read_lists, unpack_numbers
from ratel.data.sources.skipping import SkippedLines
from ratel.errors import RatelError
from ratel.schema import SchemaError

pytestmark = pytest.mark.unit
SEQ, ROWS = 32, 2


def line(number: int, more: str = "") -> str:
    return json.dumps({"text": f"document {number:04d} " + "abc " * (number % 7) + more}) + "\n"


def write(path: Path, numbers: list[int], **changed: str) -> Path:
    path.write_text("".join(changed.get(f"n{number}", line(number)) for number in numbers))
    return path


def opened(path: Path, **options: Any) -> Dataset:
    return open_dataset(path, byte_level_tokenizer(), seq_len=SEQ, batch_size=ROWS, seed=3, **options)


def numbers_in(batches: list[dict[str, Any]]) -> list[int]:
    """The numbers of the documents that begin in some batches."""
    tokenizer = byte_level_tokenizer()
    text = "".join(tokenizer.decode(row[row >= 0]) for batch in batches for row in batch["input_ids"])
    return [int(part.split(" ")[1]) for part in text.split("<|bos|>")[1:] if len(part.split(" ")) > 1 and len(part.split(" ")[1]) == 4]


def begin(path: Path, steps: int) -> tuple[dict[str, Any], DocumentList, list[int], list[Any]]:
    """State, list, documents begun, and the held-out numbers after some batches."""
    with opened(path) as dataset:
        stream = dataset.batches()
        taken = [next(stream) for _ in range(steps)]
        state = json.loads(json.dumps(dataset.state_dict()))
        documents = dataset.documents
        evaluated = sorted(numbers_in(dataset.eval_batches()))
    return state, documents, numbers_in(taken), evaluated


def rest_of_epoch(dataset: Dataset) -> list[dict[str, Any]]:
    stream, batches = dataset.batches(), []
    while dataset.epoch == 0:
        batches.append(next(stream))
    return batches


ALL = list(range(300))


def unread(state: dict[str, Any], documents: DocumentList) -> list[int]:
    """Documents that neither the epoch has had nor the evaluation has, in the order of the file."""
    from ratel.data.batches.order import Permutation

    order = Permutation(len(documents.digests), (3, 0))
    had = {order[index] for index in range(state["cursor"])}
    return [number for number in ALL if number not in had and number not in documents.held_out]


@pytest.mark.parametrize("change", ["removed", "repaired", "inserted", "appended", "shuffled", "split", "several"])
def test_an_epoch_goes_on_in_changed_data_with_what_it_has_not_had(change: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ALL)
    state, documents, had, evaluated = begin(path, 20)
    free = unread(state, documents)
    gone, added = {"removed": ([free[3]], []), "repaired": ([free[5]], [5000]), "inserted": ([], [6000]), "appended": ([], [7000, 7001]),
                   "shuffled": ([], []), "split": ([], []), "several": ([free[0], free[9], free[-1]], [8000])}[change]
    now = [number for number in ALL if number not in gone]
    now = added + now if change == "inserted" else now + added
    if change == "shuffled":
        now = now[::-1]
    if change == "split":
        write(tmp_path / "d.jsonl", now[:100])
        folder = tmp_path / "folder"
        folder.mkdir()
        write(folder / "b.jsonl", now[:100])
        write(folder / "a.jsonl", now[100:])
        path = folder
    else:
        write(path, now)
    with opened(path) as dataset:
        dataset.load_state_dict(state, {documents.content: documents})
        assert "the data was changed" in dataset.changes
        assert sorted(numbers_in(dataset.eval_batches())) == evaluated
        stream, batches = dataset.batches(), []
        while dataset.epoch == 0:
            batches.append(next(stream))
        within = numbers_in(batches[:-1])  # the last one may have documents of the next epoch
        with_those_drawn = numbers_in(batches + [next(stream) for _ in range(60)])
    waiting = [number for number, start in state["waiting"] if start == 0]
    wanted = {*(number for number in free if number not in gone), *added, *waiting}
    assert wanted <= set(with_those_drawn)
    assert len(within) > 50 and set(within) <= wanted and len(set(within)) == len(within)


def test_a_document_that_was_learned_from_and_is_gone_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ALL)
    state, documents, had, _ = begin(path, 20)
    write(path, ALL, **{f"n{had[0]}": line(9999)})
    with opened(path) as dataset, pytest.raises(RatelError, match="1 of the .* that this epoch has had are not in it.*--model OUT/model"):
        dataset.load_state_dict(state, {documents.content: documents})
    write(path, ALL + [1])
    with opened(path) as dataset, pytest.raises(RatelError, match="no list of the documents before"):
        dataset.load_state_dict(state, {})


def test_unchanged_data_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ALL)
    with opened(path) as dataset:
        stream = dataset.batches()
        whole = [next(stream) for _ in range(40)]
    state, documents, *_ = begin(path, 20)
    path.write_text(path.read_text())  # another time, the same contents
    with opened(path) as dataset:
        dataset.load_state_dict(state, {})
        again = [next(iter_) for iter_ in [dataset.batches()] for _ in range(20)]
    assert all((one[key] == other[key]).all() for one, other in zip(again, whole[20:]) for key in one)


def test_a_state_of_changed_data_is_resumed_bit_for_bit_and_after_another_change(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ALL)
    state, documents, *_ = begin(path, 10)
    write(path, ALL + [7000])
    with opened(path) as dataset:
        dataset.load_state_dict(state, {documents.content: documents})
        stream = dataset.batches()
        for _ in range(5):
            next(stream)
        middle, changed = json.loads(json.dumps(dataset.state_dict())), dataset.documents
        expected = [next(stream) for _ in range(60)]  # into the next epoch
    with opened(path) as dataset:
        dataset.load_state_dict(middle, {})
        stream = dataset.batches()
        again = [next(stream) for _ in range(60)]
    assert all((one[key] == other[key]).all() for one, other in zip(again, expected) for key in one)
    write(path, [*ALL, 7000, 7001])
    with opened(path) as dataset:
        dataset.load_state_dict(middle, {changed.content: changed})
        found = numbers_in(rest_of_epoch(dataset))
    assert 7001 in found


def test_a_state_without_a_digest_of_its_data_is_taken_by_numbers_and_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ALL)
    state, *_ = begin(path, 5)
    del state["data"]["content"]
    with opened(path) as dataset:
        dataset.load_state_dict(state)
        next(dataset.batches())


def test_other_options_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ALL)
    state, *_ = begin(path, 5)
    with opened(path, eval_fraction=0.1) as dataset, pytest.raises(RatelError, match="--eval-fraction"):
        dataset.load_state_dict(state)
    state["data"]["seed"] = 4
    with opened(path) as dataset, pytest.raises(RatelError, match="different: --seed"):
        dataset.load_state_dict(state)


@pytest.mark.parametrize("edit", [{"epoch": -1}, {"cursor": 10**9}, {"waiting": [[0]]}, {"waiting": [[10**6, 0]]}, {"waiting": "x"}, {"learned": "!"},
                                  {"learned": pack_numbers([1], 8)}, {"evaluated": [10**6]}, {"evaluated": list(range(300))}, {"epoch": None}])
def test_a_damaged_position_is_refused(edit: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ALL)
    state, *_ = begin(path, 5)
    with opened(path) as dataset, pytest.raises(RatelError):
        dataset.load_state_dict({**state, **edit})


@pytest.mark.e2e
def test_a_run_whose_data_was_repaired_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.support.resume import OPTIONS, make_model

    import ratel

    model, path = make_model(tmp_path / "model"), write(tmp_path / "d.jsonl", ALL)
    options = {**OPTIONS, "save_every": 2, "export": False}
    ratel.train(model, path, out=tmp_path / "out", **{**options, "steps": 4})
    state, documents, had, _ = begin(path, 1)
    write(path, [number for number in ALL if number not in (had[0], 299)] + [7000, had[0]])  # what was had has moved to the end
    for steps, said in ((6, "1 of its 300 documents are new, 1 of the 300 before are gone"), (8, "")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            done = ratel.train(model, out=tmp_path / "out", data=path, resume=True, steps=steps, **{k: v for k, v in options.items() if k != "steps"})
        assert done.steps == steps and said in caplog.text and bool(said) == ("was changed" in caplog.text)
    assert len(read_lists(tmp_path / "out" / "documents.json")) == 1


# --- bad lines ---------------------------------------------------------------------------------------------------------

BAD = ["not json\n", "[]\n", '{"text": 5}\n', '{"x": 1}\n', '{"text": "\\ud800"}\n', "[" * 5000 + "\n", '{"text": "a", "text": "b"}\n']


def test_bad_lines_are_skipped_counted_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes("".join(line(n) for n in range(50)).encode() + "".join(BAD).encode() + b'{"text": "\xff"}\n' + line(50).encode())
    with pytest.raises(RatelError, match="line 51.*--skip-bad-lines"):
        opened(path)
    skipped = SkippedLines()
    with caplog.at_level(logging.WARNING), opened(path, skipped=skipped) as dataset:
        assert dataset.num_documents + dataset.num_eval_documents == 51 and len(skipped) == 8
        assert "8 bad lines skipped" in dataset.describe()
        next(dataset.batches())
    found = skipped.to_json()
    assert found["skipped"] == 8 and [entry["line"] for entry in found["lines"]] == list(range(51, 59))
    assert found["lines"][0]["why"].startswith("not valid JSON") and "line 51 is skipped" in caplog.text


def test_the_same_bytes_come_from_good_lines_with_and_without_bad_ones(tmp_path: Path) -> None:
    good, mixed = tmp_path / "good.jsonl", tmp_path / "mixed.jsonl"
    write(good, ALL)
    mixed.write_text("".join(line(n) + (BAD[n % 7] if n % 10 == 0 else "") for n in ALL))
    batches = []
    for path in (good, mixed):
        with opened(path, skipped=SkippedLines()) as dataset:
            stream = dataset.batches()
            batches.append([next(stream) for _ in range(10)])
    assert all((one[key] == other[key]).all() for one, other in zip(*batches) for key in one)


def test_lines_found_bad_late_are_skipped_where_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratel.data.sources.corpus.CHECKED_BYTES", 100)
    path = tmp_path / "d.jsonl"
    path.write_text("".join(line(n) if n != 200 else BAD[0] for n in ALL))
    with pytest.raises(RatelError, match="line 201.*--skip-bad-lines"), opened(path) as dataset:
        stream = dataset.batches()
        while dataset.epoch == 0:
            next(stream)
            state = dataset.state_dict()
    skipped = SkippedLines()
    with opened(path, skipped=skipped) as dataset:
        dataset.load_state_dict(state)
        rest_of_epoch(dataset)
    assert len(skipped) == 1 and skipped.to_json()["lines"][0]["byte"] == sum(len(line(n)) for n in range(200))


def test_nothing_but_bad_lines_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(BAD))
    with pytest.raises(RatelError, match="no text"):
        opened(path, skipped=SkippedLines())


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_file_that_changes_while_it_is_read_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"d{suffix}"
    text = "".join(line(n) for n in ALL) if suffix == ".jsonl" else "\n\n".join(f"paragraph {n} " + "abc " * 90 for n in ALL)
    path.write_text(text)
    with opened(path) as dataset:
        stream = dataset.batches()
        next(stream)
        path.write_text(text.replace("abc", "abd"))
        with pytest.raises(RatelError, match="was changed while it was read.*--resume"):
            for _ in range(200):
                next(stream)


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ALL)
    with opened(path) as dataset:
        stream = dataset.batches()
        next(stream)
        path.write_text(line(0))
        with pytest.raises(RatelError, match="was changed while it was read"):
            for _ in range(200):
                next(stream)


# --- the list ----------------------------------------------------------------------------------------------------------

def test_documents_are_found_once_each() -> None:
    among = np.array([5, 7, 5, 9, 5], dtype=np.uint64)
    assert find(np.array([5, 5, 7, 5, 5, 8], dtype=np.uint64), among).tolist() == [0, 2, 1, 4, -1, -1]
    assert find(np.array([], dtype=np.uint64), among).tolist() == []


def test_sets_of_numbers_are_packed() -> None:
    assert unpack_numbers(pack_numbers({0, 9, 64}, 65), 65) == {0, 9, 64}
    for packed in (pack_numbers({1}, 1000), "", "AAAA", "x" * 5):
        with pytest.raises(SchemaError):
            unpack_numbers(packed, 65)


def test_a_damaged_list_is_none(tmp_path: Path) -> None:
    path, one = tmp_path / "documents.json", DocumentList(digests=np.array([digest(b"a"), 2], dtype=np.uint64), held_out=(1,))
    path.write_text(json.dumps({"lists": [one.to_json()]}))
    assert read_lists(path)[one.content].digests.tolist() == one.digests.tolist()
    for edit in ({"documents": 3}, {"held_out": [2]}, {"digests": "AAAA"}, {"content": "0" * 32}, {"digests": 7}):
        path.write_text(json.dumps({"lists": [{**one.to_json(), **edit}]}))
        assert read_lists(path) == {}
