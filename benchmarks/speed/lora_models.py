"""Forward and backward of RunLoRA's models with adapters, ours beside peft's: its table anew.

    python -m benchmarks.speed.lora_models --json benchmarks/results/MACHINE_runlora.json
    python -m benchmarks.speed.lora_models --models llama-60m opt-350m --criterions auto time --min-run-time 2

Batches, ranks and lengths are RunLoRA's; a batch that does not fit is made smaller. Each row is
written as soon as it is measured. `ratel bench lora --all` measures the same.
"""

import argparse

import torch

from benchmarks.harness.report import Clock, Report
from ratel.hardware.device import choose_dtype, require_device
from ratel.training.bench import adapted, adapted_report
from ratel.training.bench.adapted import AdaptedWork
from ratel.training.bench.published import MODELS, ROWS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, help="only rows of these")
    parser.add_argument("--batch", type=int, help="in the place of each row's own")
    parser.add_argument("--seq-len", type=int, help="in the place of each row's own")
    parser.add_argument("--criterions", nargs="+", default=["auto", "f1+b1"])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0])
    parser.add_argument("--dtype", choices=list(adapted.DTYPES))
    parser.add_argument("--min-run-time", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--budget-s", type=float, default=300, help="no row is begun after so many seconds")
    parser.add_argument("--json")
    return parser.parse_args(arguments)


def works(args: argparse.Namespace) -> list[AdaptedWork]:
    device = require_device(args.device)
    shared = {"device": device, "dtype": args.dtype or choose_dtype(device), "criteria": tuple(args.criterions),
              "min_run_s": args.min_run_time}
    own = {name: value for name, value in (("batch", args.batch), ("seq_len", args.seq_len)) if value is not None}
    rows = [row for row in ROWS if row.model in args.models and (not args.ranks or row.rank in args.ranks)]
    return [AdaptedWork.of(row, dropout=p, **shared, **own) for p in args.dropouts for row in rows]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    clock, wanted = Clock(args.budget_s), works(args)
    gpu = torch.cuda.get_device_name() if wanted and wanted[0].device.type == "cuda" else None
    report = Report(args.json, kind="runlora", gpu=gpu, torch=torch.__version__)
    for work in wanted:
        if clock.left_s <= 0:
            print(f"not begun: {work.model}, rank {work.rank}, dropout {work.dropout}", flush=True)
            continue
        report.add(adapted.measure(work, progress=lambda text: print(text, flush=True)))
        print(adapted_report.table(report.points[-1:]), flush=True)


if __name__ == "__main__":
    main()
