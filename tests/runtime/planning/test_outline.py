"""The memory and the FLOPs of a model that is not run, against the same model run: on the CPU, and
once on an H200."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ratel import models
from ratel.errors import RatelError
from ratel.runtime.blocks.batch import Batch
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.planning.outline import Outline
from ratel.runtime.planning.trial import _attach, _trials, try_out
from tests.support.families import CAUSAL

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
ROWS, POSITIONS = 8, 256
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
WIDE = dict(hidden_size=128, intermediate_size=320, num_attention_heads=4, max_position_embeddings=POSITIONS)


def config(family: str, vocab_size: int) -> Any:
    """The family's tiny model, wide enough for activations to outweigh everything else."""
    found = CAUSAL[family]().config
    wide = dict(n_embd=128, n_head=4, n_positions=POSITIONS, n_layer=2) if family == "gpt2" else {
        **{name: value for name, value in WIDE.items() if hasattr(found, name)}, "num_hidden_layers": 2}
    for name, value in {**wide, "vocab_size": vocab_size}.items():
        setattr(found, name, value)
    if getattr(found, "layer_types", None) is not None:
        found.layer_types = found.layer_types[:2]
    return found


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(ROWS, POSITIONS, dtype=torch.long)}


def allocated_peak(parts: models.Parts) -> int:
    """The peak of the trial's runs, as the CPU's allocator counts: with every block run in full,
    less weights."""
    blocks, peaks = BlockRuns(parts), []
    nothing = tuple(() for _ in range(parts.num_blocks))
    with torch.no_grad():
        hidden, inputs = parts.head(batch())
    for run, units in _trials(blocks, Batch.of(parts, batch()), (), nothing):
        for unit in units:
            _attach(parts, unit, CPU)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        held = peak = 0
        for event in sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
                            key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        peaks.append(peak)
        for unit in units:
            parts.parameters.attach(unit.index, None)
            parts.parameters.take_grads(unit.index)
    return max(peaks) + hidden.nbytes + inputs.num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [512, 8000])
@pytest.mark.parametrize("family", CAUSAL)
def test_activations_take_what_the_allocator_hands_out(family: str, vocab_size: int, dtype: torch.dtype) -> None:
    """With the small vocabulary a block has the peak, with the large one the loss. A few scalars
    are not seen."""
    found = Outline(config(family, vocab_size), dtype=dtype, max_seq_len=POSITIONS).micro_batch(ROWS, POSITIONS, on_cuda=False)
    parts = models.load(config(family, vocab_size), dtype=dtype, device=CPU)
    real = allocated_peak(parts)
    assert real - 256 <= found.activation_bytes <= 1.1 * real
    with torch.no_grad():
        assert found.hidden_bytes == parts.head(batch())[0].nbytes


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
def test_blocks_are_profiled_as_where_they_are_trained(family: str) -> None:
    """The same results to keep, with the same bytes and FLOPs, as `try_out` finds by running on
    real tensors."""
    outline = Outline(config(family, 512), dtype=torch.float32, max_seq_len=POSITIONS)
    parts = models.load(config(family, 512), dtype=torch.float32, device=CPU)
    found = outline.micro_batch(ROWS, POSITIONS).profiles
    real = try_out(BlockRuns(parts), [Batch.of(parts, batch())], CPU, "recompute").profiles
    assert len(found) == len(real) == 2
    for ours, theirs in zip(found, real):
        assert [i.name for i in ours.inner] == [i.name for i in theirs.inner]
        assert (ours.forward_flops, ours.recompute_flops) == (theirs.forward_flops, theirs.recompute_flops)
        assert [(i.row_bytes, i.row_flops) for i in ours.inner] == [(i.row_bytes, i.row_flops) for i in theirs.inner]


def test_the_workspace_of_an_h200_is_predicted_from_above_within_10_percent() -> None:
    """Against what CUDA's allocator said in the recorded runs of Llama with 3.0 B parameters."""
    outline = Outline("llama-3b", dtype=torch.bfloat16, max_seq_len=1024)
    runs = json.loads((RESULTS / "h200_step_24gib.json").read_text(encoding="utf-8"))
    measured = {}
    for run in runs:
        work = run["plan"]["work"]
        measured.setdefault(work["micro_rows"], []).append(run["plan"]["gpu_bytes"]["workspace"])
    assert len(measured) >= 3
    for rows, found in measured.items():
        predicted = outline.micro_batch(rows, 1024).workspace_bytes
        assert max(found) <= predicted <= 1.1 * min(found), (rows, predicted, found)


def test_the_largest_preset_takes_no_memory() -> None:
    from ratel.memory.resident import peak_bytes, reset_peak, resident_bytes

    before = resident_bytes()
    reset_peak()
    outline = Outline("gpt-175b", dtype=torch.bfloat16, max_seq_len=1024)
    assert outline.micro_batch(8, 1024).activation_bytes > 4e9
    assert peak_bytes() - before < 1e9


def test_a_sequence_that_is_too_long_is_refused() -> None:
    with pytest.raises(RatelError, match="at most 1024 tokens"):
        Outline("demo", dtype=torch.float32, max_seq_len=4096)
