"""Where bytes live, how many buffers carry them and when they arrive changes no bit of a result."""

import random

import pytest
import torch

from ratel.memory import jitter
from ratel.planner.work import Buffers
from ratel.runtime.session.session import Session
from tests.support.families import CAUSAL, batches, build, loss_fn_of
from tests.support.sessions import MANY, MIXED, SMALL, assert_same

STEPS = 4
DEVICES = [pytest.param("cpu", marks=pytest.mark.numerics), pytest.param("cuda", marks=pytest.mark.gpu)]
def run(family: str, ssd, device: str, *, clip: float = 0.5, dtype: str = "bf16", delay_s: float = 0.0, seed: int = 0,
        steps: int = STEPS, **options) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    directories = options.pop("directories", [ssd])
    with jitter.injected(delay_s, seed=seed):
        with Session(build(family), loss_fn=loss_fn_of(family), lr=1e-3, weight_decay=0.1, device=device, dtype=dtype,
                     ssd=directories, max_grad_norm=clip, gpu_memory="4GiB" if device == "cuda" else None,
                     **{"micro_batch": 2, **options}) as session:
            outs = [session.step(batch) for batch in batches(family, steps)]
            states = session.state_dict()
            for unit in session.plan.spec.units:
                if unit.num_trainable:
                    states |= {f"{unit.name}.{plane}": session.read_state(unit, plane) for plane in ("m", "v")}
    return [(out.loss, out.grad_norm) for out in outs], states


ENGINES = {
    "threads": dict(tier="ssd", io_backend="threads", optimizer_threads=3),
    "io_uring": dict(tier="ssd", io_backend="io_uring", optimizer_threads=1),
}
"""They move bytes, whatever the model is: one family shows them."""
VARIANTS = {
    "gpu": dict(tier="gpu"),
    "ssd": dict(tier="ssd"),
    "mixed": dict(placement=MIXED),
    "ssd, one of each buffer": dict(tier="ssd", buffers=SMALL, checkpoint_tier="ssd"),
    "ssd, many buffers, checkpoints in DRAM": dict(tier="ssd", buffers=MANY, checkpoint_tier="dram"),
    "mixed, one of each buffer": dict(placement=MIXED, buffers=SMALL, checkpoint_tier="dram"),
    "dram, checkpoints on SSD": dict(tier="dram", checkpoint_tier="ssd", buffers=MANY),
    **ENGINES,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "patches"])
def test_every_placement_gives_the_same_bits(family: str, device: str, ssd_dir) -> None:
    expected = run(family, ssd_dir, device, tier="dram")
    variants = VARIANTS if family == "llama" else {name: VARIANTS[name] for name in VARIANTS if name not in ENGINES}
    for name, options in variants.items():
        assert_same(run(family, ssd_dir, device, **options), expected), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", [f for f in CAUSAL if f not in ("llama", "llama-tied")])
def test_every_family_gives_the_same_bits(family: str, device: str, ssd_dir) -> None:
    expected = run(family, ssd_dir, device, tier="dram", steps=2)
    assert_same(run(family, ssd_dir, device, placement=MIXED, buffers=SMALL, checkpoint_tier="ssd", steps=2), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_stripes_change_nothing(device: str, ssd_dir) -> None:
    directories = [ssd_dir / name for name in "abc"]
    expected = run("llama", ssd_dir, device, tier="dram")
    assert_same(run("llama", ssd_dir, device, tier="ssd", directories=directories), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tier", ["gpu", "dram", "ssd"])
def test_eager_equals_deferred_without_clipping(tier: str, device: str, ssd_dir) -> None:
    expected = run("llama", ssd_dir, device, tier="dram", clip=0, optimizer="deferred")
    assert_same(run("llama", ssd_dir, device, tier=tier, clip=0, optimizer="eager", checkpoint_tier="dram"), expected)
    assert_same(run("llama-tied", ssd_dir, device, tier=tier, clip=0, optimizer="eager", buffers=SMALL),
                run("llama-tied", ssd_dir, device, tier="dram", clip=0, optimizer="deferred"))


@pytest.mark.parametrize("device", DEVICES)
def test_fp32_compute_on_every_tier(device: str, ssd_dir) -> None:
    expected = run("llama", ssd_dir, device, tier="dram", dtype="fp32")
    for options in (dict(tier="gpu"), dict(tier="ssd", buffers=SMALL), dict(placement=MIXED)):
        assert_same(run("llama", ssd_dir, device, dtype="fp32", **options), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(6))
def test_random_delays_at_every_hand_over(seed: int, device: str, ssd_dir) -> None:
    """Each seed is another placement, mode and set of delays; a missing event or wait shows as
    another bit."""
    draw = random.Random(seed)
    clip = draw.choice([0.0, 0.5])
    family = draw.choice(["llama", "llama-tied"])
    expected = run(family, ssd_dir, device, tier="dram", clip=clip, optimizer="deferred", steps=3)
    for _ in range(2):
        options = dict(placement=draw.choice([{"*": "ssd"}, MIXED, {"*": "dram"}, {"*": "gpu", "block.0": "ssd"}]),
                       buffers=draw.choice([SMALL, MANY, Buffers()]), checkpoint_tier=draw.choice(["gpu", "dram", "ssd"]),
                       optimizer=draw.choice(["eager", "deferred"]) if clip == 0 else "deferred")
        delay_s = draw.choice([0.002, 0.01])
        assert_same(run(family, ssd_dir, device, clip=clip, delay_s=delay_s, seed=seed, steps=3, **options), expected)
