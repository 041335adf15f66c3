"""Random models, plans and machines for the planner's tests, each determined by a seed."""

import random
from dataclasses import replace

from ratel.planner.formats import FORMATS
from ratel.planner.machine.hardware import Hardware, Ssd
from ratel.planner.placement import forced_placements
from ratel.planner.plan import Plan
from ratel.planner.shape import ModelSpec, ParamSpec, StageSpec, lay_out
from ratel.planner.work import Work

PLANES = ("hi", "lo", "m", "v", "g")
HI_IN_DRAM = {"*": {"hi": "dram", "lo": "ssd", "m": "ssd", "v": "ssd", "g": "dram"}}
STATES_ON_SSD = {"*": {"hi": "ssd", "lo": "ssd", "m": "ssd", "v": "ssd", "g": "dram"}}


def gpt_spec(num_blocks: int, hidden: int, vocab: int = 32000) -> ModelSpec:
    shapes = {"pre": [(vocab, hidden)], "post": [(vocab, hidden)],
              "block": [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]}
    kinds = ["pre", *["block"] * num_blocks, "post"]
    units = tuple(lay_out(i, f"{kind}.{i - 1}" if kind == "block" else kind, kind,
                          [ParamSpec(name=f"{i}.{j}", shape=shape) for j, shape in enumerate(shapes[kind])])
                  for i, kind in enumerate(kinds))
    stages = tuple(StageSpec(index=u.index, name=u.name, kind=u.kind, units=(u.index,)) for u in units)
    return ModelSpec(name="gpt", units=units, stages=stages, hidden_size=hidden, vocab_size=vocab)


def tied_spec(num_blocks: int, hidden: int, *, frozen: bool = False) -> ModelSpec:
    """One embedding for both ends, in a unit that both use; ``frozen``: every third block, and half
    of the others."""
    units = [lay_out(0, "pre", "pre", [ParamSpec(name="positions", shape=(1024, hidden))])]
    for i in range(num_blocks):
        shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
        params = [ParamSpec(name=f"{i}.{j}", shape=shape, trainable=not frozen or (j > 1 and i % 3 > 0))
                  for j, shape in enumerate(shapes)]
        units.append(lay_out(i + 1, f"block.{i}", "block", params))
    units.append(lay_out(num_blocks + 1, "post", "post", [ParamSpec(name="norm", shape=(hidden,))]))
    units.append(lay_out(num_blocks + 2, "shared", "shared", [ParamSpec(name="embedding", shape=(50257, hidden))]))
    shared = units[-1].index
    uses = [(0, shared), *((i + 1,) for i in range(num_blocks)), (num_blocks + 1, shared)]
    stages = tuple(StageSpec(index=i, name=units[i].name, kind=units[i].kind, units=used)
                   for i, used in enumerate(uses))
    return ModelSpec(name="tied", units=tuple(units), stages=stages, hidden_size=hidden, vocab_size=50257)


def make_plan(spec: ModelSpec, placement: dict | str = "dram", *, rows: int = 8, micro_rows: int = 8,
              seq_len: int = 1024, optimizer: str = "eager", checkpoints: str = "dram", dtype: str = "bf16", states: str = "exact",
              **more) -> Plan:
    blocks = sum(s.kind == "block" for s in spec.stages)
    work = Work(rows=rows, seq_len=seq_len, micro_rows=micro_rows,
                hidden_bytes=2 * micro_rows * seq_len * spec.hidden_size)
    return Plan(spec=spec, formats=FORMATS[states][dtype], optimizer=optimizer, placements=forced_placements(spec, placement),
                checkpoint_tiers=(checkpoints,) * (blocks - 1) + ("gpu",), work=work, **more)


def random_plan(seed: int, *, uniform: bool) -> Plan:
    """``uniform``: every block's planes live in the same tiers, as far as the GPU does not hold all
    of a block's."""
    r = random.Random(f"plan {seed}")
    blocks = r.randint(8, 40)
    spec = gpt_spec(blocks, r.choice([2048, 3072, 4096, 5120, 8192, 12288]), r.choice([32000, 50257, 128256]))
    if uniform:
        placement = r.choice([{"*": "ssd"}, {"*": "dram"}, HI_IN_DRAM, STATES_ON_SSD])
    else:
        rest, first = ({p: r.choice(["dram", "ssd"]) for p in PLANES} for _ in range(2))
        first = r.choice(["gpu", first])
        placement = {"*": rest} | {f"block.{i}": first for i in range(r.randint(0, blocks))}
    micro_rows = r.choice([1, 4, 8, 16])
    return make_plan(spec, placement, rows=micro_rows * r.randint(1, 6) - r.randint(0, micro_rows - 1), micro_rows=micro_rows,
                     seq_len=r.choice([512, 1024, 2048]), checkpoints=r.choice(["gpu", "dram", "ssd"]),
                     **r.choice([dict(optimizer="eager"), dict(optimizer="deferred"),
                                 dict(optimizer="speculative", early_units=r.randint(1, blocks + 2))]))


def random_hardware(seed: int) -> Hardware:
    r = random.Random(f"hardware {seed}")

    def between(low: float, high: float) -> float:
        return low * (high / low) ** r.random()

    read, write, h2d, dram = between(1e9, 7e9), between(1e9, 6e9), between(12e9, 60e9), between(40e9, 400e9)
    d2h = h2d * r.uniform(0.9, 1.05)
    ssd = Ssd(read_bps=read, write_bps=write, mixed_bps=max(read, write) * r.uniform(0.8, 1.2))
    return Hardware(name="random", source="measured", gpu_bytes=1, gpu_flops=between(40e12, 900e12),
                    gpu_half_tokens=between(100, 6000), gpu_bps=between(6e11, 5e12), h2d_bps=h2d, d2h_bps=d2h,
                    duplex_bps=min(h2d, d2h) * r.uniform(0.6, 1.0), dram_bytes=1, dram_bps=dram, cores=16,
                    adam_params_per_s=dram / 26 * r.uniform(0.3, 1.1), ssds=(ssd,) * r.randint(1, 12),
                    ssd_limit_bps=r.choice([None, 20e9]), adam_elsewhere=r.uniform(0.7, 0.95))


def faster(hardware: Hardware, what: str, factor: float) -> Hardware:
    """More of one resource: a field, one rate of all SSDs, or ``ssd`` and ``link`` as a whole."""
    if what == "ssd":
        limit = hardware.ssd_limit_bps
        return replace(_faster_ssds(hardware, ("read_bps", "write_bps", "mixed_bps"), factor),
                       ssd_limit_bps=limit and limit * factor)
    if what in ("read_bps", "write_bps", "mixed_bps"):
        return _faster_ssds(hardware, (what,), factor)
    if what == "adam_elsewhere":
        return replace(hardware, adam_elsewhere=min(1.0, factor * hardware.adam_elsewhere))
    names = ("h2d_bps", "d2h_bps", "duplex_bps") if what == "link" else (what,)
    factor = 1 / factor if what == "gpu_half_tokens" else factor
    return replace(hardware, **{name: getattr(hardware, name) * factor for name in names})


def _faster_ssds(hardware: Hardware, names: tuple[str, ...], factor: float) -> Hardware:
    ssds = tuple(replace(s, **{n: getattr(s, n) * factor for n in names}) for s in hardware.ssds)
    return replace(hardware, ssds=ssds)
