"""One search over sizes of micro-batches: whoever has the same facts gets the same plan."""

from dataclasses import replace

import pytest

from ratel.config import resolve
from ratel.errors import RatelError
from ratel.planner.activation_policy import AUTO
from ratel.planner.block_profile import BlockProfile, Inner
from ratel.planner.checkpoints import Spill
from ratel.planner.machine.hardware import load_hardware
from ratel.planner.plan import Plan
from ratel.planner.search.micro_batches import best_plan
from ratel.planner.search.options import SessionOptions
from ratel.planner.search.request import BlockFacts, Budgets, Request, request_for
from ratel.runtime.planning import planner as planner_module
from ratel.runtime.planning import prepare
from ratel.runtime.planning.machine import PROCESS_BYTES, machine_for
from ratel.runtime.planning.trial import Trial
from ratel.units import GIB, MIB
from tests.support.plans import gpt_spec

pytestmark = pytest.mark.unit
SPEC = gpt_spec(6, 1024, 32000)
ROWS, POSITIONS = 16, 2048


def facts(micro_rows: int, spills: bool, *, row_bytes: int = 64 * MIB) -> BlockFacts:
    """A spilled second run leaves an eighth on the GPU."""
    profile = BlockProfile(forward_flops=1e12, recompute_flops=8e11, inner=(
        Inner(name="up", row_bytes=8 * POSITIONS * 1024, row_flops=3e11),))
    return BlockFacts(hidden_bytes=2 * micro_rows * POSITIONS * 1024, profiles=(profile,) * 6, has_chunked_loss=True,
                      workspace_bytes=micro_rows * row_bytes // (8 if spills else 1),
                      spill=replace(Spill.of(2 * micro_rows * POSITIONS * 1024, 1 << 40), region_bytes=GIB) if spills else None)


class Counted:
    """As `ratel plan` and a session do: requests of facts by size."""

    rows, positions = ROWS, POSITIONS

    def __init__(self, *, gpu: int, row_bytes: int = 64 * MIB, on_host: bool = False, dram: int = 64 * GIB, **options: object) -> None:
        self.options, self.on_host = SessionOptions(max_grad_norm=0.0, **options), on_host
        self.budgets, self._row_bytes = Budgets(gpu=gpu, dram=dram, ssd=None), row_bytes
        self.asked: list[tuple[int, bool]] = []

    def request(self, micro_rows: int, spills: bool) -> Request:
        self.asked.append((micro_rows, spills))
        return request_for(SPEC, self.options, self.budgets, facts(micro_rows, spills, row_bytes=self._row_bytes), rows=ROWS,
                           seq_len=POSITIONS, micro_rows=micro_rows, on_host=self.on_host)


class Parts:
    """What a trial asks a model beside the blocks, which are not run here."""

    spec, is_causal_lm, device, import_element_bytes = SPEC, True, None, 4

    def head(self, batch: object) -> tuple[object, None]:
        return type("Hidden", (), {"nbytes": 2 * POSITIONS * 1024}), None


@pytest.mark.parametrize("given", [{}, {"gpu_memory": "3GiB"}, {"micro_batch": 2}, {"activations": "recompute"}, {"tier": "dram"},
                                   {"optimizer": "deferred", "max_grad_norm": 1.0}, {"checkpoint_tier": "dram"}], ids=str)
def test_a_session_and_ratel_plan_decide_the_same(given: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are told the same of every size of micro-batches, one by trials, one by counting."""
    common = {"dtype": "bf16", "gpu_memory": "12GiB", "dram": "48GiB", "max_grad_norm": 0.0, **given}
    config = resolve({"batch_size": ROWS, "seq_len": POSITIONS, "hardware": "4090", **common})
    machine = machine_for(config, ssds=0)

    class Outline:
        spec = SPEC

        def __init__(self, *unused: object, **more: object) -> None:
            pass

        def facts(self, rows: int, seq_len: int, *, spills: bool) -> BlockFacts:
            return facts(rows, spills)

    monkeypatch.setattr(planner_module, "Outline", Outline)
    counted = planner_module.Planner("model", config, machine).plan(advice=False).plan
    assert by_trials(SessionOptions(**common), machine, monkeypatch) == counted


def by_trials(options: SessionOptions, machine: object, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """As `make_plan` does, for a device whose blocks behave as the facts say."""
    trials = object.__new__(prepare.Trials)
    trials.options, trials.rows, trials.positions, trials.on_host = options, ROWS, POSITIONS, False
    trials.budgets, trials._requests, trials._held_bytes = machine.budgets, {}, PROCESS_BYTES - prepare.PROCESS_MARGIN_BYTES
    trials._blocks = type("Blocks", (), {"parts": Parts()})
    trials._batch = type("Batch", (), {"content": None, "first": lambda self, rows, device: self})()
    trials._device, trials._situation = None, prepare.Situation(device=None, machine=machine.hardware)
    monkeypatch.setattr(prepare, "positions_per_chunk", lambda rows, vocab_size: 1)
    sizes: list[int] = []
    monkeypatch.setattr(trials, "_facts", lambda rows, trial: sizes.append(rows) or facts(rows, trial.spill is not None))
    monkeypatch.setattr(prepare, "try_out", lambda *unused, region_limit, **more: Trial(
        profiles=(), workspace_bytes=0, spill=None if region_limit is None else facts(1, True).spill, loss_s=None))
    return best_plan(trials, machine.hardware).plan


def test_smaller_micro_batches_are_asked_for_only_where_larger_ones_do_not_fit() -> None:
    roomy, tight = Counted(gpu=24 * GIB), Counted(gpu=3 * GIB, row_bytes=GIB)
    best_plan(roomy, load_hardware("4090"))
    assert [size for size, _ in roomy.asked] == [8, 4, 2] and not any(spills for _, spills in roomy.asked)
    found = best_plan(tight, load_hardware("4090"))
    assert found.plan.work.micro_rows <= 2 and found.choices[-1].work == found.plan.work


@pytest.mark.parametrize("activations", [AUTO, "recompute", "spill"])
def test_at_last_the_smallest_spills_unless_something_else_was_asked_for(activations: str) -> None:
    tight = Counted(gpu=3 * GIB, row_bytes=6 * GIB, activations=activations)
    if activations == "recompute":
        with pytest.raises(RatelError, match="gpu_memory.*short by"):
            best_plan(tight, load_hardware("4090"))
        assert not any(spills for _, spills in tight.asked)
        return
    assert best_plan(tight, load_hardware("4090")).plan.spill is not None
    assert tight.asked[-1] == (1, True) if activations == AUTO else all(spills for _, spills in tight.asked)


@pytest.mark.parametrize(("on_host", "sizes"), [(False, [8, 4, 2]), (True, [8, 4, 2, 1])])
def test_dram_that_is_short_means_smaller_micro_batches_only_where_it_is_the_device_too(on_host: bool, sizes: list[int]) -> None:
    short = Counted(gpu=24 * GIB, dram=MIB, on_host=on_host)
    with pytest.raises(RatelError, match="dram"):
        best_plan(short, load_hardware("4090"))
    assert [size for size, _ in short.asked] == sizes


def test_the_rows_of_a_batch_limit_the_micro_batch_for_whoever_plans() -> None:
    with pytest.raises(RatelError, match="micro_batch: must be between 1 and the 16 rows"):
        best_plan(Counted(gpu=24 * GIB, micro_batch=17), load_hardware("4090"))


def test_a_run_that_goes_on_begins_with_its_own_micro_batches(caplog: pytest.LogCaptureFixture) -> None:
    roomy, tight = Counted(gpu=24 * GIB), Counted(gpu=3 * GIB, row_bytes=GIB)
    assert best_plan(roomy, load_hardware("4090"), before=3).plan.work.micro_rows == 3 and roomy.asked == [(3, False)]
    assert best_plan(tight, load_hardware("4090"), before=16).plan.work.micro_rows < 16
    assert "do not fit any more" in caplog.text
