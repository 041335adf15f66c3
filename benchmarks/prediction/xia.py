"""Explains what Xia et al. (IISWC 2024) measured of fine-tuning with the cost model of `ratel cost`,
and compares with their own.

    python -m benchmarks.prediction.xia            print it
    python -m benchmarks.prediction.xia --save     also write benchmarks/results/iiswc24_xia.json

Their points are in benchmarks/prediction/xia_points.json. Two models are fitted to the same points
with the same measure, the error of rows per second: theirs, a logarithm of the batch for each data
set and GPU, and ours, a step's overhead and the padded tokens at the GPU's rate.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import floor, log
from pathlib import Path
from typing import Any

from benchmarks.harness.report import RESULTS, origin
from ratel.planner.pricing.fit import Points, fit, least_squares, left_out_errors, root_mean_square
from ratel.planner.pricing.lengths import Lengths
from ratel.planner.pricing.rented import Rented, rented
from ratel.planner.pricing.run_cost import PADDED, Epoch, RunCost, Step

RESULT = RESULTS / "iiswc24_xia.json"
PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("xia_points.json").read_text(encoding="utf-8"))

EVERY_TOKEN, EXPERTS = 1.6e9, 45.1e9
"""Mixtral's weights that every token uses, and those of all experts. With adapters, a frozen base
and recomputation a token takes three products with each: forward, again, and the gradient of what
goes in."""
FLOPS_PER_WEIGHT = 6
ROWS_OF_COSTS, EPOCHS = 15_000, 10
"""Table IV's, though it is said to be of other data: with these its dollars come out."""
SHORT_ROWS = 128
"""Tokens of each row where stages were timed."""
MEMORY = {"A40": 48.0, "A100-40": 40.0, "A100-80": 80.0, "H100": 80.0}
SCALED_FREE_GB = MEMORY["A40"] - 23.35
"""What the weights of their Mixtral leave of an A40."""


@dataclass(frozen=True)
class Measured:
    """One of their points. ``sparsity``: the share of experts that a token uses. ``suspect``: why
    it can hardly be what was measured."""

    set: str
    batch: int
    sparsity: float
    rows_per_s: float
    suspect: str | None

    @property
    def model(self) -> str:
        return self.set.partition("-")[0]

    @property
    def seconds(self) -> float:
        return self.batch / self.rows_per_s

    @property
    def padded_tokens(self) -> float:
        return self.batch * lengths(PUBLISHED["dataset_of_set"][self.set]).expected_longest(self.batch)


POINTS = [Measured(*point) for point in PUBLISHED["throughput"]]
SETS = tuple(dict.fromkeys(point.set for point in POINTS))


@lru_cache(maxsize=None)
def lengths(data: str) -> Lengths:
    return Lengths.of(map(tuple, PUBLISHED["length_histogram"][data])).cut(PUBLISHED["cutoff_tokens"])


def points_of(*names: str) -> list[Measured]:
    return [point for point in POINTS if point.set in names]


# --- ours -------------------------------------------------------------------------------------------------------------


def padded(found: Sequence[Measured]) -> Points:
    """Three constants: overhead, seconds of a padded token, and of one with all experts in use."""
    return _points(found, [(1.0, p.padded_tokens, p.padded_tokens * p.sparsity) for p in found])


def two_constants(found: Sequence[Measured]) -> Points:
    """Overhead and the GPU's rate; FLOPs are counted from the model's weights."""
    return _points(found, [(1.0, p.padded_tokens * FLOPS_PER_WEIGHT * (EVERY_TOKEN + EXPERTS * p.sparsity)) for p in found])


def _points(found: Sequence[Measured], terms: list[tuple[float, ...]]) -> Points:
    return Points(terms=tuple(terms), seconds=tuple(p.seconds for p in found), work=tuple(float(p.batch) for p in found))


# --- theirs -----------------------------------------------------------------------------------------------------------


def logarithm(found: Sequence[Measured]) -> list[tuple[float, float]]:
    """What their two constants are multiplied with: rows/s = C4 + C2 ln(batch) / (sparsity C3), as
    their program fits it."""
    return [(1.0, log(p.batch) / (p.sparsity * PUBLISHED["their_c3"][p.model])) for p in found]


def their_fit(found: Sequence[Measured]) -> tuple[float, ...]:
    return least_squares(logarithm(found), [p.rows_per_s for p in found])


def their_errors(found: Sequence[Measured], constants: Sequence[float]) -> list[float]:
    return [sum(map(lambda term, constant: term * constant, terms, constants)) - p.rows_per_s
            for terms, p in zip(logarithm(found), found)]


def their_left_out(found: Sequence[Measured], indices: Iterable[int]) -> list[float]:
    return [their_errors(found, their_fit([*found[:index], *found[index + 1:]]))[index] for index in indices]


def their_batch(model: str, gpu_gb: float, row_tokens: float, sparsity: float) -> int:
    c = PUBLISHED["their_batch"][model]
    return floor(c["C0"] * (gpu_gb - c["model_gb"]) / (row_tokens * (1 - c["C1"] + c["C1"] * sparsity)))


# --- compared ---------------------------------------------------------------------------------------------------------


def fits() -> list[dict[str, Any]]:
    """Root mean square errors of rows/s, by set."""
    return [_compared(name, points_of(name)) for name in SETS]


def _compared(name: str, found: list[Measured]) -> dict[str, Any]:
    ours, theirs = padded(found), their_fit(found)
    constants, left_out = fit(ours), left_out_errors(ours)
    return {"set": name, "points": len(found), "constants": constants, "their_constants": theirs,
            "theirs": root_mean_square(their_errors(found, theirs)), "ours": root_mean_square(ours.errors(constants)),
            "left_out": len(left_out), "theirs_left_out": root_mean_square(their_left_out(found, left_out)),
            "ours_left_out": root_mean_square([*left_out.values()]),
            "rows_per_s": [{**asdict(p), "theirs": p.rows_per_s + error, "ours": rate}
                           for p, rate, error in zip(found, ours.rates(constants), their_errors(found, theirs))]}


CS, MATH = "Mixtral-CS-A40", "Mixtral-MATH-A40"


def one_gpu() -> dict[str, Any]:
    """All points of Mixtral on the A40 by two constants, and one data set's points by the
    other's."""
    found = {name: points_of(*sets) for name, sets in (("both", (CS, MATH)), ("CS", (CS,)), ("MATH", (MATH,)))}
    constants = {name: fit(two_constants(some)) for name, some in found.items()}
    crossed = [predicted / p.rows_per_s - 1 for p, predicted in zip(found["MATH"], padded(found["MATH"]).rates(fit(padded(found["CS"]))))]
    both = two_constants(found["both"])
    relative = [error / p.rows_per_s for error, p in zip(both.errors(constants["both"]), found["both"])]
    return {"points": len(found["both"]),
            "constants": {name: {"overhead_s": t0, "flops": 1 / flop_s} for name, (t0, flop_s) in constants.items()},
            "rmse": root_mean_square(both.errors(constants["both"])), "relative": sum(map(abs, relative)) / len(relative),
            "math_from_cs": crossed}


def stages() -> Iterator[dict[str, Any]]:
    """Steps of Mixtral on the A40 whose rows all have one length (figure 4), which no fit has seen,
    by the two constants."""
    overhead_s, flop_s = fit(two_constants(points_of(CS, MATH)))
    for routing, batch, *seconds in PUBLISHED["stages"]:
        weights = EVERY_TOKEN + EXPERTS * (1.0 if routing == "dense" else 0.25)
        ours = overhead_s + batch * SHORT_ROWS * FLOPS_PER_WEIGHT * weights * flop_s
        yield {"routing": routing, "batch": batch, "row_tokens": SHORT_ROWS, "stages_s": seconds, "measured_s": sum(seconds), "ours_s": ours}


def batches() -> Iterator[dict[str, Any]]:
    """The largest batches: as many rows of the longest as there are tokens in the batch of the
    data that was tried first (CS, whose longest row has 512)."""
    longest = lengths("CS").longest
    tokens = {(model, routing): batch * longest for _, model, routing, data, batch, _ in PUBLISHED["largest_batch"] if data == "CS"}
    for _, model, routing, data, batch, source in PUBLISHED["largest_batch"]:
        row = lengths(data).longest if isinstance(data, str) else data
        median = PUBLISHED["datasets"][data]["median"] if isinstance(data, str) else data
        yield {"gpu": "A40", "model": model, "routing": routing, "data": data, "row_tokens": row, "measured": batch,
               "run": _largest_run(model, routing, data), "ours": tokens[model, routing] // row, "is_given": data == "CS",
               "theirs": their_batch(model.partition("-")[0], MEMORY["A40"], median, 1.0 if routing == "dense" else 0.25), "source": source}
    model = next(iter(tokens))[0]
    yield {"gpu": "A100-80", "model": model, "routing": "sparse", "data": "CS", "row_tokens": longest, "measured": 17, "run": 17,
           "ours": floor(tokens[model, "sparse"] * (MEMORY["A100-80"] - 23.35) / SCALED_FREE_GB / longest), "is_given": False,
           "theirs": their_batch("Mixtral", MEMORY["A100-80"], PUBLISHED["datasets"]["CS"]["median"], 0.25),
           "source": "the largest batch among the throughput points"}


def _largest_run(model: str, routing: str, data: str | int) -> int | None:
    """Among the throughput points, which go further than the table of batches."""
    name = f"{model.partition('-')[0]}-{data}-A40"
    return max((p.batch for p in points_of(name) if (p.sparsity == 1.0) == (routing == "dense")), default=None)


_PRICED = {"A40": ("a40", MATH), "A100": ("a100-80", "Mixtral-A100-80"), "H100": ("h100", "Mixtral-H100-80")}


def costs() -> Iterator[dict[str, Any]]:
    """Table IV with rows and epochs named: their rate, and the rate that our fit gives."""
    for row in PUBLISHED["costs"]:
        name, of_set = _PRICED[row["gpu"]]
        (machine,) = rented((name,))
        found = points_of(of_set)
        point = next(p for p in found if p.batch == row["batch"] and p.sparsity < 1)
        rate = padded(found).rates(fit(padded(found)))[found.index(point)]
        yield {"gpu": row["gpu"], "batch": row["batch"], "rows_per_s": point.rows_per_s, "printed": row["dollars"],
               "dollars_per_hour": machine.price.dollars_per_hour, "measured_rate": _run(machine, row["batch"], point.rows_per_s).dollars,
               "ours": _run(machine, row["batch"], rate).dollars}


def _run(machine: Rented, batch: int, rows_per_s: float) -> RunCost:
    epoch = Epoch(form=PADDED, rows=ROWS_OF_COSTS, row_tokens=lengths("CS").expected_longest(batch), tokens=lengths("CS").tokens)
    step = Step(seconds=batch / rows_per_s, bound_by="compute", overhead_s=0.0, gpu_bytes=0, dram_bytes=0, ssd_bytes=0)
    return RunCost(rented=machine, basis="measured", trains="adapters", states="exact", epoch=epoch, epochs=EPOCHS, batch=batch,
                   largest_batch=batch, step=step)


def result() -> dict[str, Any]:
    return {"paper": PUBLISHED["paper"], "repository": PUBLISHED["repository"], "fits": fits(), "one_gpu": one_gpu(),
            "stages": list(stages()), "batches": list(batches()), "costs": list(costs()), "openorca": PUBLISHED["openorca"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the result beside the measured ones")
    args = parser.parse_args()
    found = result()
    for row in found["fits"]:
        print(f"{row['set']:20} {row['points']:3} points: theirs {row['theirs']:.4f}, ours {row['ours']:.4f} rows/s; "
              f"left out {row['theirs_left_out']:.4f}, {row['ours_left_out']:.4f}")
    for name in ("one_gpu", "batches", "costs"):
        print(json.dumps(found[name], indent=1))
    if args.save:
        RESULT.write_text(json.dumps({**found, **origin()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
