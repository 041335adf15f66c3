"""What was measured of a block is kept, so that the next run plans the same and rounds its sums the
same."""

import pytest
import torch

from ratel.planner.machine.hardware import load_hardware
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.planning import block_timing
from ratel.runtime.session.session import Session
from tests.support.families import build


def planned_seconds(batch_rows: int = 2, **options: object) -> set[tuple]:
    """The seconds planned for blocks, and for the loss."""
    with Session(build("llama"), device="cpu", dtype="fp32", hardware=load_hardware("4090"), **options) as session:
        plan = session.plan_for(batch_rows, 16).plan
        return {(*profile.seconds, plan.loss_s) for profile in plan.profiles}


@pytest.mark.numerics
def test_a_block_is_timed_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    taken = iter(range(1, 100))
    monkeypatch.setattr(block_timing, "median_seconds", lambda *_, **__: float(next(taken)))
    first = planned_seconds(micro_batch=2)
    assert first == {((2, 1.0, 1.0), 5.0)}  # forward; both passes less forward; then the same with insides kept; then the loss
    assert planned_seconds(micro_batch=2) == first
    assert planned_seconds(micro_batch=1) == {((1, 6.0, 1.0), 10.0)}  # another size is another time
    assert planned_seconds(micro_batch=1, attention="eager") == {((1, 11.0, 1.0), 10.0)}  # of which the loss knows nothing
    for file in (tmp_path / "ratel" / "hardware").iterdir():
        file.write_text("{")
    torch.manual_seed(0)
    assert planned_seconds(micro_batch=2) == {((2, 15.0, 1.0), 19.0)}  # what cannot be read is measured again


@pytest.mark.numerics
def test_what_there_is_no_room_to_keep_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, refused = BlockRuns.first, []

    def without_room(self: BlockRuns, block: int, *arguments: object) -> torch.Tensor:
        if len(self._kept[block]) > 1:
            refused.append(block)
            raise torch.OutOfMemoryError("no room")
        return first(self, block, *arguments)

    with Session(build("llama"), device="cpu", dtype="fp32", hardware=load_hardware("4090"), micro_batch=2) as session:
        with monkeypatch.context() as patch:
            patch.setattr(BlockRuns, "first", without_room)
            profiles = session.plan_for(2, 16).plan.profiles
        assert refused and all(profile.seconds and not profile.keeping_seconds for profile in profiles)
        assert session.step({"input_ids": torch.zeros(2, 16, dtype=torch.long)}).loss > 0


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_launching_is_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path, compiled: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Session(build("llama"), device="cuda", dtype="bf16", hardware=load_hardware("4090"), compile=compiled,
                 activations="recompute" if compiled == "on" else "auto") as session:
        profiles = session.prepare(2, 16).profiles
        for profile in profiles:
            bare, keeping = profile.launch_s
            assert all(seconds > 0 for seconds in (*bare, *keeping))
            # Blocks this small are launched slower than they are computed.
            assert profile.seconds[0][1] > bare[0] / 2
            assert bool(profile.keeping_seconds) == (compiled == "off")  # what is compiled keeps nothing
            assert all(seconds > keeping[0] / 2 for _, seconds, _ in profile.keeping_seconds)
        assert session.step({"input_ids": torch.zeros(2, 16, dtype=torch.long)}).loss > 0
