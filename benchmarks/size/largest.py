"""Large things really trained under a cap on GPU memory: a model far larger than GPU memory and
DRAM, a very long sequence, as many sequences in a step as fit.

    python -m benchmarks.size.largest model --ssd /mnt/a --dram 112GiB --json results.json
    python -m benchmarks.size.largest sequence --steps 2 --dram 60GiB --json results.json
    python -m benchmarks.size.largest batch --steps 2 --dram 60GiB --json results.json

Without --ssd a temporary directory in the current one is used.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.report import origin
from ratel.memory.resident import peak_bytes
from ratel.models.presets import preset_config
from ratel.training.bench.largest import MaxBench, max_batch
from ratel.training.bench.step import StepBench, measure
from ratel.units import parse_bytes

USUAL = {"model": ("llama-13b", 8, 1024), "sequence": ("llama-3b", 1, 1 << 17), "batch": ("llama-3b", 0, 1024)}
"""Preset, sequences and tokens of each; 0: searched for."""
SHOWN = ("parameters", "batch_size", "seq_len", "step_s", "losses", "gpu_peak_bytes", "dram_peak_bytes", "start_s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(USUAL))
    parser.add_argument("--model", help="preset (default: llama-13b, llama-3b, llama-3b)")
    parser.add_argument("--seq-len", type=int, help="(default: 1024, 131072, 1024)")
    parser.add_argument("--batch", type=int, help="(default: 8, 1, the largest that fits)")
    parser.add_argument("--steps", type=int, default=3, help="of which the first does not count")
    parser.add_argument("--max-grad-norm", type=float, default=0.0)
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--dram")
    parser.add_argument("--ssd")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="ratel-largest-", dir=".") as directory:
        result = _run(args, args.ssd or directory)
    result |= origin()
    print({key: result[key] for key in SHOWN if key in result})
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


def _run(args: argparse.Namespace, ssd: str) -> dict[str, Any]:
    name, batch, seq_len = USUAL[args.what]
    name, batch, seq_len = args.model or name, args.batch or batch, args.seq_len or seq_len
    options = dict(gpu_memory=args.gpu_memory, dram=args.dram, ssd=ssd, device=args.device,
                   max_grad_norm=args.max_grad_norm)
    if not batch:
        bench = MaxBench(model=name, seq_len=seq_len, steps=args.steps - 1, options=options)
        (result,) = max_batch(bench, [parse_bytes(args.dram, field="--dram")], progress=_say)
    else:
        config = preset_config(name)
        config.max_position_embeddings = max(config.max_position_embeddings, seq_len)  # rotary: no parameter changes
        result = measure(StepBench(model=config, batch_size=batch, seq_len=seq_len, warmup=1, steps=args.steps - 1,
                                   options=options), progress=_say)
        result |= {"preset": name, "dram_peak_bytes": peak_bytes()}
    result.get("options", {}).pop("ssd", None)
    return result


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
