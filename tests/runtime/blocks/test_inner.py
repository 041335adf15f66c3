"""What is kept of the inside of blocks changes no bit; it saves the work it should, and takes the
memory that its plan says."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ratel.errors import RatelError
from ratel.planner.activation_policy import kept_by_choice
from ratel.planner.block_profile import BlockProfile, Inner
from ratel.planner.work import Buffers
from ratel.runtime.blocks import runs as block_runs
from ratel.runtime.blocks.runs import BlockRuns
from ratel.runtime.session.preparing import ready_for
from ratel.runtime.session.session import Session
from ratel.units import GIB
from tests.memory.test_memory_contract import measures
from tests.support.families import CAUSAL, batches, build, llama, loss_fn_of
from tests.runtime.blocks.inner import DEVICES, OWN, data_of, everything_again, make, train
from tests.support.sessions import assert_same

FAMILIES = [*CAUSAL, "patches", "gpt2-dropout", *OWN]
ONE_EACH = Buffers(weight_slots=1, grad_slots=1, host_weight_slots=1, host_grad_slots=1, ring_slots=1,
                   chunk_elements=2048, checkpoint_slots=1, inner_slots=1)
SCATTERED = {"block.*": "dram", "block.1": {"*": "ssd"}, "block.0": "recompute", "block.2": "gpu"}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


# --- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_choice_changes_a_bit(family: str, dtype: str, device: str, ssd_dir: Path) -> None:
    """In fp32 what is kept differs by its size alone: the scattered choice sends it all four
    ways."""
    with everything_again():
        expected = train(family, ssd_dir, device, dtype=dtype)
    for choice in ("recompute", "gpu", "dram", "ssd", SCATTERED) if dtype == "bf16" else ("recompute", SCATTERED):
        assert_same(train(family, ssd_dir, device, dtype=dtype, activations=choice), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows, micro_batch", [(3, 3), (5, 2)], ids=["one micro-batch", "three, the last smaller"])
@pytest.mark.parametrize("family", ["llama", "gpt2-dropout", "in place"])
def test_micro_batches_do_not_mix(family: str, rows: int, micro_batch: int, device: str, ssd_dir: Path) -> None:
    shape = dict(rows=rows, micro_batch=micro_batch, steps=3)
    with everything_again():
        expected = train(family, ssd_dir, device, **shape)
    for choice in ("recompute", "gpu", "ssd"):
        assert_same(train(family, ssd_dir, device, activations=choice, checkpoint_tier="dram", **shape), expected)
    assert_same(train(family, ssd_dir, device, activations="ssd", buffers=ONE_EACH, tier="ssd", checkpoint_tier="ssd",
                      **shape), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_random_delays_at_every_hand_over(seed: int, device: str, ssd_dir: Path) -> None:
    family = ("llama", "dropout")[seed % 2]
    shape = dict(rows=5, steps=2)
    expected = train(family, ssd_dir, device, **shape)
    for choice, options in (("dram", {}), ("ssd", dict(buffers=ONE_EACH, tier="ssd")), (SCATTERED, dict(tier="ssd"))):
        delayed = dict(delay_s=0.004, seed=seed, checkpoint_tier="ssd", activations=choice, **options)
        assert_same(train(family, ssd_dir, device, **shape, **delayed), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_other_shapes_are_run_again_in_full_at_first(device: str, ssd_dir: Path) -> None:
    """Fewer rows, fewer positions: learned when they first come, kept from then on. The plan has
    room for these."""
    def losses(choice: str) -> list[float]:
        with Session(build("llama"), lr=1e-3, device=device, ssd=ssd_dir, micro_batch=2, activations=choice,
                     gpu_memory="4GiB" if device == "cuda" else None) as session:
            long = batches("llama", 3)
            short = [{name: t[:3, :12] for name, t in batch.items()} for batch in batches("llama", 3, seed=9)]
            return [session.step(batch).loss for pair in zip(long, short) for batch in pair]

    with everything_again():
        expected = losses("recompute")
    assert losses("ssd") == losses("dram") == losses("recompute") == expected


# --- the work saved -------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the matrix products that are really made, by the shapes of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func._schema.name.partition("::")[2] in PRODUCTS:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            self.made[tuple(left.shape), tuple(right.shape)] += 1
        elif "scaled_dot_product" in func._schema.name:
            self.made["sdpa"] += 1
        return func(*args, **(kwargs or {}))


def products_of(choice: Any, monkeypatch: pytest.MonkeyPatch, family: str = "llama") -> Counter:
    """Made by the second run of block 1 in one step of one micro-batch."""
    products, second = Products(), BlockRuns.second

    def counted(self: BlockRuns, block: int, micro_batch: int, *args: Any) -> Tensor:
        with products if block == 1 and measuring else nullcontext():
            return second(self, block, micro_batch, *args)

    model, loss_fn = make(family)
    measuring = False
    with monkeypatch.context() as patch:
        patch.setattr(BlockRuns, "second", counted)
        with Session(model, loss_fn=loss_fn, device="cpu", dtype="bf16", micro_batch=4, activations=choice) as session:
            (batch,) = data_of(family, 1, 4)
            ready_for(session._core, batch)
            measuring = True
            session.step(batch)
    return products.made


@pytest.mark.numerics
def test_the_last_product_of_a_block_is_never_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    down = ((4 * 16, 48), (48, 32))
    with everything_again():
        full = products_of("recompute", monkeypatch)
    assert full[down] == 1 and full.total() == 8
    assert products_of("recompute", monkeypatch) == full - Counter({down: 1})


@pytest.mark.numerics
def test_what_is_kept_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again = products_of("recompute", monkeypatch)
    wide = ((4 * 16, 32), (32, 48))
    assert products_of({"*": {"mlp.up_proj": "gpu"}}, monkeypatch) == again - Counter({wide: 1})
    assert products_of({"*": {"mlp.*": "gpu", "sdpa": "gpu"}}, monkeypatch) == again - Counter({wide: 2, "sdpa": 1})
    assert not products_of("gpu", monkeypatch)
    assert products_of("gpu", monkeypatch, "routing").total() == 3  # the router and two experts, whatever is asked for


@pytest.mark.numerics
def test_a_profile_says_what_a_llama_block_could_keep() -> None:
    with Session(build("llama"), device="cpu", dtype="bf16", micro_batch=2) as session:
        profile = session.prepare(4, 16).profiles[0]
    sizes = {"self_attn.q_proj": 32, "self_attn.k_proj": 32, "self_attn.v_proj": 32, "sdpa": 32 + 2 * 2,
             "self_attn.o_proj": 32, "mlp.gate_proj": 48, "mlp.up_proj": 48}
    assert {inner.name: inner.row_bytes for inner in profile.inner} == {name: 16 * 2 * n for name, n in sizes.items()}
    tokens, weights = 16, 4 * 32 * 32 + 3 * 32 * 48
    assert profile.forward_flops == 2 * tokens * weights + 4 * tokens * tokens * 32
    assert profile.recompute_flops == profile.forward_flops - 2 * tokens * 32 * 48
    assert sum(inner.row_flops for inner in profile.inner) == profile.recompute_flops


@pytest.mark.numerics
@pytest.mark.parametrize("family, alike", [("gemma2", [0, 1, 0, 1]), ("llama", [0, 0, 0, 0])])
def test_blocks_of_one_kind_are_learned_once(family: str, alike: list[int]) -> None:
    """In Gemma 2 every second block has a sliding window."""
    with Session(build(family), device="cpu") as session:
        runs = BlockRuns(session.parts)
        assert [runs.first_alike(block) for block in range(4)] == alike
        assert len({id(profile) for profile in session.prepare(2, 16).profiles}) == len(set(alike))


# --- choices ----------------------------------------------------------------------------------------------------------

PROFILES = tuple(BlockProfile(forward_flops=2.0, recompute_flops=1.0, inner=inner) for inner in (
    (Inner(name="q", row_bytes=8, row_flops=1.0), Inner(name="sdpa", row_bytes=8, row_flops=1.0)), (),
    (Inner(name="q", row_bytes=8, row_flops=1.0),)))


@pytest.mark.unit
@pytest.mark.parametrize("choice, expected", [
    ("recompute", ((), (), ())),
    ("auto", ((), (), ())),
    ("ssd", ((("q", "ssd"), ("sdpa", "ssd")), (), (("q", "ssd"),))),
    ({"*": {"q": "dram"}, "block.2": "gpu"}, ((("q", "dram"),), (), (("q", "gpu"),))),
    ({"block.0": {"*": "gpu", "s*": "recompute"}}, ((("q", "gpu"),), (), ())),
])
def test_forced_choices(choice: Any, expected: tuple) -> None:
    assert kept_by_choice(PROFILES, choice) == expected


@pytest.mark.unit
@pytest.mark.parametrize("choice, message", [
    ("disk", "not a place for activations"), ({"*": {"q": "hbm"}}, "not a place for activations"),
    ({"block.3": "gpu"}, "no block of the model"), ({"block.*": {"mlp": "gpu"}}, "no inner activation of these blocks"),
    ({"block.1": {"q": "gpu"}}, "no inner activation of these blocks"), ({"*": 3}, "not a place for activations"),
])
def test_wrong_choices_are_refused(choice: Any, message: str) -> None:
    with pytest.raises(RatelError, match=message) as refusal:
        kept_by_choice(PROFILES, choice)
    assert refusal.value.field == "activations"


@pytest.mark.numerics
def test_ssd_needs_a_directory() -> None:
    with Session(llama(), device="cpu", activations="ssd") as session:
        with pytest.raises(RatelError, match="no directory was given"):
            session.prepare(2, 16)
    with pytest.raises(RatelError, match="not one of the choices"):
        Session(llama(), device="cpu", activations="disk")


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.numerics
@pytest.mark.parametrize("tier", ["gpu", "dram", "ssd"])
def test_a_plan_counts_what_is_kept(tier: str, ssd_dir: Path) -> None:
    """4 blocks, 2 micro-batches of 2 rows. The machinery asserts that the arena is laid out to the
    byte."""
    plans = {}
    for choice in ("recompute", tier):
        with Session(build("llama"), device="cpu", ssd=ssd_dir, tier="dram", micro_batch=2, activations=choice,
                     buffers=replace(Buffers(), inner_slots=3)) as session:
            plans[choice] = session.prepare(4, 16)
    group = sum(2 * inner.row_bytes for inner in plans[tier].profiles[0].inner)
    together = sum(-(-2 * inner.row_bytes // 256) * 256 for inner in plans[tier].profiles[0].inner)
    paged = -(-together // 4096) * 4096
    found = [{name: num_bytes for name, num_bytes in getattr(plans[tier], items).items() if "inner" in name}
             for items in ("gpu_items", "dram_items", "ssd_items")]
    away = {"inner activation slots": 3 * together, "inner activations on their way out": 3 * together}
    assert found == {"gpu": [{"inner activations kept": 4 * 2 * group}, {}, {}],
                     "dram": [away, {"inner activations": 4 * 2 * paged}, {}],
                     "ssd": [away, {"inner activation slots": 2 * 3 * paged},
                             {"inner activations": 4 * 2 * paged}]}[tier]
    assert not any("inner" in name for name in plans["recompute"].host_items)


def runs(device: str, ssd: Path, **options: Any) -> list[dict[str, Any]]:
    """Measures of training with each choice, of 2048 tokens at once: narrow blocks, which hold much
    for what they compute."""
    base = dict(layers=2, steps=1, width=192, rows=16, positions=256, micro_batch=8, tier="dram", device=device, ssd=str(ssd),
                **options)
    return measures([{**base, "activations": choice} for choice in ("recompute", "gpu", "dram", "ssd")])


@pytest.mark.e2e
def test_no_choice_takes_more_memory_than_its_plan_says(ssd_dir: Path) -> None:
    """On a CPU device all of it is DRAM: 65 MB more in the plan, and in the peak."""
    found = runs("cpu", ssd_dir, dtype="fp32")
    for run in found:
        assert run["peak_bytes"] <= run["dram_bytes"]
    assert len({tuple(run["losses"]) for run in found}) == 1
    assert found[1]["items"]["device: inner activations kept"] == found[2]["items"]["inner activations"] > 65e6
    assert found[1]["peak_bytes"] > found[0]["peak_bytes"] + 30e6


@pytest.mark.gpu
def test_no_choice_takes_more_gpu_memory_than_its_plan_says(ssd_dir: Path) -> None:
    found = runs("cuda", ssd_dir, gpu_memory="4GiB")
    for run in found:
        assert run["gpu_allocated_bytes"] <= run["gpu_bytes"] <= 4 * GIB
    assert len({tuple(run["losses"]) for run in found}) == 1


@pytest.mark.numerics
def test_a_block_that_cannot_be_followed_for_want_of_memory_is_run_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a smaller micro-batch of the same blocks is followed as ever."""
    real, losses = block_runs.trace, []

    def no_room(run: Callable, *args: object, **options: object) -> object:
        raise torch.OutOfMemoryError("for a test")

    for trace in (real, no_room):
        monkeypatch.setattr(block_runs, "trace", trace)
        with Session(build("llama"), loss_fn=loss_fn_of("llama"), device="cpu", lr=1e-3) as session:
            losses.append([session.step(batch).loss for batch in batches("llama", 3)])
            assert bool(session.plan.profiles[0].inner) == (trace is real)
    assert losses[0] == losses[1]
