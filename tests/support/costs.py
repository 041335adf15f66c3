"""Machines to predict for. No tests here."""

from ratel.planner.machine.hardware import Hardware, Ssd
from tests.support.plans import gpt_spec

FAST = Hardware(name="fast", source="measured", gpu_bytes=1, gpu_flops=1e18, gpu_half_tokens=0.0, gpu_bps=1e18,
                h2d_bps=1e15, d2h_bps=1e15, duplex_bps=1e15, dram_bytes=1, dram_bps=1e16, cores=1, adam_params_per_s=1e15,
                ssds=(Ssd(read_bps=1e15, write_bps=1e15, mixed_bps=1e15),))
"""Everything takes no time, so that one slow resource decides."""
DEEP = gpt_spec(60, 2048)
PARAMS = sum(u.num_trainable for u in DEEP.units)
