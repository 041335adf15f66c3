"""``ratel bench lora``: what adapters cost beside the frozen linears, and whole models beside peft.
Progress goes to stderr, results to stdout."""

import argparse
import json
import sys
from typing import Any

from ratel.cli.parser import add_command, at_least
from ratel.config import check_can_write
from ratel.errors import RatelError

_OF_LINEARS = {"shapes": "--shapes", "rows": "--rows", "lora_graph": "--lora-graph"}
_OF_MODELS = {"target_modules": "--target_modules", "criterions": "--criterions", "lora_alpha": "-a", "dtype": "--dtype",
              "n_batch": "--n_batch", "sequence_length": "--sequence_length", "min_run_time": "--min_run_time",
              "peft": "--peft", "out": "-o", "scheme": "--scheme"}
_OF_ROWS = {"model": "-m", "rank": "-r", "n_batch": "--n_batch", "sequence_length": "--sequence_length",
            "target_modules": "--target_modules"}
"""What RunLoRA's rows bring themselves."""


def add(parts: Any) -> None:
    parser = add_command(parts, "lora", "linears with adapters as multiples of the frozen ones, in every order; models with "
                                        "adapters beside peft", _lora)
    parser.add_argument("--level", choices=["all", "linear", "layer", "model"],
                        help="single linears, all linears of a layer, both, or a whole model (default: all, and model with -m "
                             "or --all)")
    parser.add_argument("-r", "--rank", "--lora_r", metavar="R[,R]", help="ranks (default: 16; of models: 8)")
    parser.add_argument("-d", "--dropout", "--lora_dropout", metavar="P[,P]",
                        help="shares that are dropped (default: 0,0.1; of models: 0)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    linears = parser.add_argument_group("linears and layers")
    linears.add_argument("--shapes", metavar="INxOUT[,INxOUT]", help="of single linears (default: those of Llama 8B)")
    linears.add_argument("--rows", type=at_least(1), metavar="N", help="tokens (default: 8192)")
    linears.add_argument("--lora-graph", metavar="NAME[,NAME]",
                         help="of single linears: fused, or orders such as f1+b1 (default: all)")
    _add_models(parser.add_argument_group("models, with the options of RunLoRA's model_exp"))


def _add_models(group: Any) -> None:
    group.add_argument("-m", "--model", "--model_name_or_config", metavar="NAME|DIR|FILE",
                       help="llama-60m, -130m, -250m, -350m, -1.3b, opt-350m, a preset, or a configuration; weights are random")
    group.add_argument("--all", action="store_true", help="every model, batch and rank that RunLoRA has published")
    group.add_argument("--target_modules", nargs="+", metavar="NAME",
                       help="linears that get adapters (default: all but the head)")
    group.add_argument("--criterions", nargs="+", metavar="NAME",
                       help="auto, flops, bytes, time, or orders such as f1+b1 (default: auto)")
    group.add_argument("-a", "--lora_alpha", type=float, metavar="X", help="adapters count alpha / rank times (default: 8)")
    group.add_argument("--dtype", choices=["bf16", "fp16", "fp32"],
                       help="of weights, adapters and activations (default: the device's)")
    group.add_argument("--n_batch", type=at_least(1), metavar="N", help="sequences (default: 10)")
    group.add_argument("--sequence_length", type=at_least(1), metavar="N",
                       help="tokens of each (default: the most that the model takes)")
    group.add_argument("--min_run_time", type=float, metavar="S", help="seconds of each, in 10 runs or more (default: 10)")
    group.add_argument("--peft", choices=["auto", "on", "off"],
                       help="beside peft; off: beside plain PyTorch in peft's way (default: auto)")
    group.add_argument("-o", "--out", metavar="PREFIX", help="write PREFIX.csv")
    group.add_argument("--scheme", action="store_true", help="with -o: each layer's orders, in PREFIX_criterion.scheme")


def _lora(args: argparse.Namespace) -> None:
    is_model = args.level == "model" or args.level is None and (args.model is not None or args.all)
    if is_model:
        _refuse(args, _OF_LINEARS, "is for linears and layers, and this measures a model")
        _models(args)
    else:
        _refuse(args, {**_OF_MODELS, "model": "-m", "all": "--all"}, "is for models, and this measures linears and layers")
        _linears(args)


def _refuse(args: argparse.Namespace, flags: dict[str, str], why: str) -> None:
    for name, flag in flags.items():
        value = getattr(args, name)
        if value is not None and value is not False:
            raise RatelError(why, field=flag, value=value, remedy="Leave it out")


# --- models --------------------------------------------------------------------------------------------------------

def _models(args: argparse.Namespace) -> None:
    from ratel.training.bench import adapted, adapted_report

    works = _works(args)
    check_can_write(None if args.out is None else f"{args.out}.csv", "--out")
    points = []
    for work in works:
        print(f"{work.model}, batch {work.batch}, rank {work.rank}, dropout {work.dropout}", file=sys.stderr)
        points.append(adapted.measure(work, progress=lambda text: print(f"  {text}", file=sys.stderr)))
    if args.out is not None:
        adapted_report.write_csv(points, args.out)
        if args.scheme:
            adapted_report.write_schemes(points, args.out)
    print(json.dumps({**_machine(works[0].device), "points": points}, indent=2) if args.json else adapted_report.table(points))


def _works(args: argparse.Namespace) -> list[Any]:
    from ratel.hardware.device import choose_dtype, require_device
    from ratel.training.bench.adapted import AdaptedWork
    from ratel.training.bench.published import ROWS

    if args.scheme and args.out is None:
        raise RatelError("needs a name to write to", field="--scheme", remedy="Give -o PREFIX")
    if args.min_run_time is not None and args.min_run_time <= 0:
        raise RatelError("is no time to measure for", field="--min_run_time", value=args.min_run_time,
                         remedy="Give seconds above 0")
    device = require_device(args.device)
    shared = {"device": device, "dtype": args.dtype or choose_dtype(device),
              "alpha": 8.0 if args.lora_alpha is None else args.lora_alpha, "criteria": tuple(args.criterions or ("auto",)),
              "peft": args.peft or "auto", "has_scheme": args.scheme, "min_run_s": args.min_run_time or 10.0}
    dropouts = _dropouts(args.dropout or "0")
    if args.all:
        _refuse(args, _OF_ROWS, "is what each of RunLoRA's rows brings itself")
        return [AdaptedWork.of(row, dropout=p, **shared) for row in ROWS for p in dropouts]
    if args.model is None:
        raise RatelError("is missing", field="--model", remedy="Give -m MODEL, or --all for every row of RunLoRA's")
    return [AdaptedWork(model=args.model, batch=args.n_batch or 10, seq_len=args.sequence_length, rank=rank, dropout=p,
                        targets=tuple(args.target_modules or ()), **shared)
            for rank in _ranks(args.rank or "8") for p in dropouts]


def _machine(device: Any) -> dict[str, Any]:
    import torch

    from ratel.hardware.host import describe_host

    return {"host": describe_host(), "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}


# --- linears and layers --------------------------------------------------------------------------------------------

def _linears(args: argparse.Namespace) -> None:
    import torch

    from ratel.hardware.device import require_device
    from ratel.lora.compute import bench, choice

    device = require_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    graphs = tuple(args.lora_graph.split(",")) if args.lora_graph else ("fused", *bench.EVERY_GRAPH)
    for graph in graphs:
        choice.check(graph)
    work = bench.LoraBench(rows=args.rows or 8192, ranks=_ranks(args.rank or "16"), dropouts=_dropouts(args.dropout or "0,0.1"),
                           graphs=graphs, device=device, dtype=dtype)
    shapes = _shapes(args.shapes) if args.shapes else bench.LINEARS
    points = [*(_shown(bench.linears(work, shapes)) if args.level != "layer" else ()),
              *(_shown(bench.layers(work)) if args.level != "linear" else ())]
    print(json.dumps({**_machine(device), "dtype": str(dtype), "points": points}, indent=2) if args.json
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
            raise RatelError("is not the shape of a linear", field="--shapes", value=shape,
                             remedy="Give inputs and outputs, such as 4096x1024")
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
        raise RatelError("is no list of shares that are dropped", field="--dropout", value=text,
                         remedy="Give numbers from 0 to below 1")
    return found
