"""The lengths of a data set's rows, and the width of batches that are padded to their longest
row."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ratel.errors import RatelError


@dataclass(frozen=True)
class Lengths:
    """``counts``: (tokens, rows of so many), by tokens. Raises RatelError for no rows at all."""

    counts: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise RatelError("there is not one row in it", field="data", remedy="Give files with a record that is not blank")

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int]]) -> "Lengths":
        """Pairs of (tokens, rows) in any order; what has no tokens is no row."""
        found: dict[int, int] = {}
        for tokens, rows in lengths:
            if tokens > 0 and rows > 0:
                found[tokens] = found.get(tokens, 0) + rows
        return cls(tuple(sorted(found.items())))

    @cached_property
    def rows(self) -> int:
        return sum(rows for _, rows in self.counts)

    @cached_property
    def tokens(self) -> int:
        return sum(tokens * rows for tokens, rows in self.counts)

    @property
    def longest(self) -> int:
        return self.counts[-1][0]

    @property
    def mean(self) -> float:
        return self.tokens / self.rows

    def cut(self, limit: int) -> "Lengths":
        """What is longer loses its end."""
        return Lengths.of((min(tokens, limit), rows) for tokens, rows in self.counts)

    def split(self, limit: int) -> "Lengths":
        """What is longer goes on in rows of its own: nothing is lost."""
        full = sum(tokens // limit * rows for tokens, rows in self.counts)
        return Lengths.of([(limit, full), *((tokens % limit, rows) for tokens, rows in self.counts)])

    def expected_longest(self, batch: int) -> float:
        """Tokens of the longest of ``batch`` rows that are drawn independently, on average.

        Padded to it, a batch of rows of very different lengths is mostly padding: with the data set
        of 15,000 rows of 100 tokens on average that Xia et al. train on, 213 tokens for 8 rows.
        """
        return _expected_longest(self.counts, self.rows, batch)


@lru_cache(maxsize=256)
def _expected_longest(counts: tuple[tuple[int, int], ...], total: int, batch: int) -> float:
    expected, below, seen = 0.0, 0.0, 0
    for tokens, rows in counts:
        seen += rows
        up_to = (seen / total) ** batch
        expected, below = expected + tokens * (up_to - below), up_to
    return expected
