"""From files to batches: determinism, the held-out split, resuming, memory, and threads that
end."""

import json
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ratel.data import byte_level_tokenizer, open_dataset
from ratel.data import dataset as dataset_module
from ratel.data.batches.prefetch import Prefetcher
from ratel.data.dataset import Batch, Dataset
from ratel.data.sources import bundled
from ratel.errors import RatelError, WorkerError
from tests.support.patience import patience, wait_until

pytestmark = pytest.mark.unit

EOS = 257


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """200 documents of all kinds that name themselves, in several files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in range(4):
        lines = [{"text": f"<{file}.{line}>" + "x" * (line * 7 % 90)} for line in range(40)]
        lines += [{"prompt": f"<{file}.{line}>", "completion": "yes"} for line in range(40, 50)]
        (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def open_with(data: Any, **options: Any) -> Dataset:
    defaults = {"seq_len": 64, "batch_size": 3, "seed": 0, "vocab_size": 259}
    return open_dataset(data, byte_level_tokenizer(), **{**defaults, **options})


def take(dataset: Dataset, count: int) -> list[Batch]:
    batches = dataset.batches()
    taken = [next(batches) for _ in range(count)]
    dataset.close()
    return taken


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(torch.equal(a[key], b[key]) for a, b in zip(one, other) for key in a)


def names(batches: list[Batch]) -> list[str]:
    """The names of the documents that begin in these batches, in order (one cut at the very end
    left out)."""
    text = bytes(int(id_) for batch in batches for id_ in batch["input_ids"].flatten() if id_ < 256).decode()
    return [part.split(">")[0] for part in text.split("<")[1:] if ">" in part]


def test_batches_are_as_promised(corpus: Path) -> None:
    for batch in take(open_with(corpus), 20):
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        assert all(tensor.shape == (3, 64) and tensor.dtype == torch.int64 for tensor in batch.values())
        learned = batch["labels"] != -100
        assert (batch["labels"][learned] == batch["input_ids"][learned]).all()
        assert not learned[batch["position_ids"] == 0].any() and learned.any(dim=1).all()


def test_the_seed_fixes_the_batches(corpus: Path) -> None:
    first, again, other = (take(open_with(corpus, seed=seed), 30) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)
    assert same(take(open_with(corpus, seed=1, batch_size=6), 15),
                [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(first[::2], first[1::2])])


def test_an_epoch_has_every_document_once_in_an_order_of_its_own(corpus: Path) -> None:
    dataset = open_with(corpus, eval_fraction=0)
    stream = dataset._stream(dataset._position)
    epochs = [[stream.next_number() for _ in range(200)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(200)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])
    seen = Counter(names(take(dataset, 150)))
    assert len(seen) == 200 and max(seen.values()) - min(seen.values()) <= 2  # the pool reaches into the next epoch


def test_held_out_documents_are_never_trained_on(corpus: Path) -> None:
    dataset = open_with(corpus, eval_fraction=0.1)
    held_out = names(dataset.eval_batches())
    assert len(set(held_out)) == dataset.num_eval_documents == 20 and dataset.num_documents == 180
    trained = set(names(take(dataset, 150)))
    assert len(trained) == 180 and not trained & set(held_out)
    assert same(dataset.eval_batches(2), dataset.eval_batches(2))
    assert set(names(open_with(corpus, eval_fraction=0.1, seed=5).eval_batches())) != set(held_out)


def test_how_much_is_held_out(corpus: Path, tmp_path: Path) -> None:
    assert open_with(corpus, eval_fraction=0.0001).num_eval_documents == 1
    assert open_with(corpus, eval_fraction=0.99, eval_max_sequences=None).num_documents == 2
    assert open_with(corpus, eval_fraction=0).eval_batches() == []
    few = open_with(corpus, eval_fraction=0.9, eval_max_sequences=3, batch_size=2)
    assert [batch["input_ids"].shape[0] for batch in few.eval_batches()] == [2, 1]
    assert few.num_eval_documents < 30  # those that no sequence needs are trained on
    single = tmp_path / "one.jsonl"
    single.write_text('{"text": "only one"}')
    assert open_with(single).eval_batches() == [] and open_with(single).num_documents == 1


def test_evaluation_data_of_its_own(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "<other>"}\n')
    dataset = open_with(corpus, eval_data=other)
    assert names(dataset.eval_batches()) == ["other"] and dataset.num_documents == 200
    other.write_text("{}")
    with pytest.raises(RatelError, match="eval_data: .*other.jsonl, line 1") as caught:
        open_with(corpus, eval_data=other)
    assert caught.value.field == "eval_data"


@pytest.mark.parametrize("taken", [0, 1, 7, 60])
def test_a_resumed_run_gets_the_batches_that_would_have_come(corpus: Path, taken: int) -> None:
    whole = open_with(corpus)
    batches = whole.batches()
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(whole.state_dict()))
    expected = [next(batches) for _ in range(20)]
    whole.close()
    resumed = open_with(corpus)
    resumed.load_state_dict(state)
    assert same(take(resumed, 20), expected)
    resumed.load_state_dict(state)
    assert same(take(resumed, 10) + take(resumed, 10), expected)


def test_resuming_with_something_else_is_refused(corpus: Path) -> None:
    state = open_with(corpus).state_dict()
    for options, name in (({"seed": 1}, "different: --seed"), ({"seq_len": 32}, "different: --seq-len"),
                          ({"eval_fraction": 0.5}, "other documents are held out.*--eval-fraction")):
        with pytest.raises(RatelError, match=name):
            open_with(corpus, **options).load_state_dict(state)
    open_with(corpus, batch_size=9).load_state_dict(state)


@pytest.mark.parametrize(("options", "field"), [
    ({"seq_len": 7}, "seq_len"), ({"batch_size": 0}, "batch_size"), ({"eval_fraction": 1.0}, "eval_fraction"),
    ({"eval_fraction": -0.1}, "eval_fraction"), ({"eval_max_sequences": 0}, "eval_max_sequences"),
    ({"vocab_size": 200}, "model")])
def test_options_that_cannot_be(corpus: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(RatelError) as caught:
        open_with(corpus, **options)
    assert caught.value.field == field and caught.value.remedy


def test_a_corpus_is_streamed(tmp_path: Path) -> None:
    """60 MB of files cost the index (8 bytes a document) and some documents, not their size."""
    (tmp_path / "a.txt").write_text(("The quick brown fox jumps over the lazy dog. " * 40 + "\n\n") * 16_000)
    line = json.dumps({"text": "Sphinx of black quartz, judge my vow. " * 800}) + "\n"
    (tmp_path / "b.jsonl").write_text(line * 1_000)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 55e6
    open_with(tmp_path, seq_len=256).close()  # what imports and the tokenizer cost is not ours to count
    tracemalloc.start()
    try:
        dataset = open_with(tmp_path, seq_len=256)
        after_open = tracemalloc.get_traced_memory()[0]
        take(dataset, 50)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(dataset._reader) > 8_000
    assert after_open < 2e6 and peak < 8e6


def test_the_bundled_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dataset = open_with(None, seq_len=512)
    assert dataset.num_documents > 300 and dataset._reader.corpus.num_bytes > 500_000
    assert dataset.eval_batches()
    take(dataset, 5)
    sources = bundled.bundled_sources()
    assert sources == dataset._reader.corpus.sources
    assert {Path(source.name).suffix for source in sources[1:]} == {".txt", ".jsonl"}
    monkeypatch.setattr(bundled, "_EXAMPLES", tmp_path / "absent")
    monkeypatch.setattr(bundled, "_documentation", lambda: b"one")
    assert [source.data for source in bundled.bundled_sources()] == [b"one"]
    monkeypatch.setattr(bundled, "_documentation", lambda: b"")
    with pytest.raises(RatelError, match="data: none was given"):
        bundled.bundled_sources()


def test_the_bundled_text_is_taken_out_of_its_sources_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library, calls = tmp_path / "lib", []
    library.mkdir()
    extracted = bundled._extracted
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(bundled, "_extracted", lambda *paths: calls.append(1) or extracted(*paths))
    (library / "a.py").write_text('"""One \\ud800."""')  # half of a character: not UTF-8
    assert bundled._documentation() == bundled._documentation() == b"a\nOne ?."
    assert len(calls) == 1
    (library / "a.py").write_text('"""Another."""')
    (library / "b.py").write_text('"""Two."""')
    assert bundled._documentation() == bundled._documentation() == b"a\nAnother.\n\nb\nTwo."
    assert len(calls) == 2


def test_an_error_in_the_thread_comes_in_its_turn(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(open_with(corpus), 3)
    original = dataset_module.RowStream.next_row
    calls = iter(range(10**6))

    def failing(self: Any) -> Any:
        if next(calls) == 9:
            raise OSError("disk on fire")
        return original(self)

    monkeypatch.setattr(dataset_module.RowStream, "next_row", failing)
    batches = open_with(corpus).batches()
    assert same([next(batches) for _ in range(3)], expected)
    for _ in range(2):
        with pytest.raises(WorkerError, match="OSError: disk on fire") as caught:
            next(batches)
        assert isinstance(caught.value.__cause__, OSError)


def test_closing_is_prompt_and_leaves_no_thread(corpus: Path) -> None:
    before = threading.active_count()
    dataset = open_with(corpus)
    batches = dataset.batches()
    next(batches)
    time.sleep(0.05)  # the queue is full and the thread waits
    dataset.close()
    dataset.close()
    assert threading.active_count() == before
    assert next(batches, None) is None
    assert names([next(dataset.batches())])
    dataset.batches()  # ends the earlier iterator's thread
    assert threading.active_count() == before + 1
    del dataset, batches
    wait_until(lambda: threading.active_count() == before)


def test_waiting_ends_when_another_thread_closes() -> None:
    release, released = threading.Event(), threading.Event()

    def make() -> None:
        assert release.wait(patience(20))
        released.set()

    prefetcher = Prefetcher(make, depth=1, name="slow")
    closer = threading.Timer(0.1, lambda: prefetcher.close())
    closer.start()
    with pytest.raises(StopIteration):
        prefetcher.get()
    assert not released.is_set()
    release.set()
    closer.join()


def test_work_ahead_is_bounded() -> None:
    made = []
    prefetcher = Prefetcher(lambda: made.append(1) or len(made), depth=3, name="counting")
    assert prefetcher.get() == 1
    time.sleep(0.1)
    assert len(made) == 4
    prefetcher.close()


def test_few_documents_that_begin_with_more_than_a_sequence_of_prompt(tmp_path: Path) -> None:
    """The packer's first row draws several epochs of so little data, which are no sign that there
    is nothing to learn."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "%s", "completion": "abc"}\n' % ("p" * 20) * 3)
    with open_dataset(path, byte_level_tokenizer(), seq_len=16, batch_size=4, seed=0, eval_fraction=0) as dataset:
        batch = next(dataset.batches())
    assert (batch["labels"] != -100).sum(1).tolist() == [4] * 4


def test_documents_without_a_target_do_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    tokenizer = byte_level_tokenizer()
    dataset = open_dataset(path, tokenizer, seq_len=8, batch_size=1, seed=0, eval_fraction=0)
    original = dataset._reader.form.encode

    def all_prompt(record: Any) -> Any:
        document = original(record)
        document.targets[:] = False
        return document

    monkeypatch.setattr(dataset._reader.form, "encode", all_prompt)
    with pytest.raises(RatelError, match="no sequence has a token to learn"):
        next(dataset.batches())
    path.write_text('{"text": " "}\n{"text": " "}\n')
    monkeypatch.setattr("ratel.data.sources.corpus.CHECKED_BYTES", 0)  # only reading finds out that they are blank
    dataset = open_dataset(path, tokenizer, seq_len=8, batch_size=1, seed=0, eval_fraction=0)
    with pytest.raises(RatelError, match="no sequence has a token to learn"):
        next(dataset.batches())
