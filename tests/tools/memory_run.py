"""A training run in a process of its own, whose memory is looked at: a list of options as JSON in,
of measures out."""

import json
import os
import sys
from typing import Any

import torch

from ratel.errors import RatelError
from ratel.memory.resident import peak_bytes
from ratel.planner.formats import PLANES
from ratel.planner.plan import Plan
from ratel.planner.search.choose import minimum_state_bytes
from ratel.planner.work import Buffers
from ratel.runtime.session.session import Session

ROWS, POSITIONS, VOCAB, WIDTH = 2, 16, 512, 768
BUFFERS = Buffers(weight_slots=2, grad_slots=2, host_weight_slots=3, host_grad_slots=2, ring_slots=2,
                  chunk_elements=1 << 20)
"""Few and small, as for a machine that has little."""


def config(layers: int, width: int = WIDTH) -> Any:
    """At the usual width 7.1 M parameters a layer, 85 MB of states."""
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=VOCAB, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
                       num_attention_heads=12, max_position_embeddings=512, tie_word_embeddings=False)


def state_bytes_on(plan: Plan, tier: str) -> int:
    return sum(plan.formats.num_bytes(u, p) for u in plan.spec.units for p in PLANES
               if plan.placement(u).tier(p) == tier)


def measure(layers: int, steps: int, rows: int = ROWS, positions: int = POSITIONS, width: int = WIDTH,
            **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    with Session(config(layers, width), optimizer_threads=1, buffers=BUFFERS, lr=1e-3,
                 **{"device": "cpu", "dtype": "bf16", **options}) as session:
        before = peak_bytes()  # planning starts the peak anew
        batch = {"input_ids": torch.randint(0, VOCAB, (rows, positions))}
        losses = [session.step(batch).loss for _ in range(steps)]
        session.flush()
        plan = session.plan
        return {"peak_bytes": max(before, peak_bytes()), "losses": losses, "dram_bytes": plan.dram_bytes,
                "arena_bytes": plan.arena_bytes, "items": plan.host_items,
                "state_bytes": minimum_state_bytes(plan.spec),
                "on_ssd_bytes": state_bytes_on(plan, "ssd"), "on_dram_bytes": state_bytes_on(plan, "dram"),
                "on_gpu_bytes": state_bytes_on(plan, "gpu"), "gpu_bytes": plan.gpu_bytes,
                "workspace_bytes": plan.workspace_bytes,
                "gpu_reserved_bytes": torch.cuda.max_memory_reserved() if plan.gpu_budget else 0,
                "gpu_allocated_bytes": torch.cuda.max_memory_allocated() if plan.gpu_budget else 0}


def report(options: dict[str, Any]) -> dict[str, Any]:
    try:
        return measure(**options)
    except RatelError as refusal:
        return {"refused": str(refusal), "field": refusal.field}


def report_forked(options: dict[str, Any]) -> dict[str, Any]:
    """In a child, whose memory begins with the imports alone."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(send, json.dumps(report(options)).encode())  # smaller than a pipe's buffer
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = json.loads(sys.argv[1])
    print(json.dumps([report(*runs)] if len(runs) == 1 else [report_forked(options) for options in runs]))
