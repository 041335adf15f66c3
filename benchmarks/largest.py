"""Large things really trained under a cap on GPU memory: a model far larger than GPU memory and DRAM, a very long sequence.

    python benchmarks/largest.py model --ssd /mnt/a --dram 112GiB --json results.json
    python benchmarks/largest.py sequence --ssd /mnt/a --json results.json
"""

import argparse
import json
from pathlib import Path

from ratel.memory.resident import peak_bytes
from ratel.models.presets import preset_config
from ratel.train.step_bench import StepBench, measure


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["model", "sequence"])
    parser.add_argument("--model", help="preset (default: llama-13b, llama-3b)")
    parser.add_argument("--seq-len", type=int, help="(default: 1024, 131072)")
    parser.add_argument("--batch", type=int, help="(default: 8, 1)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-grad-norm", type=float, default=0.0)
    parser.add_argument("--gpu-memory", default="24GiB")
    parser.add_argument("--dram")
    parser.add_argument("--ssd")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    name, batch, seq_len = {"model": ("llama-13b", 8, 1024), "sequence": ("llama-3b", 1, 1 << 17)}[args.what]
    config = preset_config(args.model or name)
    seq_len = args.seq_len or seq_len
    config.max_position_embeddings = max(config.max_position_embeddings, seq_len)  # rotary positions: no parameter changes
    options = dict(gpu_memory=args.gpu_memory, dram=args.dram, ssd=args.ssd, device=args.device,
                   max_grad_norm=args.max_grad_norm)
    result = measure(StepBench(model=config, batch_size=args.batch or batch, seq_len=seq_len, warmup=1,
                               steps=args.steps - 1, options=options), progress=lambda text: print(text, flush=True))
    result |= {"command": f"python benchmarks/largest.py {args.what}", "preset": args.model or name,
               "dram_peak_bytes": peak_bytes()}
    result["options"].pop("ssd", None)
    print({key: result[key] for key in ("parameters", "step_s", "losses", "gpu_peak_bytes", "dram_peak_bytes", "start_s")})
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
