"""The command ``ratel data``."""

import argparse
import json
import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ratel.cli.parser import add_command, at_least
from ratel.errors import RatelError

if TYPE_CHECKING:
    from ratel.data.review.survey import Entry, Totals

_REDRAW_S = 0.2


def add(commands: Any) -> None:
    parser = add_command(commands, "data", "show what is learned of each record, and what is context", run)
    parser.add_argument("data", metavar="FILE|DIR", help=".txt or .jsonl file, or a directory of them")
    parser.add_argument("--model", metavar="DIR|PRESET", help="whose tokenizer and chat template are used (default: bytes)")
    parser.add_argument("--tokenizer", metavar="DIR", help="directory with a tokenizer (default: the model's own)")
    parser.add_argument("--seq-len", metavar="N", type=at_least(8), default=1024,
                        help="tokens per sequence; what is longer is cut (default: 1024)")
    parser.add_argument("--number", metavar="N", type=at_least(1), default=3, help="records to show (default: 3)")
    parser.add_argument("--line", metavar="N", type=at_least(1), help="begin at this line of the file")
    parser.add_argument("--check", action="store_true",
                        help="go through all records and list every bad line, with exit status 1 if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from ratel.data.review.show import Viewer
    from ratel.data.review.survey import Totals, open_survey
    from ratel.models.presets import PRESETS

    if args.model is not None and not os.path.isdir(args.model) and args.model not in PRESETS:
        raise RatelError("neither a directory nor a preset", field="--model", value=args.model,
                         remedy=f"Give a directory, or one of {', '.join(PRESETS)}")
    if args.check and args.line:
        raise RatelError("goes through all lines", field="--check", remedy="Leave out --check or --line")
    survey = open_survey(args.data, model=args.model, tokenizer=args.tokenizer, seq_len=args.seq_len, first_line=args.line or 1)
    viewer = Viewer(survey.tokenizer, seq_len=args.seq_len, colour=sys.stdout.isatty())
    totals, shown = Totals(), []
    with _ProgressLine(args.check) as line:
        for entry in survey.entries:
            totals.add(entry, args.seq_len)
            line.advance(entry, totals)
            if entry.error is not None or not args.check:
                shown.append(viewer.to_json(entry) if args.json else None)
                if not args.json:
                    line.clear()
                    print(viewer.to_text(entry) + ("" if args.check else "\n"))
            if not args.check and totals.records + totals.bad == args.number:
                break
    _finish(args, totals, shown)
    return 1 if totals.bad else 0


def _finish(args: argparse.Namespace, totals: "Totals", shown: list[Any]) -> None:
    from dataclasses import asdict

    from ratel.data.review.show import summary

    if not args.check and not totals.records + totals.bad:
        raise RatelError("there is no record from there on", field="--line" if args.line else "data", value=args.line or args.data,
                         remedy="Give a line that the file has" if args.line else "Give files with a record that is not blank")
    if args.json:
        print(json.dumps({"totals": asdict(totals), "problems" if args.check else "records": shown}, indent=2, ensure_ascii=False))
    else:
        print(summary(totals, args.seq_len))


class _ProgressLine:
    """One line on a terminal, drawn over itself."""

    def __init__(self, is_wanted: bool) -> None:
        self._is_shown = is_wanted and sys.stderr.isatty()
        self._drawn_s = perf_counter()

    def advance(self, entry: "Entry", totals: "Totals") -> None:
        if self._is_shown and perf_counter() - self._drawn_s > _REDRAW_S:
            self._drawn_s = perf_counter()
            share = entry.offset / max(entry.source.num_bytes, 1)
            sys.stderr.write(f"\r\033[K{entry.source.name}: {share:.0%}, {totals.records} records, {totals.bad} bad lines")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._is_shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def __enter__(self) -> "_ProgressLine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()
