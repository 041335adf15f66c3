"""Native AdamW beside torch's fused one and the memory bandwidth: python -m benchmarks.parts.adam
--json adam.json"""

import argparse
import itertools
import json
from pathlib import Path

from op_ds import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-params", type=int, nargs="*", default=[bench.DEFAULT_NUM_PARAMS], help="one run for each")
    parser.add_argument("--num-threads", type=int, nargs="*", help="one run for each; default: all processors")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--isa", default="auto", choices=["auto", "scalar", "avx2", "avx512"])
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="contestants")
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the reports there as a list")
    args = parser.parse_args()
    torch = None
    if not args.without_torch:
        import torch
    reports = []
    for num_params, num_threads in itertools.product(args.num_params, args.num_threads or [None]):
        reports.append(bench.measure(num_params=num_params, num_threads=num_threads, repeats=args.repeats, isa=args.isa,
                                     huge_pages=args.huge_pages, only=args.only, torch=torch))
        print(bench.describe(reports[-1]), end="\n\n", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(reports, indent=1) + "\n")


if __name__ == "__main__":
    main()
