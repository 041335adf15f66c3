"""The check of a model's kind: it finds what is planted, keeps what it found, and refuses training
by it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ratel
from ratel.cli import main
from ratel.errors import RatelError
from ratel.models.calls.running import CausalLMRunner
from ratel.models.checks.shrink import shrunken
from ratel.verify import known
from ratel.verify.family import check_class
from ratel.verify.findings import BROKE, FAILED, HOLDS, Finding, Verdict
from ratel.verify.gradients import ROUNDING, Pass, compare
from ratel.verify.net import Entry, check_entries
from tests.support.patience import patience

pytestmark = pytest.mark.numerics
FP32, BF16 = ROUNDING[torch.float32], ROUNDING[torch.bfloat16]


def a_pass(loss: float = 1.0, **grads: torch.Tensor) -> Pass:
    return Pass(loss=loss, grads=grads)


def a_grad(seed: int = 0) -> torch.Tensor:
    return torch.randn(40, generator=torch.Generator().manual_seed(seed))


def test_equal_bits_hold_and_rounding_holds_where_plain_pytorch_rounds_as_much() -> None:
    exact = a_pass(w=a_grad().double())
    plain = a_pass(w=a_grad())
    assert compare("gradients", plain, plain, lambda: exact, FP32).detail == "bitwise"
    near = a_pass(w=a_grad() * (1 + 1e-6))
    assert compare("gradients", near, plain, lambda: exact, FP32) == Finding(about="gradients", outcome=HOLDS, detail="to rounding")


@pytest.mark.parametrize("ours, words", [
    (a_pass(w=a_grad() * 1.001), "off by"),
    (a_pass(w=a_grad(1)), "w: off by"),
    (a_pass(w=a_grad() * float("nan")), "nan"),
    (a_pass(loss=1.1, w=a_grad() * 1.000001), "loss 1.1"),
    (a_pass(), "has a gradient and is not trained"),
    (a_pass(w=a_grad(), other=a_grad()), "has no gradient in autograd"),
], ids=["scaled", "another", "nan", "loss", "missing", "extra"])
def test_a_wrong_gradient_fails(ours: Pass, words: str) -> None:
    found = compare("gradients", ours, a_pass(w=a_grad()), lambda: a_pass(w=a_grad().double()), FP32)
    assert found.outcome == FAILED and words in found.detail


def test_in_bf16_twice_plain_pytorchs_error_is_allowed_and_not_ten_times() -> None:
    exact = a_pass(w=a_grad())
    error = 0.05 * exact.grads["w"].norm() * torch.nn.functional.normalize(a_grad(1), dim=0)
    plain, ours, far = (a_pass(w=exact.grads["w"] + times * error) for times in (1, 1.9, 10))
    assert compare("bf16", ours, plain, lambda: exact, BF16).outcome == HOLDS
    assert compare("bf16", far, plain, lambda: exact, BF16).outcome == FAILED


def small_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return shrunken(LlamaConfig(num_key_value_heads=8, **changes))


def llama() -> type:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM


def test_a_family_that_is_trained_rightly_holds_in_everything() -> None:
    verdict = check_class(llama(), small_llama(), "next-token")
    assert verdict.is_right, [finding.describe() for finding in verdict.failed]
    assert {finding.about for finding in verdict.findings} == {"causal", "gradients", "step", "resume", "export", "packed", "loading",
                                                               "bf16", "own loss"}
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


def _without_positions(run: Callable) -> Callable:
    return lambda self, batch, *args, **more: run(self, {k: v for k, v in batch.items() if k != "position_ids"}, *args, **more)


def _with_other_tokens(run: Callable) -> Callable:
    return lambda self, batch, *args, **more: run(self, {**batch, "input_ids": batch["input_ids"].roll(1, 1)}, *args, **more)


def _looking_ahead(run: Callable) -> Callable:
    return lambda self, batch, *args, **more: run(self, {**batch, "input_ids": batch["input_ids"].roll(-1, 1)}, *args, **more)


@pytest.mark.parametrize("planted, about", [(_without_positions, "packed"), (_with_other_tokens, "gradients"), (_looking_ahead, "causal")])
def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch, planted: Callable, about: str) -> None:
    original = CausalLMRunner.run
    from ratel.models import parts

    kept = parts.Parts.head
    monkeypatch.setattr(parts.Parts, "head", lambda self, batch: _planted(kept, self, batch, planted))
    verdict = check_class(llama(), small_llama(), "next-token", is_quick=True)
    assert CausalLMRunner.run is original
    assert about in {finding.about for finding in verdict.wrong}, verdict


def _planted(head: Callable, self: Any, batch: Any, planted: Callable) -> Any:
    """Only what a step runs is changed, not what is tried out at load."""
    run = CausalLMRunner.run
    CausalLMRunner.run = planted(run)
    try:
        return head(self, batch)
    finally:
        CausalLMRunner.run = run


def test_a_class_that_crashes_or_hangs_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import time

    from ratel.verify import net

    def pretended(entry: Entry) -> Verdict:
        {"crashes": lambda: os._exit(9), "hangs": lambda: time.sleep(600), "raises": lambda: 1 / 0}.get(entry.name, lambda: None)()
        return Verdict(name=entry.name, task=entry.task)

    monkeypatch.setattr(net, "check_entry", pretended)
    chosen = [Entry(name=name, task="classify") for name in ("crashes", "hangs", "raises", "goes")]
    found = {verdict.name: verdict for verdict in check_entries(chosen, processes=2, limit_s=patience(3))}
    assert found["goes"].is_right
    details = {name: verdict.failed[0].detail for name, verdict in found.items() if verdict.failed}
    assert "ended with 9" in details["crashes"] and "too long" in details["hangs"] and "ZeroDivision" in details["raises"]


# -- what is remembered ----------------------------------------------------------------------------------------------


def tiny_run(tmp_path: Path, **options: Any) -> Any:
    batches = [{"input_ids": torch.randint(3, 90, (2, 16))}]
    return ratel.train(llama()(small_llama()), batches, steps=1, batch_size=2, seq_len=16, dtype="fp32", device="cpu",
                       out=tmp_path / "out", quiet=True, export=False, overwrite=True, **options)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the classes that are checked, in an empty cache; what they are said to be is
    ``checks.outcome``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made: list[str] = []

    def pretended(model_class: type, config: Any, task: str, *, is_quick: bool) -> Verdict:
        made.append(model_class.__name__)
        outcome = made_outcome[0]
        return Verdict(name=model_class.__name__, task=task,
                       findings=(Finding(about="gradients", outcome=outcome, detail="planted"),))

    made_outcome = [HOLDS]
    monkeypatch.setattr(known, "check_class", pretended)
    made_of[id(made)] = made_outcome
    return made


made_of: dict[int, list[str]] = {}


def test_a_family_is_checked_once_and_again_when_sources_are_others(checks: list[str], tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(tmp_path)
    tiny_run(tmp_path)
    assert checks == ["LlamaForCausalLM"]
    monkeypatch.setattr(known, "_sources", lambda: "others")
    tiny_run(tmp_path)
    assert len(checks) == 2


def test_what_was_found_wrong_is_refused_now_and_later_and_can_be_overruled(checks: list[str], tmp_path: Path) -> None:
    made_of[id(checks)][0] = FAILED
    for _ in range(2):
        with pytest.raises(RatelError, match="a check of this kind of model failed.*planted.*--unchecked"):
            tiny_run(tmp_path)
    assert len(checks) == 1
    assert tiny_run(tmp_path, unchecked=True).steps == 1


def test_what_the_check_could_not_do_is_no_reason_to_refuse(checks: list[str], tmp_path: Path) -> None:
    made_of[id(checks)][0] = BROKE
    assert tiny_run(tmp_path).steps == 1


def test_a_family_that_could_not_be_checked_is_tried_again(checks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may have been short just then."""
    made: list[str] = []
    monkeypatch.setattr(known, "check_class", lambda cls, *rest, **more: made.append(cls.__name__) or Verdict(
        name=cls.__name__, task="next-token", refused="DRAM is short"))
    for _ in range(2):
        assert tiny_run(tmp_path).steps == 1
    assert len(made) == 2


# -- ratel check --model ---------------------------------------------------------------------------------------------


def test_the_command_says_line_by_line_what_holds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                                  tmp_path: Path) -> None:
    small_llama(architectures=["LlamaForSequenceClassification"]).save_pretrained(tmp_path)
    wrong = Finding(about="resume", outcome=FAILED, detail="differs")
    for findings, status in (((), 0), ((wrong,), 1)):
        monkeypatch.setattr(known, "check_class", lambda cls, config, task: Verdict(
            name=cls.__name__, task=task, findings=(Finding(about="gradients", outcome=HOLDS, detail="bitwise"), *findings)))
        assert main(["check", "--model", str(tmp_path)]) == status
        out = capsys.readouterr().out
        assert "LlamaForSequenceClassification (classify)" in out and "holds   loss and gradients in fp32: bitwise" in out
        assert ("failed  a run that is resumed" in out) is bool(findings)
        assert main(["check", "--model", str(tmp_path), "--json"]) == status
        assert json.loads(capsys.readouterr().out)["ok"] is not bool(findings)


def test_the_command_takes_a_state_or_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check"]) == 2 and "--model" in capsys.readouterr().err
    assert main(["check", str(tmp_path), "--model", "demo"]) == 2
