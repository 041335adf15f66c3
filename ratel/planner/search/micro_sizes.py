"""Which sizes of micro-batches are worth planning with."""

SATURATING_TOKENS = 16384
"""Tokens of a micro-batch beyond which larger ones gain less than their memory is worth elsewhere.
On an H200 with 3.0 B parameters and batch 32: 1.85 s a step with 8192 tokens, 1.80 s with 16384,
1.83 s with 32768 (evaluation_data.md)."""

COMPARED = 3
"""Sizes, from the largest that makes sense downwards, of which the one with the shortest step is
taken."""


def micro_sizes(rows: int, positions: int) -> list[int]:
    """Rows of a micro-batch, from about the smallest that saturates a GPU down to one: each step
    makes twice as many micro-batches. The last one of a step may be smaller than the others, so
    that any number of rows can be split."""
    count, sizes = max(1, rows * positions // SATURATING_TOKENS), []
    while not sizes or sizes[-1] > 1:
        sizes.append(-(-rows // min(count, rows)))
        count *= 2
    return sizes
