"""Packing and order: nothing lost, nothing twice, no loss across a boundary."""

import random
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from ratel.data.batches.encode import Document
from ratel.data.batches.order import Permutation
from ratel.data.batches.packing import NO_LOSS, Packer, Piece, Row

pytestmark = pytest.mark.unit

PAD = 10**6


def make_documents(rng: random.Random, count: int, longest: int) -> list[Document]:
    """Every id occurs once in all documents, so that a token in a row says where it comes from."""
    documents, next_id = [], 0
    for _ in range(count):
        length = rng.choice([rng.randint(1, longest), rng.randint(1, 12)])
        whole = rng.random() < 0.5
        targets = np.arange(length) >= rng.randint(0, length) if whole else np.ones(length, dtype=bool)
        ids = np.arange(next_id, next_id + length, dtype=np.int32)
        documents.append(Document(ids=ids, targets=targets, whole=whole))
        next_id += length
    return documents


def packer_of(documents: Iterable[Document], seq_len: int) -> Packer:
    numbered = iter(list(enumerate(documents)))
    return Packer(lambda: next(numbered, None), seq_len=seq_len, pad_id=PAD)


def pack(documents: Iterable[Document], seq_len: int) -> list[Row]:
    return list(iter(packer_of(documents, seq_len).next_row, None))


def runs_of(row: Row) -> list[tuple[np.ndarray, np.ndarray]]:
    """The row cut where positions restart."""
    starts = np.flatnonzero(row.position_ids == 0)
    return list(zip(np.split(row.input_ids, starts[1:]), np.split(row.labels, starts[1:])))


@pytest.mark.parametrize("seed", range(30))
def test_every_token_once_in_runs_of_one_document(seed: int) -> None:
    rng = random.Random(seed)
    seq_len = rng.choice([8, 17, 64])
    documents = make_documents(rng, rng.randint(1, 200), longest=3 * seq_len)
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    targets = np.concatenate([document.targets for document in documents])
    found: list[int] = []
    lost = 0
    for row in pack(documents, seq_len):
        for ids, labels in runs_of(row):
            assert labels[0] == NO_LOSS
            if ids[0] == PAD:
                assert (ids == PAD).all() and (labels == NO_LOSS).all()
                continue
            assert (np.diff(ids) == 1).all() and len(set(owner[ids])) == 1
            assert (labels[1:] == np.where(targets[ids[1:]], ids[1:], NO_LOSS)).all()
            found.extend(ids)
            lost += targets[ids[0]]
    assert sorted(found) == list(range(len(owner)))
    first_tokens = np.flatnonzero(np.diff(owner, prepend=-1))
    assert lost >= targets[first_tokens].sum()  # more only by cuts, each of which begins a run


@pytest.mark.parametrize("seed", range(10))
def test_a_prompt_stays_with_its_answer(seed: int) -> None:
    rng = random.Random(seed)
    documents = make_documents(rng, 150, longest=100)
    lengths = {int(document.ids[0]): len(document) for document in documents if document.whole and len(document) <= 64}
    seen = {int(ids[0]): len(ids) for row in pack(documents, 64) for ids, _ in runs_of(row)}
    assert lengths and all(seen[start] == length for start, length in lengths.items())


def test_plain_text_leaves_no_gap_but_at_the_end() -> None:
    rng = random.Random(0)
    documents = [Document(ids=document.ids, targets=document.targets, whole=False)
                 for document in make_documents(rng, 500, longest=200)]
    rows = pack(documents, 64)
    num_tokens = sum(map(len, documents))
    padded = [row for row in rows if (row.input_ids == PAD).sum() > 1]  # one token of room is not worth a cut
    assert len(padded) <= 1 and len(rows) <= -(-num_tokens // 64) + 2


def test_answers_of_ordinary_lengths_leave_little_padding() -> None:
    rng = random.Random(0)
    documents = [Document(ids=np.zeros(length, dtype=np.int32), targets=np.ones(length, dtype=bool), whole=True)
                 for length in (int(rng.lognormvariate(5, 1)) + 2 for _ in range(2000)) if length <= 1024]
    rows = pack(documents, 1024)
    assert sum(map(len, documents)) > 0.97 * 1024 * (len(rows) - 1)


def test_a_long_document_goes_on_in_the_next_sequence() -> None:
    rows = pack([Document(ids=np.arange(50, dtype=np.int32), targets=np.ones(50, dtype=bool), whole=True)], 16)
    assert [row.input_ids[0] for row in rows] == [0, 16, 32, 48]
    assert rows[3].position_ids.tolist() == [0, 1, *range(14)]
    assert rows[3].labels.tolist() == [NO_LOSS, 49] + [NO_LOSS] * 14


def test_the_pool_is_bounded_and_enough_to_go_on() -> None:
    documents = make_documents(random.Random(1), 2000, longest=30)
    numbered = iter(list(enumerate(documents)))
    drawn: list[int] = []

    def draw() -> tuple[int, Document]:
        number, document = next(numbered)
        drawn.append(number)
        return number, document

    packer = Packer(draw, seq_len=64, pad_id=PAD)
    for _ in range(20):
        packer.next_row()
    waiting = packer.waiting
    assert 0 < len(waiting) <= 65
    rest = iter(list(enumerate(documents))[len(drawn):])
    pool = [Piece(number=number, start=start, document=documents[number]) for number, start in waiting]
    again = Packer(lambda: next(rest, None), seq_len=64, pad_id=PAD, pool=pool)
    for _ in range(50):
        expected, row = packer.next_row(), again.next_row()
        assert (expected.input_ids == row.input_ids).all() and (expected.labels == row.labels).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_a_permutation_has_every_number_once(size: int) -> None:
    order = Permutation(size, (3, 0))
    assert sorted(order[index] for index in range(size)) == list(range(size))


def test_permutations_differ_by_key_and_are_well_mixed() -> None:
    size = 1000
    orders = [[Permutation(size, key)[index] for index in range(size)] for key in ((0, 0), (0, 1), (1, 0), (0, -1))]
    for one in range(4):
        assert orders[one] == [Permutation(size, [(0, 0), (0, 1), (1, 0), (0, -1)][one])[i] for i in range(size)]
        for other in range(one):
            assert sum(a == b for a, b in zip(orders[one], orders[other])) < 12  # one is expected of a random pair
        steps = Counter(np.sign(np.diff(orders[one])))
        assert abs(steps[1] - steps[-1]) < 150
        assert abs(np.corrcoef(orders[one], range(size))[0, 1]) < 0.15


def test_places_are_uniform_over_keys() -> None:
    """Where document 0 of 10 comes, over 2000 seeds: chi-squared with 9 degrees of freedom, 33.7 at
    one in 10,000."""
    counts = Counter(Permutation(10, (seed, 0))[0] for seed in range(2000))
    assert sum((counts[place] - 200) ** 2 / 200 for place in range(10)) < 33.7
