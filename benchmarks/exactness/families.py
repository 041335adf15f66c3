"""Every class of the installed transformers that Ratel might train: is it trained rightly? Writes
docs/families.md.

    python -m benchmarks.exactness.families                          # all of them, on two cores within 30 minutes
    python -m benchmarks.exactness.families --only Qwen3ForCausalLM  # checked again, the others as they were found
    python -m benchmarks.exactness.families --task classify --processes 4
    python -m benchmarks.exactness.families --table                  # docs/families.md again, from what was found

Each class is made small, with random parameters and buffers, saved by transformers, trained for two
steps from the directory and as an object, and compared with autograd (`ratel/verify`). The status
is 1 if a class is neither trained rightly nor refused with a reason.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.exactness.families_table import write_table
from ratel.hardware.host import describe_host
from ratel.verify.findings import Verdict
from ratel.verify.net import REGISTRIES, check_entries, entries
from benchmarks.harness.report import ROOT, commit

RESULTS = ROOT / "benchmarks" / "families.json"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these classes; the others stay as they were found")
    parser.add_argument("--task", choices=list(REGISTRIES), help="the classes of one task")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=180.0, metavar="S", help="seconds for one class")
    parser.add_argument("--table", action="store_true", help="check nothing, write the page from the file")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where verdicts go (default: benchmarks/families.json)")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    verdicts = [] if args.table else _check(args)
    content = _merged(args.json, verdicts, is_whole=not (args.only or args.task or args.table))
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.json == RESULTS:
        write_table(content, ROOT / "docs" / "families.md")
    wrong = [verdict for verdict in verdicts if not verdict.is_right and not verdict.refused]
    for verdict in wrong:
        print(f"WRONG {verdict.name} ({verdict.task}): {verdict.failed[0].describe()}")
    return 1 if wrong else 0


def _check(args: argparse.Namespace) -> list[Verdict]:
    chosen = [e for e in entries() if (not args.only or e.name in args.only) and args.task in (None, e.task)]
    missing = set(args.only or ()) - {entry.name for entry in chosen}
    if missing:
        sys.exit(f"not in this transformers' registries: {', '.join(sorted(missing))}")
    begun, verdicts = time.monotonic(), []
    for verdict in check_entries(chosen, processes=args.processes, limit_s=args.limit):
        verdicts.append(verdict)
        state = "refused" if verdict.refused else "right" if verdict.is_right else "WRONG"
        print(f"{len(verdicts):4}/{len(chosen)}  {time.monotonic() - begun:6.0f} s  {state:7}  {verdict.name} ({verdict.task})",
              flush=True)
    return verdicts


def _merged(path: Path, verdicts: list[Verdict], is_whole: bool) -> dict[str, Any]:
    """The file's content: all new, or what is new in the place of what was known of the same
    classes."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now = commit()
    kept = {} if is_whole else {(v["name"], v["task"]): v for v in before.get("verdicts", [])}
    kept |= {(v.name, v.task): {**v.to_json(), "commit": now} for v in verdicts}
    facts = _facts() if verdicts else {key: before.get(key) for key in ("benchmark", "registered", "versions", "host")}
    return {**facts, "verdicts": [kept[key] for key in sorted(kept)]}


def _facts() -> dict[str, Any]:
    import torch
    import transformers

    host = describe_host()
    return {"benchmark": "families", "registered": len(entries()), "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "host": {key: host[key] for key in ("os", "cpu", "python")}}


if __name__ == "__main__":
    sys.exit(main())
