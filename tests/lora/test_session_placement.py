"""Where a base and its adapter live, and when bytes arrive, changes no bit of what is trained."""

from typing import Any

import pytest
import torch

from ratel.lora.describe.config import LoraConfig
from ratel.memory import jitter
from ratel.planner.schedule import gathers
from ratel.runtime.session.session import Session
from tests.support.families import batches, build
from tests.support.late_lanes import late_lanes
from tests.support.sessions import MANY, MIXED, SMALL, assert_same

DEVICES = [pytest.param("cpu", marks=pytest.mark.numerics), pytest.param("cuda", marks=pytest.mark.gpu)]
VARIANTS: dict[str, dict[str, Any]] = {
    "gpu": dict(tier="gpu"),
    "ssd": dict(tier="ssd"),
    "mixed": dict(placement=MIXED),
    "ssd, one of each buffer": dict(tier="ssd", buffers=SMALL, checkpoint_tier="ssd"),
    "ssd, many buffers": dict(tier="ssd", buffers=MANY, checkpoint_tier="dram"),
    "threads": dict(tier="ssd", io_backend="threads", optimizer_threads=3),
    "kept in DRAM": dict(tier="dram", activations="dram"),
    "kept on SSD": dict(tier="ssd", activations="ssd"),
    "spilled": dict(tier="dram", activations="spill"),
    "deferred": dict(tier="ssd", optimizer="deferred"),
}


def run(ssd: Any, device: str, *, delay_s: float = 0.0, seed: int = 0, **options: Any) -> tuple[list, dict[str, torch.Tensor]]:
    directories = options.pop("directories", [ssd])
    with jitter.injected(delay_s, seed=seed):
        lora = LoraConfig(rank=4, dropout=0.2, full=("lm_head",))
        with Session(build("llama"), lora=lora, lr=1e-3, weight_decay=0.1, device=device, dtype="bf16", ssd=directories, max_grad_norm=0.5,
                     gpu_memory="4GiB" if device == "cuda" else None, **{"micro_batch": 2, **options}) as session:
            outs = [session.step(batch) for batch in batches("llama", 4)]
            states = {f"{unit.name}.{plane}": session.read_state(unit, plane) for unit in session.plan.spec.units
                      if unit.num_trainable for plane in ("hi", "lo", "m", "v")}
    assert len(states) > 4
    return [(out.loss, out.grad_norm) for out in outs], states


@pytest.mark.parametrize("device", DEVICES)
def test_every_placement_gives_the_same_bits(device: str, ssd_dir) -> None:
    expected = run(ssd_dir, device, tier="dram")
    for name, options in VARIANTS.items():
        assert_same(run(ssd_dir, device, **options), expected), name


@pytest.mark.parametrize("device", DEVICES)
def test_stripes_give_the_same_bits(device: str, ssd_dir, tmp_path) -> None:
    assert_same(run(ssd_dir, device, tier="ssd", directories=[ssd_dir, tmp_path / "b", tmp_path / "c"]), run(ssd_dir, device, tier="dram"))


@pytest.mark.parametrize("device", DEVICES)
def test_delays_at_every_hand_over_change_nothing(device: str, ssd_dir) -> None:
    expected = run(ssd_dir, device, tier="dram")
    for seed, name in enumerate(("ssd, one of each buffer", "mixed", "kept on SSD")):
        assert_same(run(ssd_dir, device, delay_s=0.004, seed=seed, **VARIANTS[name]), expected), name


@pytest.mark.numerics
def test_late_lanes_change_nothing(monkeypatch: pytest.MonkeyPatch, ssd_dir) -> None:
    expected = run(ssd_dir, "cpu", tier="dram")
    with late_lanes(monkeypatch) as made:
        assert_same(run(ssd_dir, "cpu", tier="ssd", buffers=SMALL, checkpoint_tier="ssd"), expected)
    assert made and not [violation for lanes in made for violation in lanes.violations]


@pytest.mark.numerics
def test_micro_batches_draw_the_same_masks(ssd_dir) -> None:
    """In fp32, where sums over micro-batches differ by rounding alone: other masks would change a
    loss in its second digit."""
    losses = [[loss for loss, _ in run(ssd_dir, "cpu", tier="dram", micro_batch=rows)[0]] for rows in (1, 2, 4)]
    for other in losses[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(losses[0]), rtol=2e-3, atol=2e-3)


@pytest.mark.numerics
def test_a_frozen_embedding_comes_once_a_step(ssd_dir) -> None:
    """Backward ends at the first block: nothing before it is trained."""
    with Session(build("llama"), lora=4, device="cpu", dtype="bf16", tier="dram", micro_batch=2, max_grad_norm=0) as session:
        session.step(batches("llama", 1)[0])
        names = [session.plan.spec.units[gather.unit].name for gather in gathers(session.plan, training=True) if gather.is_unit]
    assert names.count("pre") == 1 and names.count("block.0") == 2
