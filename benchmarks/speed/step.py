"""Steps of the 3.0 B Llama shape under budgets, one JSON object per configuration (what `ratel
bench step` runs).

    python -m benchmarks.speed.step --batch 8 32 --clip 1e9 0.01 --gpu-memory 24GiB --json results.json
"""

import argparse
import json
import traceback

from benchmarks.harness.report import origin
from ratel.training.bench.step import StepBench, measure, table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3b", help="preset or directory")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--clip", type=float, nargs="+", default=[1e9], help="1e9 never fires, 0.01 always does")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", help="write the results here")
    for flag in ("gpu-memory", "dram", "ssd", "ssd-bandwidth", "device", "tier", "checkpoint-tier", "optimizer",
                 "micro-batch", "optimizer-threads", "compile"):
        parser.add_argument(f"--{flag}", default=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args, results = parse(), []
    known = {"model", "batch", "seq_len", "clip", "steps", "warmup", "json"}
    options = {key: value for key, value in vars(args).items() if key not in known}
    for batch in args.batch:
        for clip in args.clip:
            bench = StepBench(model=args.model, batch_size=batch, seq_len=args.seq_len, steps=args.steps,
                              warmup=args.warmup, options={**options, "max_grad_norm": clip})
            print(f"{args.model}, {batch} x {args.seq_len}, clip {clip:g}", flush=True)
            try:
                results.append(measure(bench, progress=lambda text: print(" ", text, flush=True)))
            except Exception as error:  # noqa: BLE001 - the other configurations still count
                traceback.print_exc()
                results.append({"batch_size": batch, "seq_len": args.seq_len, "clip": clip, "error": str(error)})
    print(table(results))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([{**result, **origin()} for result in results], file, indent=1)


if __name__ == "__main__":
    main()
