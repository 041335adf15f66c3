"""What was measured of a block is kept, so that the next run plans the same and rounds its sums the same."""

import pytest
import torch

from families_common import build
from ratel.plan.hardware import load_hardware
from ratel.runtime import trial
from ratel.runtime.session import Session


def planned_seconds(batch_rows: int = 2, **options: object) -> set[tuple]:
    with Session(build("llama"), device="cpu", dtype="fp32", hardware=load_hardware("4090"), **options) as session:
        return {profile.seconds for profile in session.plan_for(batch_rows, 16).plan.profiles}


@pytest.mark.numerics
def test_a_block_is_timed_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    taken = iter(range(1, 100))
    monkeypatch.setattr(trial, "median_seconds", lambda *_, **__: float(next(taken)))
    first = planned_seconds(micro_batch=2)
    assert first == {((2, 1.0, 2.0),)}
    assert planned_seconds(micro_batch=2) == first
    assert planned_seconds(micro_batch=1) == {((1, 3.0, 4.0),)}  # another size is another time
    assert planned_seconds(micro_batch=1, attention="eager") == {((1, 5.0, 6.0),)}
    for file in (tmp_path / "ratel" / "hardware").iterdir():
        file.write_text("{")
    torch.manual_seed(0)
    assert planned_seconds(micro_batch=2) == {((2, 7.0, 8.0),)}  # what cannot be read is measured again


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_launching_is_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path, compiled: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Session(build("llama"), device="cuda", dtype="bf16", hardware=load_hardware("4090"), compile=compiled,
                 activations="recompute" if compiled == "on" else "auto") as session:
        profiles = session.prepare(2, 16).profiles
        for profile in profiles:
            bare_s, keeping_s, backward_s = profile.launch_s
            assert 0 < bare_s < 0.1 and 0 < keeping_s < 0.1 and 0 < backward_s < 0.1
            # Blocks this small are launched slower than they are computed.
            assert profile.seconds[0][1] > bare_s / 2 and profile.seconds[0][2] > backward_s / 2
        assert session.step({"input_ids": torch.zeros(2, 16, dtype=torch.long)}).loss > 0
