"""The search for the largest that fits, and that what it finds is really trained within its
limit."""

import pytest

from ratel.errors import RatelError
from ratel.models.presets import preset_config
from ratel.planner.search.largest import largest_count
from ratel.training.bench.largest import WARMUP, MaxBench, max_batch, max_model, table
from ratel.units import GIB


@pytest.mark.unit
@pytest.mark.parametrize("fewest", [1, 2, 3])
@pytest.mark.parametrize("near", [0, 1, 7, 90, 4000])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 100, 5000])
def test_the_largest_count_is_found(limit: int, near: int, fewest: int) -> None:
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= limit

    expected = 0 if limit < fewest else min(limit, 1000)
    assert largest_count(fits, least=fewest, most=1000, near=near) == expected
    assert min(asked) >= fewest and max(asked) <= 1000 and len(set(asked)) == len(asked) <= 22


@pytest.mark.unit
def test_another_number_of_blocks_changes_the_depth_alone() -> None:
    shallow, deep = preset_config("qwen3-0.6b", num_blocks=3), preset_config("qwen3-0.6b", num_blocks=40)
    assert (shallow.num_hidden_layers, deep.num_hidden_layers) == (3, 40)
    assert shallow.hidden_size == deep.hidden_size and len(deep.layer_types) == 40
    with pytest.raises(RatelError, match="neither a directory nor a preset"):
        preset_config("no-such-model", num_blocks=2)


@pytest.mark.e2e
@pytest.mark.parametrize("search", [max_model, max_batch])
def test_each_maximum_is_trained_within_its_limit(search) -> None:
    bench = MaxBench(model="demo", seq_len=16, most=3, steps=1, options={"device": "cpu"})
    nothing, found = search(bench, [64 << 20, 2 * GIB])
    what = "layers" if search is max_model else "batch_size"
    assert nothing == {"dram_limit_bytes": 64 << 20, what: 0}
    assert found[what] == 3 and len(found["losses"]) == WARMUP + 1 and all(loss == loss for loss in found["losses"])
    assert found["dram_peak_bytes"] <= found["dram_planned_bytes"] <= 2 * GIB
    assert "nothing fits" in table([nothing, found]) and f"{found['parameters'] / 1e6:,.0f} M" in table([nothing, found])
