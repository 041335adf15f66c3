"""--deterministic: kernels that give the same bits every time, or a refusal that names the
operation that has none."""

import os
from pathlib import Path

import pytest
import torch

from ratel import probe_cache
from ratel.errors import RatelError
from ratel.hardware.determinism import WORKSPACE, same_bits
from ratel.planner.machine.hardware import load_hardware
from ratel.runtime.session.session import Session
from tests.support.families import build
from tests.support.resume import make_model, make_text, records, train


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)


@pytest.mark.unit
def test_it_is_on_inside_and_as_it_was_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(KeyError), same_bits(True):
            assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory and os.environ[WORKSPACE]
            raise KeyError("whatever ends it")
        assert torch.is_deterministic_algorithms_warn_only_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
    with same_bits(False):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.unit
def test_an_operation_that_has_no_such_kernel_is_named() -> None:
    with pytest.raises(RatelError, match=r"deterministic: .*\(put_ does not have a deterministic implementation\)\. Leave --deterministic out"), same_bits(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)
    with pytest.raises(RuntimeError, match="something else"), same_bits(True):
        raise RuntimeError("something else")


@pytest.mark.e2e
def test_a_run_is_the_same_again_and_blocks_are_timed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = Session.step
    monkeypatch.setattr(Session, "step", lambda *args, **more: "lr" in more and seen.append(
        torch.are_deterministic_algorithms_enabled()) or step(*args, **more))  # without: of the check of the family
    model, data = make_model(tmp_path / "model"), make_text(tmp_path / "data.txt")
    for name in ("one", "two"):
        train(model, data, tmp_path / name, steps=3, deterministic=True)
    assert seen == [True] * 6 and not torch.are_deterministic_algorithms_enabled()
    one, two = ([record["loss"] for record in records(tmp_path / name)] for name in ("one", "two"))
    assert one == two and len(one) == 3


@pytest.mark.unit
def test_timings_of_other_kernels_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stored: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    monkeypatch.setattr(probe_cache, "store", lambda key, content: stored[number].update({key["block"]} if "block" in key else ()))
    for number, on in enumerate((False, True, True)):
        with same_bits(on), Session(build("llama"), device="cpu", dtype="fp32", hardware=load_hardware("4090")) as session:
            session.plan_for(2, 16)
    assert stored[1] and not stored[0] & stored[1] and stored[1] == stored[2]


@pytest.mark.gpu
def test_steps_of_attention_are_the_same_again() -> None:
    """Long enough that blocks of keys add up in the order in which they come."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8, vocab_size=4096,
                         tie_word_embeddings=False)
    ids = torch.randint(0, 4096, (8, 1024), generator=torch.Generator().manual_seed(0))
    norms = []
    for _ in range(2):
        with same_bits(True), Session(config, device="cuda", tier="dram", lr=1e-3, max_grad_norm=1e9) as session:
            norms.append([session.step({"input_ids": ids}).grad_norm for _ in range(8)])
    assert norms[0] == norms[1]
