"""The choice of an earlier start is taken again, for the same, and for nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ratel import probe_cache
from ratel.planner.machine.hardware import load_hardware
from ratel.planner.plan import Plan
from ratel.planner.search import micro_batches
from ratel.runtime.planning import prepare
from ratel.runtime.planning import trial
from ratel.runtime.session import preparing
from ratel.runtime.session.session import Session
from ratel.units import MIB
from tests.support.families import build

pytestmark = pytest.mark.numerics

PROCESS_BYTES = 400 * MIB
OPTIONS = {"device": "cpu", "dtype": "fp32", "dram": "1GiB", "hardware": load_hardware("4090")}


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, and measurements that do not vary."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "_held_bytes", lambda: PROCESS_BYTES)
    monkeypatch.setattr(trial._HostMeter, "peak_growth", lambda self: 50 * MIB)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By search, how many sizes of micro-batches it had."""
    calls, search = [], micro_batches.search

    def noting(requests: list, hardware: object) -> object:
        calls.append(len(requests))
        return search(requests, hardware)

    monkeypatch.setattr(micro_batches, "search", noting)
    return calls


def planned(rows: int = 4, model: str = "llama", **options: object) -> tuple[Plan, float]:
    with Session(build(model), **{**OPTIONS, **options}) as session:
        found = session.plan_for(rows, 16)
        return found.plan, found.prediction.step_s


def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the micro-batches that are tried out from now on."""
    sizes, try_out = [], prepare.try_out

    def noting(blocks: object, batches: list, *rest: object, **more: object) -> object:
        sizes.append(batches[0].rows)
        return try_out(blocks, batches, *rest, **more)

    monkeypatch.setattr(prepare, "try_out", noting)
    return sizes


@pytest.mark.parametrize("options", [
    {}, {"gpu_memory": "900MiB"}, {"max_grad_norm": 0.0}, {"activations": "spill"}, {"optimizer": "speculative"}])
def test_the_same_again_is_not_searched_for(options: dict, searched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned(**options)
    sizes = tried(monkeypatch)
    assert planned(**options) == first
    assert len(searched) == 1
    assert sizes == [first[0].work.micro_rows]


def test_states_on_an_ssd_have_the_same_places(searched: list[int], tmp_path: Path) -> None:
    options = {"ssd": [tmp_path], "tier": "ssd", "hardware": load_hardware("4090", ssds=1)}
    first, _ = planned(**options)
    assert first.ssd_bytes and planned(**options)[0] == first
    assert len(searched) == 1


@pytest.mark.parametrize("other", [
    {"rows": 3}, {"model": "gpt2"}, {"dram": "1100MiB"}, {"micro_batch": 2}, {"hardware": load_hardware("h200-box")},
    {"max_grad_norm": 0.0}, {"dtype": "bf16"}, {"activations": "recompute"}, {"gpu_memory": "900MiB"}])
def test_something_else_is_searched_for(other: dict, searched: list[int]) -> None:
    planned()
    planned(**other)
    assert len(searched) == 2


def test_blocks_that_take_other_time_or_do_something_else_are_planned_anew(searched: list[int]) -> None:
    planned(attention="sdpa")
    planned(attention="eager")
    assert len(searched) == 2


@pytest.mark.parametrize("grown, searches", [(1, 1), (100, 1), (600, 2)])
def test_memory_is_that_of_now(grown: int, searches: int, searched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """MiB more that the process has already: they are in the plan, which must still fit."""
    first, _ = planned()
    monkeypatch.setattr(prepare, "_held_bytes", lambda: PROCESS_BYTES + grown * MIB)
    if first.dram_bytes + grown * MIB > first.dram_budget:
        with pytest.raises(ValueError, match="DRAM is short"):
            planned()
    else:
        assert planned()[0].process_bytes == first.process_bytes + grown * MIB
    assert len(searched) == searches


def test_activations_that_take_more_are_in_the_plan(searched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = planned()
    monkeypatch.setattr(trial._HostMeter, "peak_growth", lambda self: 60 * MIB)
    assert planned()[0].workspace_bytes > first.workspace_bytes
    assert len(searched) == 1


@pytest.mark.parametrize("freed, searches", [(1, 1), (100, 2)])
def test_memory_that_was_freed_is_used(freed: int, searches: int, searched: list[int],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    planned()
    monkeypatch.setattr(prepare, "_held_bytes", lambda: PROCESS_BYTES - freed * MIB)
    planned()
    assert len(searched) == searches


def replaced(change: Callable[[str], str]) -> None:
    """Change what is kept of plans."""
    for file in probe_cache.cache_directory().iterdir():
        content = file.read_text()
        if "placements" in content:
            file.write_text(change(content))


def test_what_cannot_be_read_is_searched_for(searched: list[int]) -> None:
    first = planned()
    replaced(lambda content: content.replace('"micro_rows"', '"rows_of_one"'))
    assert planned() == first
    assert len(searched) == 2


def test_a_run_that_goes_on_keeps_its_own_micro_batches(searched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With others its sums would round otherwise, whatever an earlier start has chosen for it."""
    first, _ = planned()
    assert first.work.micro_rows != 1
    monkeypatch.setattr(preparing, "micro_before", lambda core, batch: 1)
    assert planned()[0].work.micro_rows == planned()[0].work.micro_rows == 1
    replaced(lambda content: content.replace('"micro_rows": 1,', '"micro_rows": 2,'))
    assert planned()[0].work.micro_rows == 1
    assert searched == [3, 1, 1]


def test_a_step_of_an_earlier_plan_is_the_same_step(searched: list[int]) -> None:
    batch = {"input_ids": torch.arange(64).view(4, 16) % 50}
    losses = []
    for _ in range(2):
        with Session(build("llama"), **OPTIONS) as session:
            losses.append([session.step(batch).loss for _ in range(2)])
    assert losses[0] == losses[1] and len(searched) == 1
