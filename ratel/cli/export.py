"""``ratel export``."""

import argparse
from pathlib import Path
from typing import Any

from ratel.cli.parser import add_command, directories


def add(commands: Any) -> None:
    parser = add_command(commands, "export", "write a training state as a directory that transformers loads", run)
    parser.add_argument("--state", metavar="DIR", type=Path, required=True,
                        help="a run's --out directory (its newest state), or one state in it")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the model goes; a new directory")
    parser.add_argument("--model", metavar="DIR|PRESET", help="what the run was started from (default: as it says)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="type of the weights (default: the run's)")
    parser.add_argument("--ssd", metavar="DIR[,DIR]", type=directories, default=[],
                        help="where the run's SSD files are, if their drives are mounted elsewhere now")
    parser.add_argument("--optimizer", action="store_true",
                        help="write AdamW's moments as well, as optimizer.safetensors for PyTorch; add --dtype fp32 to go "
                             "on exactly, because bf16 rounds the weights")


def run(args: argparse.Namespace) -> None:
    from ratel.training.export_state import export_state

    print(export_state(args.state, args.out, model=args.model, dtype=args.dtype, optimizer=args.optimizer, ssd=args.ssd))
