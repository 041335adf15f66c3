"""Dropout masks of adapters: places and keys decide, nothing else; and they look like independent
draws."""

import math

import pytest
import torch

from ratel.lora.compute.masks import keep_mask, mask_key, masked, threshold

pytestmark = pytest.mark.unit
P = 0.3
KNOWN_KEY = 2632304960824005401
KNOWN_ROWS = ["0111111110110111", "1100001010111101", "1100110100100100"]


def deviations(kept: torch.Tensor, p: float) -> torch.Tensor:
    """Mean 0 and variance 1 under independent draws."""
    return (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))


def z_score(products: torch.Tensor) -> float:
    return abs(float(products.mean())) * math.sqrt(products.numel())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p: float) -> None:
    found = deviations(keep_mask(1024, 1024, mask_key(7, 3, "layer.4", "q_proj"), p), p)
    assert z_score(found) < 4.5
    for dim in (0, 1):  # sums over columns, and over rows, vary as sums of independent draws do
        assert float((found.sum(dim) / math.sqrt(found.shape[dim])).var()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_elements_are_independent(seed: int) -> None:
    """Neighbours at many distances, columns that differ in single bits, corners of rectangles, keys
    that differ in one part."""
    found = deviations(keep_mask(1024, 1024, mask_key(seed, 0, 0, 0), P), P)
    columns = torch.arange(1024)
    for by in (1, 2, 3, 4, 8, 64, 512):
        assert z_score(found[:, by:] * found[:, :-by]) < 4.5, by
        assert z_score(found[by:] * found[:-by]) < 4.5, by
        assert z_score((found[:, columns ^ by] * found)[:, columns & by == 0]) < 4.5, by
        assert z_score(found[by:, by:] * found[:-by, :-by] * found[by:, :-by] * found[:-by, by:]) < 4.5, by
    for other in ((seed + 1, 0, 0, 0), (seed, 1, 0, 0), (seed, 0, 1, 0), (seed, 0, 0, 1)):
        assert z_score(deviations(keep_mask(1024, 1024, mask_key(*other), P), P) * found) < 4.5, other


def test_rows_of_one_mask_are_unlike() -> None:
    found = deviations(keep_mask(2048, 512, mask_key(1, 2, 3, 4), 0.5), 0.5)
    between = (found @ found.t()) / math.sqrt(512)
    off = between[~torch.eye(2048, dtype=torch.bool)]
    assert float(off.var()) == pytest.approx(1, abs=0.02) and float(off.abs().max()) < 7


def test_a_part_of_the_rows_draws_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    key = mask_key(5, 6, 7, 8)
    whole = keep_mask(37, 29, key, P, first_row=2**33)
    monkeypatch.setattr("ratel.lora.compute.masks.CHUNK_ELEMENTS", 64)
    parts = [keep_mask(count, 29, key, P, first_row=2**33 + begin) for begin, count in ((0, 1), (1, 20), (21, 16))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(keep_mask(37, 11, key, P, first_row=2**33), whole[:, :11])


def test_bits_do_not_change_between_versions() -> None:
    """A run that is resumed under a newer Ratel draws what it would have drawn."""
    assert mask_key(1, 2, "model.layers.3", "self_attn.q_proj") == KNOWN_KEY
    kept = keep_mask(3, 16, KNOWN_KEY, 0.5, first_row=5)
    assert ["".join("01"[int(x)] for x in row) for row in kept] == KNOWN_ROWS


def test_nothing_dropped_is_nothing_done() -> None:
    x = torch.randn(3, 4)
    assert masked(x, 1, 0.0) is x
    assert threshold(1e-12) == 0 and threshold(0.5) == 2**31


def test_kept_elements_are_scaled() -> None:
    x = torch.randn(64, 64)
    kept = keep_mask(64, 64, 9, P)
    assert torch.equal(masked(x, 9, P), torch.where(kept, x * (1 / (1 - P)), torch.zeros(())))
