"""Compiled blocks: the same training within rounding, and eager ones where compiling is not
possible."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ratel.errors import RatelError
from ratel.runtime.blocks.compiled import CompiledBlocks
from ratel.runtime.session import preparing
from ratel.runtime.session.session import Session
from tests.runtime.blocks.inner import make, train
from tests.support.sessions import assert_same


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """``aot_eager`` does all but generate code: it traces, functionalizes and splits off backward.
    Its results are those of eager operations."""
    def use(name: Any) -> None:
        monkeypatch.setattr(preparing, "CompiledBlocks", lambda parts: CompiledBlocks(parts, name))

    return use


@pytest.mark.numerics
@pytest.mark.parametrize("family", ["llama", "gpt2-dropout"])
def test_a_compiled_run_does_what_an_eager_one_does(family: str, backend, tmp_path: Path, caplog) -> None:
    backend("aot_eager")
    options = dict(rows=5, dtype="fp32")  # the last micro-batch is smaller
    assert_same(train(family, tmp_path, "cpu", compile="on", **options), train(family, tmp_path, "cpu", **options))
    assert "not compiled" not in caplog.text


@pytest.mark.numerics
def test_both_runs_of_a_block_are_compiled_and_evaluations_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, run = [], CompiledBlocks.run

    def noting(compiled: CompiledBlocks, block: int, *args: Any) -> torch.Tensor:
        runs.append((block, torch.is_grad_enabled()))
        return run(compiled, block, *args)

    monkeypatch.setattr(preparing, "CompiledBlocks", lambda parts: CompiledBlocks(parts, "aot_eager"))
    monkeypatch.setattr(CompiledBlocks, "run", noting)
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    model, _ = make("gpt2-dropout")
    with Session(model, device="cpu", dtype="fp32", compile="on") as session:
        session.step(batch)  # the first compares both runs of every block, which takes one more
        runs.clear()
        session.step(batch)
        assert runs == [*((block, False) for block in range(3)), *((block, True) for block in (2, 1, 0))]
        runs.clear()
        session.evaluate([batch])
        assert not runs


@pytest.mark.numerics
def test_what_depends_on_values_is_not_compiled(backend, tmp_path: Path, caplog) -> None:
    backend("aot_eager")
    assert_same(train("routing", tmp_path, "cpu", compile="on"), train("routing", tmp_path, "cpu"))
    assert "are not compiled: what it does depends on values" in caplog.text


@pytest.mark.numerics
def test_a_compiler_that_fails_is_done_without(backend, tmp_path: Path, caplog) -> None:
    def broken(graph: Any, inputs: Any) -> Callable:
        raise NotImplementedError("no such instruction")

    backend(broken)
    assert_same(train("in place", tmp_path, "cpu", compile="on"), train("in place", tmp_path, "cpu"))
    assert "are not compiled: torch.compile fails" in caplog.text


@pytest.mark.numerics
def test_runs_that_draw_other_random_numbers_are_noticed(backend, tmp_path: Path, caplog) -> None:
    def draws_first(graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        def run(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                torch.rand(3)
            return graph(*args)

        return run

    backend(draws_first)
    assert_same(train("dropout", tmp_path, "cpu", compile="on"), train("dropout", tmp_path, "cpu"))
    assert "its two compiled runs differ by" in caplog.text


@pytest.mark.unit
def test_blocks_with_hooks_are_not_compiled(backend, caplog) -> None:
    backend("aot_eager")
    model, _ = make("gpt2-dropout")
    calls: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    with Session(model, device="cpu", dtype="fp32", compile="on") as session:
        session.step({"input_ids": torch.zeros(1, 8, dtype=torch.long)})
    assert "are not compiled: hooks are registered on it" in caplog.text and calls


@pytest.mark.unit
def test_insides_of_compiled_blocks_cannot_be_kept() -> None:
    with pytest.raises(RatelError, match="no names to be kept by") as error:
        Session("demo", device="cpu", compile="on", activations="dram")
    assert error.value.field == "activations"
    with pytest.raises(RatelError) as error:
        Session("demo", device="cpu", compile="maybe")
    assert "compile" in error.value.field


@pytest.mark.gpu
def test_compiled_steps_on_a_gpu_are_the_same_wherever_states_live(tmp_path: Path) -> None:
    """Against eager ones within rounding; of one another bit for bit."""
    found = [train("llama", tmp_path, "cuda", compile="on", tier=tier, steps=3) for tier in ("dram", "ssd", "gpu")]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    eager = train("llama", tmp_path, "cuda", steps=3)
    for (loss, norm), (eager_loss, eager_norm) in zip(found[0][0], eager[0], strict=True):
        assert loss == pytest.approx(eager_loss, rel=2e-2) and norm == pytest.approx(eager_norm, rel=5e-2)
