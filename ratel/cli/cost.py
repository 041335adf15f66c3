"""The command ``ratel cost``."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ratel.cli.parser import add_command, add_options, at_least, directories
from ratel.cli.plan import plan_config
from ratel.config import TrainConfig, planned_options
from ratel.errors import RatelError

if TYPE_CHECKING:
    from ratel.data.review.lengths import TextLengths
    from ratel.runtime.planning.costing import Answer

ROWS = ("packed", "padded")
_OPTIONS = {*planned_options(TrainConfig), "data", "tokenizer"} - {"hardware"}


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "cost", "what a run over your data will take: hours and dollars, on each of several GPUs", run)
    parser.add_argument("--config", metavar="FILE", help="TOML file of a run; flags override it")
    own = parser.add_argument_group("cost")
    own.add_argument("--gpu", metavar="NAME[,NAME]", help="of the table of prices, a machine's file, or `this` (default: all of the table)")
    own.add_argument("--price", metavar="TABLE", type=Path, help="TOML file of prices in the place of the table that comes along")
    own.add_argument("--epochs", metavar="N", type=at_least(1), default=1, help="times through the data (default: 1)")
    own.add_argument("--rows", choices=ROWS, help="texts share rows, or are padded to the longest of a batch (default: both, side by side)")
    own.add_argument("--fit", metavar="FILE", type=Path, help="steps that were measured on the GPU, by which it is calibrated (JSON)")
    own.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(parser, _OPTIONS)


def run(args: argparse.Namespace) -> None:
    config = plan_config(args)
    if config.task != "next-token":
        raise RatelError("is not what lengths are counted for", field="--task", value=config.task, remedy="Leave it out: next-token")
    from ratel.planner.pricing.calibration import read_measured
    from ratel.planner.pricing.rented import rented

    gpus = rented(tuple(directories(args.gpu or "")), args.price)
    measured = () if args.fit is None else tuple(read_measured(args.fit))
    if measured and len(gpus) > 1:
        raise RatelError("was measured on one GPU", field="--fit", value=args.fit, remedy="Name it with --gpu NAME")
    from ratel.data.review.lengths import text_lengths
    from ratel.planner.formats import FORMATS
    from ratel.runtime.planning.costing import Question, run_costs

    texts = text_lengths(config.data, model=config.model, tokenizer=config.tokenizer, seq_len=config.seq_len)
    states = (config.states,) if hasattr(args, "states") else tuple(FORMATS)
    forms = ROWS if args.rows is None else (args.rows,)
    answer = run_costs(config.model, config, texts, Question(rented=gpus, epochs=args.epochs, states=states, forms=forms, measured=measured))
    print(json.dumps(_to_json(answer, texts), indent=2) if args.json else _to_text(answer, texts, config, args.epochs))


def _to_json(answer: "Answer", texts: "TextLengths") -> dict:
    lengths = texts.lengths
    return {"data": {"texts": lengths.rows, "tokens": lengths.tokens, "mean": lengths.mean, "longest": lengths.longest, "bad": texts.bad},
            "calibration": None if answer.calibration is None else asdict(answer.calibration),
            "costs": [cost.to_json() for cost in answer.costs], "notes": list(answer.notes)}


def _to_text(answer: "Answer", texts: "TextLengths", config: TrainConfig, epochs: int) -> str:
    from ratel.planner.pricing.cost_text import describe_costs

    lengths, fitted = texts.lengths, answer.calibration
    lines = [f"{config.model} on {config.data or 'the bundled text'}: {lengths.rows:,} texts, {lengths.tokens:,} tokens, "
             f"{lengths.mean:,.0f} in a text, {lengths.longest:,} at most; {epochs} epoch{'s' if epochs > 1 else ''}"]
    if fitted is not None:
        error = "" if fitted.error is None else f"; each predicted from the others is missed by {fitted.error:.1%}"
        lines.append(f"fitted to {fitted.num_points} steps: {fitted.gpu_flops / 1e12:,.1f} TFLOP/s and {fitted.overhead_s:.3f} s a step{error}")
    return "\n".join([*lines, "", describe_costs(answer.costs, answer.notes)])
