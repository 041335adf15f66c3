"""``ratel bench lora``: what adapters cost beside the frozen linears."""

import argparse
import json
import sys
from typing import Any

from ratel.cli.parser import add_command, at_least
from ratel.errors import RatelError


def add(parts: Any) -> None:
    parser = add_command(parts, "lora", "linears with adapters as multiples of the frozen ones, in every order", _lora)
    parser.add_argument("--level", choices=["all", "linear", "layer"], default="all",
                        help="single linears, all linears of a layer, or both (default: all)")
    parser.add_argument("--shapes", metavar="INxOUT[,INxOUT]", help="of single linears (default: those of Llama 8B)")
    parser.add_argument("--rows", type=at_least(1), default=8192, metavar="N", help="tokens (default: 8192)")
    parser.add_argument("--rank", default="16", metavar="R[,R]", help="ranks (default: 16)")
    parser.add_argument("--dropout", default="0,0.1", metavar="P[,P]", help="shares that are dropped (default: 0,0.1)")
    parser.add_argument("--lora-graph", metavar="NAME[,NAME]", help="of single linears: fused, or orders such as f1+b1 (default: all)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _lora(args: argparse.Namespace) -> None:
    import torch

    from ratel.hardware.device import require_device
    from ratel.hardware.host import describe_host
    from ratel.lora.compute import bench, choice

    device = require_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    graphs = tuple(args.lora_graph.split(",")) if args.lora_graph else ("fused", *bench.EVERY_GRAPH)
    for graph in graphs:
        choice.check(graph)
    work = bench.LoraBench(rows=args.rows, ranks=_ranks(args.rank), dropouts=_dropouts(args.dropout), graphs=graphs, device=device,
                           dtype=dtype)
    shapes = _shapes(args.shapes) if args.shapes else bench.LINEARS
    points = [*(_shown(bench.linears(work, shapes)) if args.level != "layer" else ()),
              *(_shown(bench.layers(work)) if args.level != "linear" else ())]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    print(json.dumps({"host": describe_host(), "gpu": gpu, "dtype": str(dtype), "points": points}, indent=2) if args.json
          else bench.table(points))


def _shown(points: Any) -> Any:
    for point in points:
        what = point.get("layer") or f"{point['inputs']} -> {point['outputs']}"
        print(f"{what}, rank {point['rank']}, dropout {point['dropout']}", file=sys.stderr)
        yield point


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for shape in text.split(","):
        inputs, _, outputs = shape.partition("x")
        if not (inputs.isdecimal() and outputs.isdecimal() and int(inputs) and int(outputs)):
            raise RatelError("is not the shape of a linear", field="--shapes", value=shape, remedy="Give inputs and outputs, such as 4096x1024")
        found.append((int(inputs), int(outputs)))
    return tuple(found)


def _ranks(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise RatelError("is no list of ranks", field="--rank", value=text, remedy="Give whole numbers above 0, such as 8,16")
    return tuple(map(int, text.split(",")))


def _dropouts(text: str) -> tuple[float, ...]:
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= p < 1 for p in found):
        raise RatelError("is no list of shares that are dropped", field="--dropout", value=text, remedy="Give numbers from 0 to below 1")
    return found
