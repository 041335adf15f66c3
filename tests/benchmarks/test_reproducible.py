"""`benchmarks/exactness/reproducible.py` finds the same bits on a CPU; where something was changed,
it says what and where."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]

from benchmarks.exactness import reproducible  # noqa: E402
from benchmarks.tables import exactness  # noqa: E402
from benchmarks.exactness.bitwise import digest  # noqa: E402
from benchmarks.exactness.reproducible_parts import Pieces, Work  # noqa: E402

from tests.support.patience import patience
from ratel.models import Parts  # noqa: E402
from ratel.runtime.streams.gradients import Gradients  # noqa: E402
from ratel.runtime.streams.streamer import Streamer  # noqa: E402

TINY = {"model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
SHAPE = ["--model", json.dumps(TINY), "--batch", "2", "--seq-len", "16", "--repeats", "3", "--device", "cpu"]
IMPOSSIBLE = {"attention, efficient_attention", "attention, cudnn_attention"}


def points(*cases: str) -> dict[str, dict[str, Any]]:
    found = reproducible.measure(reproducible.parse([*SHAPE, "--only", *cases])).points
    return {point["name"]: point for point in found}


def at_call(owner: Any, name: str, number: int, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the call of this number (from 0) of a function, ``change(result, *arguments)``."""
    real, calls = getattr(owner, name), iter(range(10**6))

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if next(calls) == number:
            change(result, *args)
        return result

    monkeypatch.setattr(owner, name, changed)


def flip(tensor: Tensor, place: int = 0) -> None:
    """The last bit of one element."""
    tensor.detach().view(torch.int16).view(-1)[place] ^= 1


@pytest.mark.unit
@pytest.mark.parametrize("count", [1, 3, 4096 * 4 * 2 + 7])
def test_digests_tell_values_and_places_apart(count: int) -> None:
    values = torch.randn(count + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor, shifted = values[:count].clone(), torch.cat((values[:1], values[:count]))[1:]
    assert torch.equal(digest(tensor), digest(shifted))
    for place in {0, count // 2, count - 1}:
        other = tensor.clone()
        flip(other, place)
        assert not torch.equal(digest(tensor), digest(other))
    for one, two in {(0, 1), (0, count // 2), (0, count - 1), (count // 3, count - 2)}:
        other = tensor.clone()
        other[[one % count, two % count]] = tensor[[two % count, one % count]]
        assert torch.equal(digest(tensor), digest(other)) == (one % count == two % count)


@pytest.mark.unit
@pytest.mark.parametrize("other", [4, 4 * 4096, 4 * 4097])
def test_digests_tell_signs_in_other_places_apart(other: int) -> None:
    """In the highest bit of a word of 64 bits: of the same row, of the same column, of neither."""
    tensor = torch.ones(4096 * 4 * 3, dtype=torch.bfloat16)
    swapped = tensor.clone()
    tensor[3], swapped[3 + other] = -1, -1
    assert not torch.equal(digest(tensor), digest(swapped))


@pytest.mark.numerics
def test_everything_has_the_same_bits_on_a_cpu() -> None:
    found = points("attention", "products", "norms", "embedding", "block", "session:", "hand-overs")
    assert set(found) - {"attention, math", "attention, flash_attention", *IMPOSSIBLE} == set(reproducible.CASES) - {
        "session, deterministic"}
    assert {name for name, point in found.items() if "error" in point} == IMPOSSIBLE
    done = [point for name, point in found.items() if name not in IMPOSSIBLE]
    assert {point["different"] for point in done} == {0}
    assert {point["repetitions"] for point in done if "seconds" in point} == {9}  # blocks in three steps
    assert {point["repetitions"] for point in done if "step_s" in point} == {3}
    assert "Attention" in found["attention"]["chosen"]
    handed = [point for name, point in found.items() if name.startswith("hand-overs")]
    assert all(point["moved"] and point["compared"] > 100 for point in handed)
    report = {"points": list(found.values()), "command": "x", "gpu": None, "host": {"cpu": {"model": "a processor"}},
              "torch": "2"}
    lines = exactness.reproducible_lines(report)
    assert len([line for line in lines if line.endswith(("| 0 of 3 | |", "| 0 of 9 | |"))]) == len(done)


@pytest.mark.e2e
def test_a_session_runs_with_deterministic_algorithms(tmp_path: Path) -> None:
    target = tmp_path / "reproducible.json"
    command = [sys.executable, "-m", "benchmarks.exactness.reproducible", *SHAPE, "--only", "session, deterministic",
               "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(180), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (point,) = json.loads(target.read_text())["points"]
    assert point["different"] == 0 and point["repetitions"] == 3


@pytest.mark.unit
def test_a_product_that_differs_once_is_named(monkeypatch) -> None:
    real, linears = Pieces.products, 7  # of one block

    def products(self: Pieces) -> Work:
        work = real(self)
        at_call(F, "linear", 2 * linears + 1, lambda result, *_: flip(result, 5), monkeypatch)
        return work

    monkeypatch.setattr(Pieces, "products", products)
    point = points("products")["products"]
    assert point["different"] == 1
    assert {name: one["elements"] for name, one in point["tensors"].items()} == {"self_attn.k_proj, output": 1}


@pytest.mark.numerics
def test_a_gradient_that_differs_is_named_with_its_unit(monkeypatch) -> None:
    def change(result: None, gradients: Any, unit: Any, grad: Tensor, parts: list[Tensor]) -> None:
        assert unit.name == "block.1"
        flip(grad, unit.params[2].offset + 3)

    units = 5  # in backward order: after the blocks, three blocks, before the blocks
    at_call(Gradients, "collect", 2 * units + 2, change, monkeypatch)
    point = points("session: all in")["session: all in GPU memory"]
    (name, one), = [item for item in point["tensors"].items() if item[0] != "grad_norm"]
    assert name.startswith("gradient of block.1: ") and (one["times"], one["elements"]) == (1, 1)
    assert point["begins"] == {"repetition": 2, "loss_differs": False, "tensor": name}


@pytest.mark.numerics
def test_a_forward_pass_that_differs_is_told_from_a_backward_pass(monkeypatch) -> None:
    session = "session: states in DRAM, block inputs there"
    runs = 2 * 3  # of a block in each step
    real, calls = Parts.block, []

    def block(self: Parts, index: int, hidden: Tensor, *rest: Any) -> Tensor:
        output = real(self, index, hidden, *rest)
        calls.append(index)
        if len(calls) == trials + runs + 2:  # the second block of the second step's forward pass
            assert index == 1
            flip(output, 7)
        return output

    monkeypatch.setattr(Parts, "block", block)
    trials = 10**6
    points(session)
    trials = len(calls) - 4 * runs
    calls.clear()
    point = points(session)[session]
    assert point["different"] == 1 and point["begins"]["loss_differs"]
    assert point["begins"]["repetition"] == 1
    assert point["begins"]["tensor"] == "input of block.2, micro-batch 0, tensor 0"


@pytest.mark.numerics
def test_a_slot_written_over_while_it_is_used_is_noticed(monkeypatch) -> None:
    real_get, real_block, uses = Streamer.get, Parts.block, []

    def get(self: Streamer, key: tuple, name: str) -> Tensor:
        uses.append(name)
        return real_get(self, key, name)

    def block(self: Parts, index: int, *rest: Any) -> Tensor:
        output = real_block(self, index, *rest)
        if uses.count("block.0") == 5 and not done:  # forward of the third step
            flip(next(self.blocks[0].parameters()))
            done.append(index)
        return output

    done: list[int] = []
    monkeypatch.setattr(Streamer, "get", get)
    monkeypatch.setattr(Parts, "block", block)
    case = "hand-overs: states in DRAM, insides kept there"
    point = points(case)[case]
    assert done == [0] and point["different"] == 1
    # The slot is kept over the turn.
    assert point["begins"] == {"repetition": 2, "tensor": "weights of block.0", "places": [
        ["at the begin of a use", "in DRAM"], ["at the end of a use", "at the begin of a use", "at the end of a use"]]}


@pytest.mark.numerics
def test_a_gradient_that_changes_on_its_way_is_noticed(monkeypatch) -> None:
    at_call(Gradients, "move", 1, lambda moved, *_: flip(moved.host), monkeypatch)
    case = "hand-overs: states in DRAM, updated early"
    point = points(case)[case]
    assert point["different"] == 1 and point["begins"]["places"] == [["computed"], ["in DRAM"]]
    assert point["begins"]["tensor"].startswith("gradient of block.2: ")
