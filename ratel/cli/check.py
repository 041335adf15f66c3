"""The command ``ratel check``."""

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ratel.cli.parser import add_command, directories
from ratel.config import TASKS
from ratel.errors import RatelError
from ratel.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from ratel.runtime.states.saved_state import SavedState

_REDRAW_S = 0.2


def add(commands: Any) -> None:
    parser = add_command(commands, "check", "read a training state and compare every chunk with its checksum; or try out whether a "
                                            "model is trained rightly", run)
    parser.add_argument("state", metavar="DIR", type=Path, nargs="?", help="a run's --out directory (its newest state), its "
                                                                "state/, or one state in it")
    parser.add_argument("--model", metavar="DIR|PRESET", help="check a small copy of this model instead, beside plain PyTorch")
    parser.add_argument("--task", choices=TASKS, help="what it is to learn (default: what its class is for)")
    parser.add_argument("--ssd", metavar="DIR[,DIR]", type=directories, default=[],
                        help="where the run's SSD files are, if their drives are mounted elsewhere now")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if (args.state is None) == (args.model is None):
        raise RatelError("takes the directory of a state or --model", field="ratel check", remedy="Give one of them")
    if args.model is not None:
        return _check_model(args)
    _check_state(args)
    return 0


def _check_model(args: argparse.Namespace) -> int:
    import torch
    import transformers

    from ratel.verify.known import check_model

    verdict = check_model(args.model, args.task)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if args.json:
        print(json.dumps({"model": args.model, "ok": verdict.is_right, **versions, **verdict.to_json()}, indent=2))
    else:
        print(f"{verdict.name} ({verdict.task}), a small copy of it, with transformers {versions['transformers']} and torch "
              f"{versions['torch']}:")
        for finding in verdict.findings:
            print(f"  {finding.describe()}")
        if verdict.refused:
            print(f"  cannot be checked: {verdict.refused}")
        print(f"  {'all holds' if verdict.is_right else 'NOT RIGHT'} ({format_seconds(verdict.seconds)})")
    return 0 if verdict.is_right else 1


def _check_state(args: argparse.Namespace) -> None:
    from ratel.runtime.states.saved_state import SavedState
    from ratel.training.output import beside_a_run
    from ratel.training.states import find_state

    path = find_state(args.state, "DIR")
    begun = perf_counter()  # imports come before
    try:
        with beside_a_run(path, "DIR"):
            saved = SavedState(path, args.ssd)
            saved.check_files()
            checked = _check(saved, begun)
    except RatelError as error:
        if args.json:
            print(json.dumps({"state": str(path), "ok": False, "problem": str(error)}, indent=2))
        raise
    seconds = perf_counter() - begun
    if args.json:
        print(json.dumps({"state": str(path), "ok": True, **checked, "seconds": seconds,
                          "bytes_per_s": checked["num_bytes"] / seconds}, indent=2))
    else:
        print(f"{path}: whole; {checked['units']} units, {format_bytes(checked['num_bytes'])} in "
              f"{format_seconds(seconds)} ({format_bytes(checked['num_bytes'] / seconds)}/s)")
        if checked["frozen_parameters"]:
            print(f"  its {checked['frozen_parameters']:,} frozen parameters are the model's, which it names by content")


def _check(saved: "SavedState", begun: float) -> dict[str, int]:
    with _ProgressLine(saved.num_bytes, begun) as line:
        saved.verify(line.advance)
    return {"units": saved.num_units, "num_bytes": saved.num_bytes, "frozen_parameters": saved.num_left_out}


class _ProgressLine:
    """One line on a terminal, drawn over itself."""

    def __init__(self, total_bytes: int, begun: float) -> None:
        self._total, self._begun, self._done, self._drawn = total_bytes, begun, 0, begun
        self._is_shown = sys.stderr.isatty()

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = perf_counter()
        if self._is_shown and now - self._drawn > _REDRAW_S:
            self._drawn = now
            rate = format_bytes(self._done / (now - self._begun))
            sys.stderr.write(f"\r\033[K{format_bytes(self._done)} of {format_bytes(self._total)}  {rate}/s")
            sys.stderr.flush()

    def __enter__(self) -> "_ProgressLine":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._is_shown:
            sys.stderr.write("\r\033[K")
