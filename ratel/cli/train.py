"""The command ``ratel train``."""

import argparse
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

from ratel.cli.parser import add_command, add_options
from ratel.config import TrainConfig
from ratel.errors import RatelError


def add(commands: Any) -> None:
    parser = add_command(commands, "train", "fine-tune a model", run)
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the options below; flags override it")
    add_options(parser)


def train_config(args: argparse.Namespace) -> TrainConfig:
    from ratel.training.options import complete

    names = {spec.name for spec in fields(TrainConfig)}
    return complete({name: value for name, value in vars(args).items() if name in names}, args.config)


def run(args: argparse.Namespace) -> None:
    from ratel import interrupt
    from ratel.trace import phases
    from ratel.startup.ahead import begin_ahead, begin_kernels

    config = train_config(args)
    if config.model is None:
        raise RatelError("is missing", field="--model", remedy="Give a Hugging Face directory or a preset, as demo")
    phases.note("interpreter and options", 0.0)
    begin_ahead(config)  # before PyTorch is imported: disk and memory have nothing else to do in these seconds
    with _nothing_collected(), interrupt.outside():  # of others' code, for seconds; and nothing is there yet to be put in order
        with phases.phase("imports"):
            from ratel.training import run as training
        begin_kernels(config)
        with phases.phase("transformers"), _passed_over("sklearn", "scipy", "torchvision"), suppress(ImportError):
            import transformers.generation.utils  # noqa: F401 - the last that every model of it needs
            import transformers.modeling_utils  # noqa: F401

    training.run(config, model=config.model)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What imports make stays: half a million objects, among which the collector of garbage would
    look again and again (0.7 of 4 s), and whenever it is due while the run goes on. In a process
    that has more to do than this run it is left alone."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _passed_over(*packages: str) -> Iterator[None]:
    """They count as not installed. transformers imports what it finds of them, for assisted
    generation, object detection and images: a third of its time on a machine that has all three.
    Afterwards they can be imported as ever."""
    packages = tuple(name for name in packages if name not in sys.modules)
    sys.modules.update(dict.fromkeys(packages))  # None there is Python's own sign for a module that must not be found
    try:
        yield
    finally:
        for name in packages:
            sys.modules.pop(name, None)
