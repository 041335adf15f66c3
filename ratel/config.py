"""Every option of a training run, once: the table below gives the flags, the TOML keys, the
defaults and the help.

Values arrive as flag text, TOML or Python objects; the option's reader makes one kind of them and
refuses the rest.
"""

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from ratel.errors import RatelError
from ratel.other_names import meant_by
from ratel.reading import read_text
from ratel.units import MIB, parse_bytes, parse_rate

Reader = Callable[[Any, str], Any]


@dataclass(frozen=True, kw_only=True)
class Option:
    """How one field of the configuration is spelled, explained and read."""

    read: Reader
    help: str
    group: str
    metavar: str | None = None
    is_switch: bool = False


MOST_COUNTED = 10**12
"""The most of anything that a run counts: a larger number is a slip of the hand."""
MOST_AT_ONCE = 2**31 - 1
"""Rows, positions: an index of 32 bits is what libraries use for them."""
MOST_TOKENS = 2**36
"""The most tokens of one step. A batch is in memory as a whole, with 24 bytes a token: 1.5 TiB."""
MOST_SEED = 2**128 - 1
MOST_THREADS = 4096
MOST_FP32 = 3e38


def number_reader(kind: type, low: float, high: float | None = None, *, above: bool = False, below: bool = False) -> Reader:
    """A reader of an int or float in ``[low, high]``; ``above``/``below`` exclude that end."""
    high = high if high is not None else MOST_COUNTED if kind is int else MOST_FP32

    def read(value: Any, flag: str) -> Any:
        try:
            number = kind(str(value).replace("_", "")) if not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None or not math.isfinite(number):
            raise RatelError("not a whole number" if kind is int else "not a number", field=flag, value=repr(value))
        if number < low or (above and number == low):
            raise RatelError(f"must be {'above' if above else 'at least'} {low:g}", field=flag, value=number)
        if number > high or (below and number == high):
            raise RatelError(f"must be {'below' if below else 'at most'} {high:{',' if kind is int else 'g'}}", field=flag, value=number)
        return number

    return read


def _choice(*choices: str) -> Reader:
    def read(value: Any, flag: str) -> str:
        if value not in choices:
            raise RatelError("not one of the choices", field=flag, value=value, remedy=f"Use {' or '.join(choices)}")
        return str(value)

    return read


def _auto_or(reader: Reader) -> Reader:
    return lambda value, flag: "auto" if value == "auto" else reader(value, flag)


def _optional(reader: Reader) -> Reader:
    return lambda value, flag: None if value is None else reader(value, flag)


def _read_text(value: Any, flag: str) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise RatelError("must be a name or a path", field=flag, value=repr(value))
    check_name(value, flag)
    return os.fspath(value)


def check_name(path: str | os.PathLike[str], flag: str) -> None:
    """Libraries that a run writes files with at its end, and JSON, know no other names."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise RatelError("has a name that is not UTF-8", field=flag, value=shown,
                         remedy="Rename it, or go there by a link whose name is") from None


def _read_switch(value: Any, flag: str) -> bool:
    if not isinstance(value, bool):
        raise RatelError("must be true or false", field=flag, value=repr(value))
    return value


def _read_dirs(value: Any, flag: str) -> tuple[str, ...]:
    """Directories from ``"/mnt/a,/mnt/b"`` or a list; the same one twice would be two stripes on
    one device."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    dirs = tuple(_read_text(part.strip() if isinstance(part, str) else part, flag) for part in parts)
    if len({os.path.realpath(path) for path in dirs}) < len(dirs):
        raise RatelError("names the same directory twice", field=flag, value=",".join(dirs))
    return dirs


def _read_betas(value: Any, flag: str) -> tuple[float, float]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        raise RatelError("must be two numbers", field=flag, value=repr(value), remedy="Write it like 0.9,0.999")
    read = number_reader(float, 0, 1, below=True)
    return read(parts[0], flag), read(parts[1], flag)


def _read_router(value: Any, flag: str) -> float | str:
    return value if value in ("auto", "off") else number_reader(float, 0, above=True)(value, flag)


_NO_BUDGET = 2048
"""What is given as a number of bytes may be anything a program computes; not so little."""


def _check_unit(value: Any, number: float, flag: str, counted: str, meant: str) -> None:
    """A bare number that is next to nothing was meant in a larger unit."""
    bare = value.strip() if isinstance(value, str) else str(value)
    if bare.isdigit() and 0 < number < (MIB if isinstance(value, str) else _NO_BUDGET):
        raise RatelError(f"is {number:.0f} {counted}", field=flag, value=value, remedy=f"Write the unit: {bare}{meant}")


def _bytes(value: Any, flag: str) -> int:
    num_bytes = parse_bytes(value, field=flag)
    _check_unit(value, num_bytes, flag, "bytes", "GiB")
    if num_bytes == 0:
        raise RatelError("must be above 0", field=flag, value=value, remedy="Leave it out to take it from the machine")
    return num_bytes


def _rate(value: Any, flag: str) -> float:
    rate_bps = parse_rate(value, field=flag)
    _check_unit(value, rate_bps, flag, "bytes a second", "GB/s")
    if rate_bps == 0:
        raise RatelError("must be above 0", field=flag, value=value, remedy="Leave it out for no cap")
    return rate_bps


NEXT_TOKEN, CLASSIFY, TOKENS, MASKED_LM = TASKS = ("next-token", "classify", "tokens", "masked-lm")
"""What a model may be trained for."""

MODEL, TRAINING, MEMORY, REPORT = "model and data", "training", "memory and devices", "output"


def _option(default: Any, read: Reader, group: str, metavar: str | None, text: str) -> Any:
    option = Option(read=read, help=text, group=group, metavar=metavar, is_switch=read is _read_switch)
    return field(default=default, metadata={"option": option})


_COUNT, _AMOUNT = number_reader(int, 1), number_reader(int, 0)
_ROWS, _SEED, _THREADS = number_reader(int, 1, MOST_AT_ONCE), number_reader(int, 0, MOST_SEED), number_reader(int, 1, MOST_THREADS)
_SHARE = number_reader(float, 0, 1, below=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What ``ratel train`` does, complete and checked. Sizes are bytes, rates bytes per second."""

    model: str | None = _option(None, _optional(_read_text), MODEL, "DIR|PRESET",
                                "Hugging Face directory, or the name of a preset to start from scratch")
    task: str = _option(NEXT_TOKEN, _choice(*TASKS), MODEL, "|".join(TASKS),
                        "what the model learns: the next token, a text's label, each word's label, or tokens that are hidden")
    unchecked: bool = _option(False, _read_switch, MODEL, None,
                              "train even if the check of a small copy, made once for each kind of model, finds it wrong")
    data: str | None = _option(None, _optional(_read_text), MODEL, "FILE|DIR",
                               ".txt or .jsonl file, or a directory of them (default: the bundled example text)")
    skip_bad_lines: bool = _option(False, _read_switch, MODEL, None, "pass over lines of .jsonl files that are not as documented; "
                                                                     "OUT/skipped.json lists them")
    tokenizer: str | None = _option(None, _optional(_read_text), MODEL, "DIR",
                                    "directory with a tokenizer (default: the model's own; bytes where it has none)")
    optimizer_state: str | None = _option(None, _optional(_read_text), MODEL, "DIR|FILE",
                                          "AdamW's moments and step count to start from, as `ratel export --optimizer` "
                                          "and ratel.save_adamw_state write them (default: none)")
    eval_data: str | None = _option(None, _optional(_read_text), MODEL, "FILE|DIR", "held-out text to evaluate on")
    eval_fraction: float = _option(0.01, _SHARE, MODEL, "F",
                                   "without --eval-data, hold out this share of the documents (0: none)")
    eval_every: int = _option(0, _AMOUNT, MODEL, "N", "evaluate every N steps (0: at the end only)")
    eval_sequences: int = _option(64, _AMOUNT, MODEL, "N", "sequences of one evaluation at most (0: no limit)")
    seed: int = _option(0, _SEED, MODEL, "N", "seed of initialisation, shuffling and dropout")

    steps: int = _option(100, _COUNT, TRAINING, "N", "optimizer steps")
    batch_size: int = _option(32, _ROWS, TRAINING, "N", "sequences per step")
    micro_batch: int | str = _option("auto", _auto_or(_ROWS), TRAINING, "auto|N", "sequences in a block at once")
    seq_len: int = _option(1024, number_reader(int, 2, MOST_AT_ONCE), TRAINING, "N", "tokens per sequence")
    lr: float = _option(1e-5, number_reader(float, 0, above=True), TRAINING, "X", "peak learning rate")
    min_lr: float = _option(0.0, number_reader(float, 0), TRAINING, "X", "learning rate at the end of a decaying schedule")
    schedule: str = _option("cosine", _choice("constant", "linear", "cosine"), TRAINING, "constant|linear|cosine",
                            "course of the learning rate after the warm-up")
    warmup_steps: int | str = _option("auto", _auto_or(_AMOUNT), TRAINING, "auto|N",
                                      "steps of linear warm-up (auto: 10, but at most a tenth of the steps)")
    optimizer: str = _option("auto", _choice("auto", "eager", "deferred", "speculative"), TRAINING,
                             "auto|eager|deferred|speculative",
                             "when updates run: under backward, under the next forward, or some of them under each; the "
                             "result is the same")
    betas: tuple[float, float] = _option((0.9, 0.999), _read_betas, TRAINING, "B1,B2", "AdamW's decay rates")
    eps: float = _option(1e-8, number_reader(float, 0, above=True), TRAINING, "X", "AdamW's epsilon")
    weight_decay: float = _option(0.0, number_reader(float, 0), TRAINING, "X", "weight decay of all but norms and biases")
    max_grad_norm: float = _option(1.0, number_reader(float, 0), TRAINING, "X", "clip the global norm here (0: do not clip)")
    router_aux_loss: float | str = _option("auto", _read_router, TRAINING, "auto|off|COEF",
                                           "loss that keeps the experts of a router in use alike (auto: if config.json has "
                                           "output_router_logits, with its coefficient)")
    dtype: str = _option("auto", _choice("auto", "bf16", "fp32"), TRAINING, "auto|bf16|fp32",
                         "type of the computation (auto: bf16 on a GPU or a processor that has bf16, else fp32)")
    attention: str = _option("auto", _choice("auto", "sdpa", "eager", "flash"), TRAINING, "auto|sdpa|eager|flash",
                             "kernel of the attention; flash needs the package flash-attn")
    compile: str = _option("off", _choice("off", "on"), TRAINING, "off|on",
                           "fuse the operations of blocks (torch.compile): faster steps, other roundings, a slower start")
    deterministic: bool = _option(False, _read_switch, TRAINING, None,
                                  "use only kernels that give the same bits every time: another run of the same ends equal, "
                                  "on a GPU too")

    device: str = _option("auto", _choice("auto", "cuda", "cpu"), MEMORY, "auto|cuda|cpu", "where the model computes")
    gpu_memory: int | None = _option(None, _optional(_bytes), MEMORY, "SIZE",
                                     "GPU memory to use (default: what is free)")
    dram: int | None = _option(None, _optional(_bytes), MEMORY, "SIZE", "host memory to use (default: what is free)")
    ssd: tuple[str, ...] = _option((), _read_dirs, MEMORY, "DIR[,DIR]", "directories for states, striped over all")
    ssd_bandwidth: float | None = _option(None, _optional(_rate), MEMORY, "RATE",
                                          "slow each SSD directory down to this, to see what another disk would do")
    hardware: str = _option("auto", _read_text, MEMORY, "auto|none|NAME|FILE",
                            "rates to plan with (auto: this GPU machine's; none: place by a simple rule instead)")
    tier: str = _option("auto", _choice("auto", "gpu", "dram", "ssd"), MEMORY, "auto|gpu|dram|ssd",
                        "force all model states into one tier")
    checkpoint_tier: str = _option("auto", _choice("auto", "gpu", "dram", "ssd"), MEMORY, "auto|gpu|dram|ssd",
                                   "force the blocks' saved inputs into one tier")
    activations: str = _option("auto", _choice("auto", "recompute", "spill", "gpu", "dram", "ssd"), MEMORY,
                               "auto|recompute|spill|gpu|dram|ssd",
                               "what becomes of results inside blocks that backward needs: computed again, computed again "
                               "and passed through DRAM, or kept in a tier")
    io_backend: str = _option("auto", _choice("auto", "io_uring", "threads"), MEMORY, "auto|io_uring|threads",
                              "how files are read and written; a forced one never falls back")
    direct: str = _option("auto", _choice("auto", "on", "off"), MEMORY, "auto|on|off", "bypass the page cache")
    checksums: str = _option("on", _choice("on", "off"), MEMORY, "on|off",
                             "check every byte that comes back from an SSD against what was written")
    optimizer_threads: int | str = _option("auto", _auto_or(_THREADS), MEMORY, "auto|N", "threads of the CPU optimizer")

    out: str | None = _option(None, _optional(_read_text), REPORT, "DIR",
                              "where results go (default: a new directory runs/MODEL or runs/MODEL-2, ...)")
    overwrite: bool = _option(False, _read_switch, REPORT, None, "replace the results of an earlier run in --out")
    save_every: int = _option(0, _AMOUNT, REPORT, "N",
                              "make the training state last every N steps and at the end (0: never)")
    durable: str = _option("auto", _choice("auto", "step", "checkpoint"), REPORT, "auto|step|checkpoint",
                           "how: commits in place on the SSDs, with two versions of everything, or copies in OUT/state")
    keep_best: bool = _option(False, _read_switch, REPORT, None,
                              "also keep the copy with the lowest evaluation loss")
    keep: int = _option(1, _COUNT, REPORT, "K", "states to keep; an older one goes once a newer one is complete")
    resume: bool = _option(False, _read_switch, REPORT, None,
                           "continue the run in --out from its newest state; options not given are as they were")
    export: bool = _option(True, _read_switch, REPORT, None, "write the trained model to OUT/model")
    log_every: int = _option(10, _COUNT, REPORT, "N", "steps between progress lines where there is no terminal")
    trace: str | None = _option(None, _optional(_read_text), REPORT, "FILE",
                                "write what every resource and thread did in the third step (or the last of fewer), for Perfetto")
    quiet: bool = _option(False, _read_switch, REPORT, None, "show no progress")

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = option_of(spec).read(getattr(self, spec.name), flag_of(spec.name))
            object.__setattr__(self, spec.name, value)
        self._check_training()
        self._check_places()
        self._check_saving()
        self._check_resuming()

    def _check_training(self) -> None:
        if self.batch_size * self.seq_len > MOST_TOKENS:
            raise RatelError(f"with --seq-len {self.seq_len} makes steps of more than {MOST_TOKENS:,} tokens", field="--batch-size",
                             value=self.batch_size, remedy="Give fewer sequences")
        if self.min_lr > self.lr:
            raise RatelError(f"is above --lr {self.lr:g}", field="--min-lr", value=self.min_lr)
        if self.warmup_steps != "auto" and self.warmup_steps > self.steps:
            raise RatelError(f"is more than --steps {self.steps}", field="--warmup-steps", value=self.warmup_steps)
        if self.eval_every and not (self.eval_data or self.eval_fraction):
            raise RatelError("there is nothing to evaluate on", field="--eval-every", value=self.eval_every,
                             remedy="Give --eval-data FILE or --eval-fraction 0.01 as well")

    def _check_places(self) -> None:
        for flag, tier in (("--tier", self.tier), ("--checkpoint-tier", self.checkpoint_tier),
                           ("--activations", self.activations)):
            if tier == "ssd" and not self.ssd:
                raise RatelError("needs a directory", field=flag, value=tier, remedy="Give --ssd DIR as well")
        for path in self.ssd:
            check_name(os.path.realpath(path), "--ssd")  # records of a run name its files from the root on
        check_can_write(self.trace, "--trace")

    def _check_saving(self) -> None:
        if self.durable == "step" and self.save_every == 0:
            object.__setattr__(self, "save_every", 1)
        if self.durable == "step" and self.keep > 1:
            raise RatelError("commits in place are one state, the newest", field="--keep", value=self.keep,
                             remedy="Use --keep 1, or --durable checkpoint to keep more")
        if self.keep_best and not self.eval_every:
            raise RatelError("nothing says which state is best", field="--keep-best", value=True,
                             remedy="Give --eval-every N as well")
        if self.keep_best and not self.save_every:
            raise RatelError("no states are kept", field="--keep-best", value=True, remedy="Give --save-every N as well")
        if self.keep > 1 and not self.save_every:
            raise RatelError("no states are saved", field="--keep", value=self.keep, remedy="Give --save-every N as well")

    def _check_resuming(self) -> None:
        if self.resume and self.out is None:
            raise RatelError("which run is to be continued is not said", field="--resume",
                             remedy="Give --out DIR, that run's directory")
        if self.resume and self.overwrite:
            raise RatelError("contradicts --overwrite", field="--resume", remedy="Give one of them")

    @property
    def num_warmup_steps(self) -> int:
        return min(10, self.steps // 10) if self.warmup_steps == "auto" else int(self.warmup_steps)

    def to_json(self) -> dict[str, Any]:
        """The resolved configuration; feeding it back gives the same run."""
        return json.loads(json.dumps({spec.name: getattr(self, spec.name) for spec in fields(self)}))


def check_can_write(path: str | os.PathLike[str] | None, flag: str) -> None:
    """Before the work that comes before what is written there."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise RatelError("cannot be written: its directory does not exist", field=flag, value=path)


def read_options(**given: Any) -> dict[str, Any]:
    """Values of some of the options, by name, as a whole configuration would read them."""
    specs = {spec.name: spec for spec in fields(TrainConfig)}
    return {name: option_of(specs[name]).read(value, name) for name, value in given.items()}


def option_of(spec: Field) -> Option:
    return spec.metadata["option"]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(values: Mapping[str, Any], file: str | os.PathLike[str] | None = None) -> TrainConfig:
    """Defaults, overridden by the TOML ``file``, overridden by ``values`` (flags or keyword
    arguments)."""
    merged = read_file(Path(file)) if file is not None else {}
    for name, value in values.items():
        merged[_known(name, "")] = value
    return TrainConfig(**merged)


def read_file(path: Path) -> dict[str, Any]:
    """The options in a TOML file; keys are spelled as the flags, with ``-`` or ``_``."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise RatelError(f"cannot be read: {error.strerror}", field="--config", value=path,
                         remedy="Check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RatelError(f"is not TOML: {reason}", field="--config", value=path,
                         remedy="Write one `option = value` on a line, with texts in quotes") from error
    options: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            raise RatelError(f"is a table in {path}", field=f"[{key}]", remedy="Write options without a table above them")
        name = _known(key, f" in {path}")
        if name in options:
            raise RatelError(f"stands twice in {path}, with - and with _", field=key, remedy="Leave one of them")
        options[name] = value
    return options


def _known(key: str, where: str) -> str:
    names = [spec.name for spec in fields(TrainConfig)]
    name = key.replace("-", "_")
    if name in names:
        return name
    meant = meant_by(name)
    close = [meant] if meant else difflib.get_close_matches(name, names, n=1)
    remedy = f"Did you mean {close[0]}?" if close else "See `ratel train --help` for the options"
    raise RatelError(f"is not an option{where}", field=key, remedy=remedy)
