"""``ratel export``."""

import argparse
from pathlib import Path
from typing import Any

from ratel.cli.parser import add_command, directories
from ratel.errors import RatelError


def add(commands: Any) -> None:
    parser = add_command(commands, "export", "write a training state, or a model with an adapter merged in, as a directory that "
                                             "transformers loads", run)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--state", metavar="DIR", type=Path, help="a run's --out directory (its newest state), or one state in it")
    source.add_argument("--adapter", metavar="DIR", type=Path,
                        help="a LoRA adapter, of peft's or Ratel's: add it to the weights of --model")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the model goes; a new directory")
    parser.add_argument("--model", metavar="DIR|PRESET",
                        help="what the run was started from (default: as it says); the directory of the adapter's base")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="type of the weights (default: the run's, the model's)")
    parser.add_argument("--ssd", metavar="DIR[,DIR]", type=directories, default=[],
                        help="where the run's SSD files are, if their drives are mounted elsewhere now")
    parser.add_argument("--merge", action="store_true",
                        help="of a state with an adapter: write the model with the adapter added to its weights")
    parser.add_argument("--optimizer", action="store_true",
                        help="write AdamW's moments as well, as optimizer.safetensors for PyTorch; add --dtype fp32 to go "
                             "on exactly, because bf16 rounds the weights")


def run(args: argparse.Namespace) -> None:
    if args.adapter is not None:
        print(_merged(args))
        return
    from ratel.training.export_state import export_state

    print(export_state(args.state, args.out, model=args.model, dtype=args.dtype, optimizer=args.optimizer, ssd=args.ssd,
                       merge=args.merge))


def _merged(args: argparse.Namespace) -> Path:
    for option, value in (("--optimizer", args.optimizer), ("--ssd", args.ssd), ("--merge", args.merge)):
        if value:
            raise RatelError("is for a training state, and an adapter is none", field=option, remedy="Leave it out")
    if args.model is None:
        raise RatelError("is needed: the directory of the model that the adapter was trained on", field="--model",
                         remedy="Give --model DIR")
    from ratel.training.export_merged import export_merged

    return export_merged(args.model, args.adapter, args.out, dtype=args.dtype)
