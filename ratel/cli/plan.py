"""The command ``ratel plan``."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratel.cli.parser import add_command, at_least, add_options
from ratel.config import TrainConfig, check_can_write, planned_options, resolve
from ratel.errors import RatelError
from ratel.units import parse_bytes

if TYPE_CHECKING:
    from ratel.runtime.planning.machine import Machine
    from ratel.runtime.planning.planner import Planner, PlanResult

LARGEST = ("model", "batch", "seq")


def add(commands: Any) -> None:
    parser = add_command(commands, "plan", "what fits, where it goes, how long a step takes and what would make it faster", run)
    parser.add_argument("--config", metavar="FILE", help="TOML file of a run; flags override it")
    own = parser.add_argument_group("planning")
    own.add_argument("--ssds", type=at_least(0), metavar="N", help="with --hardware: SSDs in that machine (default: as its file says)")
    own.add_argument("--ssd-space", metavar="SIZE", help="with --hardware: what they hold in all (default: no limit)")
    own.add_argument("--endurance", metavar="TBW", help="what one drive is rated to be written, as 3500TBW (default: unknown)")
    own.add_argument("--largest", choices=LARGEST, help="the largest model of the family, batch or sequence that fits")
    own.add_argument("--no-advice", action="store_true", help="do not plan again with more of each resource, and states in other formats")
    own.add_argument("--plot", metavar="FILE", type=Path, help="draw memory by tier and time by resource (.png, .svg, .pdf)")
    own.add_argument("--trace", metavar="FILE", type=Path, help="simulate, and write what each resource does, for Perfetto")
    own.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(parser, planned_options(TrainConfig))


def plan_config(args: argparse.Namespace) -> TrainConfig:
    given = {spec.name: getattr(args, spec.name) for spec in fields(TrainConfig) if hasattr(args, spec.name)}
    config = resolve(given, args.config)
    if config.model is None:
        raise RatelError("is missing", field="--model", remedy="Give a Hugging Face directory or a preset, as llama-3b")
    return config


def run(args: argparse.Namespace) -> None:
    config = plan_config(args)
    check_can_write(args.trace, "--trace")
    if args.plot is not None:
        from ratel.cli.plan_picture import check_can_draw

        check_can_draw(args.plot)
    from ratel.planner.forecast.wear import parse_endurance
    from ratel.runtime.planning.machine import machine_for

    endurance = None if args.endurance is None else parse_endurance(args.endurance)
    space = None if args.ssd_space is None else parse_bytes(args.ssd_space, field="--ssd-space")
    machine = machine_for(config, ssds=args.ssds, ssd_space=space)
    if args.largest == "model":
        return _print_largest_model(args, config, machine)
    from ratel.runtime.planning.planner import Planner

    planner = Planner(config.model, config, machine)
    try:
        if args.largest is not None:
            _print_largest(args, config, planner)
        else:
            _print_plan(args, planner, endurance)
    finally:
        planner.close()


def _print_plan(args: argparse.Namespace, planner: "Planner", endurance: float | None) -> None:
    try:
        found = planner.plan(advice=not args.no_advice, endurance_bytes=endurance)
    except RatelError as error:
        if args.json and error.field in ("gpu_memory", "dram", "ssd"):
            print(json.dumps({"fits": False, "short": error.field, "problem": str(error)}, indent=2))
        raise _with_what_fits(error, planner) from None
    print(json.dumps(found.to_json(), indent=2) if args.json else found.describe())
    _write_files(args, found)


def _with_what_fits(error: RatelError, planner: "Planner") -> RatelError:
    """The refusal names what would fit, where a smaller batch would."""
    if error.field not in ("gpu_memory", "dram", "ssd"):
        return error
    rows = planner.largest_batch()
    fitting = (f"A batch of {rows} would fit" if rows else
               "No batch would fit; see `ratel plan --largest model` for a model that does")
    others = planner.fitting_states()
    if others:
        fitting += f"; as it is it would fit with --states {' or '.join(others)}"
    return RatelError(str(error).rstrip(".") + f". {fitting}")


def _write_files(args: argparse.Namespace, found: "PlanResult") -> None:
    if args.trace is not None:
        from ratel.planner.forecast.simulate import simulate
        from ratel.trace.timeline import write_trace

        simulated = simulate(found.plan, found.report.hardware)
        _write("--trace", args.trace, lambda: write_trace(args.trace, simulated.spans))
        print(f"{args.trace}: {len(simulated.step_ends_s)} steps of {simulated.step_s:.3f} s, simulated", file=sys.stderr)
    if args.plot is not None:
        from ratel.cli.plan_picture import draw

        _write("--plot", args.plot, lambda: draw(found.report, args.plot))
        print(f"{args.plot}: memory by tier, time by resource", file=sys.stderr)


def _write(flag: str, path: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise RatelError(f"cannot be written: {error.strerror}", field=flag, value=path) from error


def _print_largest(args: argparse.Namespace, config: TrainConfig, planner: "Planner") -> None:
    what, count = (("batch", planner.largest_batch()) if args.largest == "batch"
                   else ("sequence length", planner.largest_seq_len()))
    if args.json:
        print(json.dumps({f"largest_{args.largest}": count}))
    elif count:
        beside = f"sequences of {config.seq_len}" if args.largest == "batch" else f"batch {config.batch_size}"
        limit = ", the most that the model handles" if args.largest == "seq" and count == planner.spec.max_seq_len else ""
        print(f"largest {what}: {count:,} ({beside}){limit}")
    else:
        print(f"no {what} fits; see `ratel plan --largest model`")


def _print_largest_model(args: argparse.Namespace, config: TrainConfig, machine: "Machine") -> None:
    from ratel.runtime.planning.planner import largest_model

    found = largest_model(config, machine, config.model)
    if args.json:
        print(json.dumps({"largest_model": None if found is None else asdict(found)}))
    elif found is None:
        print("no model of this family fits")
    else:
        depth = "" if found.blocks == found.usual_blocks else f" with {found.blocks} blocks instead of {found.usual_blocks}"
        print(f"largest model: {found.num_params / 1e9:,.1f} B parameters, {found.like}{depth}")
