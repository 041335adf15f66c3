"""The GPU's context, kernels and pinned memory, made ready while PyTorch is imported."""

import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ratel import train
from ratel.config import TrainConfig
from ratel.startup import ahead
from ratel.startup import arena_ahead
from ratel.startup import context_ahead
from ratel.startup import kernels_ahead
from ratel.startup import readahead
from ratel.trace import phases
from tests.support.ahead import asked_ahead, checkpoint  # noqa: F401


class Driver:
    """Stands for libcuda: notes what it is asked, and fails where it is told to."""

    def __init__(self, fails: str | None = None) -> None:
        self.calls: list[str] = []
        self._fails = fails

    def __getattr__(self, name: str) -> Callable[..., int]:
        def answer(*_: object) -> int:
            self.calls.append(name)
            return 100 if name == self._fails else 0

        return answer


@pytest.mark.unit
@pytest.mark.parametrize("fails", [None, "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "library"])
def test_a_context_is_made_ahead_or_left_to_pytorch(fails: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Driver:
        if fails == "library":
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    driver, asked = Driver(fails), ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    monkeypatch.setattr(context_ahead.ctypes, "CDLL", load)
    monkeypatch.setattr(context_ahead, "_current", None)
    monkeypatch.setattr(phases, "_phases", deque())
    monkeypatch.setenv("CUDA_MODULE_LOADING", "")
    context_ahead.begin()
    assert not driver.calls  # PyTorch is here
    monkeypatch.delitem(sys.modules, "torch")
    context_ahead.begin()
    assert context_ahead.pin(4096, 4096) == (fails is None)
    expected = [] if fails == "library" else asked if fails is None else asked[: asked.index(fails) + 1]
    assert driver.calls == expected + (["cuCtxSetCurrent", "cuMemHostRegister_v2"] if fails is None else [])
    assert [phase["name"] for phase in phases.phases()] == (["context of the GPU"] if fails is None else [])


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize("device, noted", [("cpu", True), ("cuda:0", torch.cuda.is_available())])
def test_kernels_are_called_ahead_and_leave_nothing(device: str, noted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_phases", deque())
    generators, modules = torch.get_rng_state(), set(sys.modules)
    kernels_ahead.begin(device)
    kernels_ahead.wait()
    assert [phase["name"] for phase in phases.phases()] == (["kernels of the GPU"] if noted else [])
    assert torch.equal(torch.get_rng_state(), generators)
    # Two threads that import may wait for each other.
    assert not {name for name in set(sys.modules) - modules if name.startswith(("torch", "transformers"))}
    kernels_ahead.wait()  # nothing has begun


@pytest.mark.unit
@pytest.mark.parametrize("options, begun", [({}, 1), ({"device": "cuda"}, 1), ({"device": "cpu"}, 0), ({"deterministic": True}, 0)])
def test_kernels_are_called_ahead_where_the_session_may_call_them(options: dict, begun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(kernels_ahead, "begin", calls.append)
    for nvidia in ("/", "/nothing"):
        monkeypatch.setattr(ahead, "_NVIDIA", Path(nvidia))
        ahead.begin_kernels(TrainConfig(model="demo", out="run", **options))
    assert calls == ["cuda:0"] * begun


@pytest.mark.gpu
def test_kernels_called_ahead_on_a_gpu_hold_no_memory() -> None:
    code = """if True:
        import torch
        from ratel.startup import kernels_ahead
        from ratel.trace import phases
        kernels_ahead.begin("cuda:0")
        kernels_ahead.wait()
        print(torch.cuda.memory_reserved(), [phase["name"] for phase in phases.phases()])
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout == "0 ['kernels of the GPU']\n", done.stderr


@pytest.mark.unit
@pytest.mark.parametrize("device, resumes, begun", [("cuda", False, 1), ("auto", True, 1), ("cpu", False, 0)])
def test_the_context_is_asked_for_where_the_gpu_computes(device: str, resumes: bool, begun: int,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(ahead, "_NVIDIA", Path("/"))
    monkeypatch.setattr(context_ahead, "begin", lambda: calls.append(1))
    ahead.begin_ahead(TrainConfig(model="demo", device=device, resume=resumes, out="run"))
    monkeypatch.setattr(ahead, "_NVIDIA", Path("/nothing"))
    ahead.begin_ahead(TrainConfig(model="demo", device=device, resume=resumes, out="run"))
    assert len(calls) == begun


@pytest.mark.native
def test_a_run_tells_the_next_start_what_its_arena_takes(checkpoint: Path, asked_ahead: list[int], tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    taken, last, take = [], [], arena_ahead.take
    monkeypatch.setattr(arena_ahead, "take", lambda num_bytes: last.append(num_bytes) or take(num_bytes))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(2):
        monkeypatch.setattr(readahead, "_current", None)
        out = tmp_path / str(number)
        train(str(checkpoint), out=str(out), steps=1, batch_size=2, seq_len=32, eval_fraction=0.0, export=False, quiet=True)
        taken.append(last[-1])  # those before it are of the check of the family
    guess, known = asked_ahead
    assert guess != taken[0] == known == taken[1]
