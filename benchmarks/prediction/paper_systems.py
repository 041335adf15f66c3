"""Plans of two systems for one model and batch: what the paper's system did, and what Ratel as
built here does."""

from dataclasses import replace

from benchmarks.prediction.paper_figures import SEQ_LEN, SHAPES, VOCAB
from ratel.planner.block_profile import BlockProfile, Inner
from ratel.planner.forecast.cost import Prediction, predict
from ratel.planner.formats import BACKWARD, BF16, EXACT, FORWARD, FP32, StateFormats
from ratel.planner.machine.hardware import Hardware
from ratel.planner.placement import DRAM, GPU, SSD, UnitPlacement
from ratel.planner.plan import Plan
from ratel.planner.shape import UNIT_ALIGN, ModelSpec, ParamSpec, StageSpec, lay_out
from ratel.planner.traffic import activation_traffic
from ratel.planner.work import Buffers, Work
from ratel.units import align_up

WORKSPACE_BYTES = 20
"""GPU memory per token and hidden channel while one block runs backward. More, and 276B at batch 12
or 135B at batch 36 would not fit 24 GB as they do in the paper; 175B at batch 32 must not."""

DRAM_SHARE = 0.9
"""The share of the machine's DRAM that is used; the rest is the system's."""

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the blocks that keep one more kind of activation: the steps in which the convex rule
searches."""


FP32_MASTER = StateFormats(name="fp32 master", compute=BF16, update="adamw", rows=tuple(
    replace(row, encoding=FP32) if row.plane == "lo" else replace(row, read=(FORWARD, BACKWARD)) if row.plane == "hi" else row
    for row in EXACT["bf16"].rows))
"""14 bytes of states per parameter: the fp16 weights beside a whole fp32 master, where Ratel has
the halves of one.

The optimizer then reads 12 bytes and writes 14, and a step moves 2 + 2 + 12 + 14 = 30 bytes per
parameter.
"""


def gpt(name: str) -> ModelSpec:
    layers, hidden = SHAPES[name]
    kinds = ["pre", *["block"] * layers, "post"]
    units = tuple(lay_out(i, f"{kind}.{i}", kind, _params(kind, i, hidden)) for i, kind in enumerate(kinds))
    stages = tuple(StageSpec(index=u.index, name=u.name, kind=u.kind, units=(u.index,)) for u in units)
    return ModelSpec(name=name, units=units, stages=stages, hidden_size=hidden, vocab_size=VOCAB, max_seq_len=SEQ_LEN)


def _params(kind: str, index: int, hidden: int) -> list[ParamSpec]:
    shapes = {"pre": {"embedding": (VOCAB + SEQ_LEN, hidden)}, "post": {"head": (VOCAB, hidden)},
              "block": {"qkv": (hidden, 3 * hidden), "proj": (hidden, hidden), "up": (hidden, 4 * hidden),
                        "down": (4 * hidden, hidden), "vectors": (13 * hidden,)}}[kind]
    return [ParamSpec(name=f"{index}.{name}", shape=shape) for name, shape in shapes.items()]


def profile(hidden: int) -> BlockProfile:
    """A GPT-2 block; bytes of fp16 outputs and FLOPs that made them, in the order of FLOPs per
    byte."""
    tokens = SEQ_LEN
    kinds = {"down": (2, 8 * hidden), "proj": (2, 2 * hidden), "qkv": (6, 6 * hidden), "up": (8, 8 * hidden),
             "sdpa": (2, 2 * SEQ_LEN)}
    inner = tuple(Inner(name=name, row_bytes=tokens * hidden * size, row_flops=float(tokens * hidden * flops))
                  for name, (size, flops) in kinds.items())
    flops = sum(i.row_flops for i in inner)
    return BlockProfile(forward_flops=flops, recompute_flops=flops, inner=inner)


def theirs(spec: ModelSpec, batch: int, *, tier: str = DRAM) -> Plan:
    """All states on SSD, eager updates, one micro-batch; a chunk is a layer, and a few layers are
    buffered."""
    block = max(u.num_elements for u in spec.units if u.kind == "block")
    buffers = Buffers(weight_slots=2, grad_slots=2, host_weight_slots=3, host_grad_slots=3, ring_slots=5,
                      checkpoint_slots=2, chunk_elements=align_up(block, UNIT_ALIGN))
    return _plan(spec, batch, batch, tier, buffers, "eager", UnitPlacement.all_on(SSD), FP32_MASTER)


def ours(spec: ModelSpec, batch: int, hardware: Hardware, *, deferred: bool) -> Plan:
    """Ratel: states on SSD but for the planes that DRAM holds, and micro-batches and slots that fit
    the GPU."""
    plan = _fitting(spec, batch, hardware, "deferred" if deferred else "eager")
    for plane in ("hi", "g", "lo", "m", "v"):
        placements = tuple(replace(place, **{plane: DRAM}) for place in plan.placements)
        fuller = replace(plan, placements=placements)
        if fuller.dram_bytes <= DRAM_SHARE * hardware.dram_bytes:
            plan = fuller
    return plan


def _fitting(spec: ModelSpec, batch: int, hardware: Hardware, optimizer: str) -> Plan:
    for micro_rows in (16, 8, 4, 2, 1):
        for slots in (3, 2):
            plan = _plan(spec, batch, min(batch, micro_rows), DRAM, Buffers(weight_slots=slots), optimizer,
                         UnitPlacement.all_on(SSD))
            if plan.gpu_bytes <= hardware.gpu_bytes:
                return replace(plan, profiles=(_without_last(plan.profiles[0]),) * len(plan.profiles))
    raise AssertionError(f"{spec.name} does not fit the GPU")


def _without_last(kind: BlockProfile) -> BlockProfile:
    """Ratel does not run a block's last product again: it makes the block's output, which backward
    does not need."""
    last = kind.inner[0]
    return replace(kind, recompute_flops=kind.recompute_flops - last.row_flops, inner=kind.inner[1:])


def _plan(spec: ModelSpec, batch: int, micro_rows: int, tier: str, buffers: Buffers, optimizer: str,
          place: UnitPlacement, formats: StateFormats = EXACT["bf16"]) -> Plan:
    hidden, blocks = spec.hidden_size, sum(u.kind == "block" for u in spec.units)
    work = Work(rows=batch, seq_len=SEQ_LEN, micro_rows=micro_rows, hidden_bytes=2 * micro_rows * SEQ_LEN * hidden)
    kinds = (profile(hidden),) * blocks
    return Plan(spec=spec, formats=formats, optimizer=optimizer, placements=(place,) * len(spec.units),
                checkpoint_tiers=(tier,) * (blocks - 1) + (GPU,), work=work, buffers=buffers, profiles=kinds,
                kept=((),) * blocks, workspace_bytes=WORKSPACE_BYTES * micro_rows * SEQ_LEN * hidden)


def with_best_swap(plan: Plan, hardware: Hardware) -> tuple[Plan, Prediction]:
    """Their rule: swap activations in the order of FLOPs per byte while the predicted step becomes
    shorter.

    They go to DRAM as far as it holds them, to SSD beyond.
    """
    best = _overflowing(plan, hardware)
    found = predict(best, hardware)
    blocks = len(plan.checkpoint_tiers)
    names = [i.name for i in plan.profiles[0].inner]
    for count in range(1, len(names) + 1):
        for share in SHARES[1:]:
            more = round(share * blocks)
            kept = tuple(tuple((n, DRAM) for n in names[: count if b < more else count - 1]) for b in range(blocks))
            candidate = _overflowing(replace(plan, kept=kept), hardware)
            prediction = predict(candidate, hardware)
            if prediction.step_s < found.step_s:
                best, found = candidate, prediction
    return best, found


def _overflowing(plan: Plan, hardware: Hardware) -> Plan:
    """Blocks whose activations DRAM has no room for send them to SSD; the first blocks' wait
    longest and go first."""
    without = replace(plan, checkpoint_tiers=(GPU,) * len(plan.checkpoint_tiers))
    room = DRAM_SHARE * hardware.dram_bytes - without.arena_bytes
    tiers, kept = list(plan.checkpoint_tiers), list(plan.kept)
    for block in reversed(range(len(tiers) - 1)):
        room -= activation_traffic(plan, block, plan.work.rows).d2h
        if room < 0:
            tiers[block], kept[block] = SSD, tuple((name, SSD) for name, _ in kept[block])
    return replace(plan, checkpoint_tiers=tuple(tiers), kept=tuple(kept))


def gpu_bytes(plan: Plan) -> int:
    """What theirs takes on the GPU: embedding and head, smaller than a block, pass through the
    blocks' slots."""
    return sum(num_bytes for name, num_bytes in plan.gpu_items.items() if "(ends)" not in name)


def swapped_bytes(plan: Plan) -> int:
    return sum(activation_traffic(plan, block, plan.work.rows).d2h for block in range(len(plan.checkpoint_tiers)))
