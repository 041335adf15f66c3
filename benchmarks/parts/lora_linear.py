"""What an adapter costs: one linear in every order, and one layer, as multiples of the frozen ones.

    python -m benchmarks.parts.lora_linear --json linear.json
    python -m benchmarks.parts.lora_linear --ranks 16 --dropouts 0 0.1 --graphs fused f1+b1
"""

import argparse

import torch

from benchmarks.harness.report import Report
from ratel.hardware.device import require_device
from ratel.lora.compute import bench as lora_bench
from ratel.lora.compute.bench import LoraBench


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["linear", "layer"], choices=["linear", "layer"])
    parser.add_argument("--shapes", nargs="+", metavar="INxOUT", default=[f"{i}x{j}" for i, j in lora_bench.LINEARS])
    parser.add_argument("--layers", nargs="+", choices=list(lora_bench.LAYERS), default=list(lora_bench.LAYERS))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64, 256])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--graphs", nargs="+", default=["fused", *lora_bench.EVERY_GRAPH])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--limit", type=float, default=0.05, metavar="SECONDS", help="for each measurement")
    parser.add_argument("--json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = require_device(args.device)
    bench = LoraBench(rows=args.rows, ranks=tuple(args.ranks), dropouts=tuple(args.dropouts), graphs=tuple(args.graphs), device=device,
                      dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, limit_s=args.limit)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    report = Report(args.json, kind="lora_linear", gpu=gpu, torch=torch.__version__, dtype=str(bench.dtype))
    shapes = tuple((int(i), int(j)) for i, j in (text.split("x") for text in args.shapes))
    for part, points in (("linear", lora_bench.linears(bench, shapes)), ("layer", lora_bench.layers(bench, tuple(args.layers)))):
        done = []
        for point in points if part in args.parts else ():
            report.add(point)
            done.append(point)
        if done:
            print(lora_bench.table(done), flush=True)


if __name__ == "__main__":
    main()
