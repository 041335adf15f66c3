"""Every option, once: the tables below give the flags, the TOML keys, the defaults and the help.

Values arrive as flag text, TOML or Python objects; the option's reader makes one kind of them and
refuses the rest. A new option is a line here, and what uses it.
"""

import json
import os
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from ratel.config.readers import (MOST_AT_ONCE, MOST_SEED, MOST_THREADS, MOST_TOKENS, Reader, adapter, auto_or, betas_reader, by_pattern,
                                  check_can_write, check_name, choice_reader, directories_reader, layer_numbers, names, names_or_text,
                                  number_reader, optional, rate, router_loss, size, switch, text_option)
from ratel.errors import RatelError

NEXT_TOKEN, CLASSIFY, TOKENS, MASKED_LM = TASKS = ("next-token", "classify", "tokens", "masked-lm")
"""What a model may be trained for."""

STATES = ("exact", "bf16", "8bit")
"""How the optimizer's states may be stored: the names of `ratel.planner.formats.FORMATS`."""

MODEL, TRAINING, ADAPTERS, MEMORY, REPORT = "model and data", "training", "adapters (LoRA)", "memory and devices", "output"

LR, ADAPTER_LR = 1e-5, 1e-4
"""Peak learning rates, where none is given. An adapter's matrices are small, and begin at zero."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """How one field of the configuration is spelled, explained and read."""

    read: Reader
    help: str
    group: str
    metavar: str | None = None
    plans: bool = False
    """A plan depends on it: `ratel plan` has it, and a plan that was made before is taken again
    only with the same."""

    @property
    def is_table(self) -> bool:
        """A TOML file may have a table for it."""
        return self.read in _TABLES

    @property
    def is_switch(self) -> bool:
        return self.read is switch


def _option(default: Any, read: Reader, group: str, metavar: str | None, text: str, *, plans: bool = False) -> Any:
    return field(**_default(default), metadata={"option": Option(read=read, help=text, group=group, metavar=metavar, plans=plans)})


def _default(value: Any) -> dict[str, Any]:
    return {"default_factory": dict} if value == {} else {"default": value}


def option_of(spec: Field) -> Option:
    return spec.metadata["option"]


_RANKS, _ALPHAS = by_pattern(number_reader(int, 1)), by_pattern(number_reader(float, 0, above=True))
_TABLES = (_RANKS, _ALPHAS)
_COUNT, _AMOUNT = number_reader(int, 1), number_reader(int, 0)
_ROWS, _SEED, _THREADS = number_reader(int, 1, MOST_AT_ONCE), number_reader(int, 0, MOST_SEED), number_reader(int, 1, MOST_THREADS)
_SHARE = number_reader(float, 0, 1, below=True)


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What a run and a `ratel.Session` of one's own both take. Sizes are bytes, rates bytes per
    second."""

    task: str = _option(NEXT_TOKEN, choice_reader(*TASKS), MODEL, "|".join(TASKS),
                        "what the model learns: the next token, a text's label, each word's label, or tokens that are hidden", plans=True)
    optimizer_state: str | None = _option(None, optional(text_option), MODEL, "DIR|FILE",
                                          "AdamW's moments and step count to start from, as `ratel export --optimizer` "
                                          "and ratel.save_adamw_state write them (default: none)")
    seed: int = _option(0, _SEED, MODEL, "N", "seed of initialisation, shuffling and dropout")

    micro_batch: int | str = _option("auto", auto_or(_ROWS), TRAINING, "auto|N", "sequences in a block at once", plans=True)
    lr: float = _option(None, optional(number_reader(float, 0, above=True)), TRAINING, "X",
                        "peak learning rate (default: 1e-5, of adapters 1e-4)")
    optimizer: str = _option("auto", choice_reader("auto", "eager", "deferred", "speculative"), TRAINING,
                             "auto|eager|deferred|speculative",
                             "when updates run: under backward, under the next forward, or some of them under each; the "
                             "result is the same", plans=True)
    betas: tuple[float, float] = _option((0.9, 0.999), betas_reader, TRAINING, "B1,B2", "AdamW's decay rates")
    eps: float = _option(1e-8, number_reader(float, 0, above=True), TRAINING, "X", "AdamW's epsilon")
    weight_decay: float = _option(0.0, number_reader(float, 0), TRAINING, "X", "weight decay of all but norms and biases")
    max_grad_norm: float = _option(1.0, number_reader(float, 0), TRAINING, "X", "clip the global norm here (0: do not clip)", plans=True)
    router_aux_loss: float | str = _option("auto", router_loss, TRAINING, "auto|off|COEF",
                                           "loss that keeps the experts of a router in use alike (auto: if config.json has "
                                           "output_router_logits, with its coefficient)")
    dtype: str = _option("auto", choice_reader("auto", "bf16", "fp32"), TRAINING, "auto|bf16|fp32",
                         "type of the computation (auto: bf16 on a GPU or a processor that has bf16, else fp32)", plans=True)
    attention: str = _option("auto", choice_reader("auto", "sdpa", "eager", "flash"), TRAINING, "auto|sdpa|eager|flash",
                             "kernel of the attention; flash needs the package flash-attn", plans=True)
    compile: str = _option("off", choice_reader("off", "on"), TRAINING, "off|on",
                           "fuse the operations of blocks (torch.compile): faster steps, other roundings, a slower start", plans=True)

    lora: "int | str | dict[str, Any] | None" = _option(
        None, optional(adapter), ADAPTERS, "RANK|DIR",
        "train an adapter of this rank beside the frozen model, or go on with the one in a directory (default: train the model itself)",
        plans=True)
    lora_alpha: float | None = _option(None, optional(number_reader(float, 0, above=True)), ADAPTERS, "X",
                                       "the adapter counts alpha / rank times (default: 8)", plans=True)
    lora_dropout: float | None = _option(None, optional(number_reader(float, 0, 1, below=True)), ADAPTERS, "P",
                                         "dropout of what the adapter sees (default: 0)", plans=True)
    lora_targets: "str | tuple[str, ...] | None" = _option(
        None, optional(names_or_text), ADAPTERS, "all-linear|NAME,...|REGEX",
        "layers that get one: all but the output layer, those whose names end so, or whose whole names fit (default: all-linear)", plans=True)
    lora_exclude: "str | tuple[str, ...] | None" = _option(None, optional(names_or_text), ADAPTERS, "NAME,...|REGEX",
                                                           "layers among the targets that get none", plans=True)
    lora_parameters: tuple[str, ...] = _option((), names, ADAPTERS, "NAME,...",
                                               "parameters of other modules that get one, such as fused experts", plans=True)
    lora_init: str | None = _option(None, optional(text_option), ADAPTERS, "default|gaussian|pissa|olora",
                                    "what it begins with; pissa and olora take it from the model's weights (default: default)", plans=True)
    rslora: bool = _option(False, switch, ADAPTERS, None, "count the adapter alpha / sqrt(rank) times", plans=True)
    dora: bool = _option(False, switch, ADAPTERS, None, "train the length of each output's weights by itself (DoRA)", plans=True)
    lora_rank_pattern: dict[str, int] = _option({}, _RANKS, ADAPTERS, "REGEX=N,...",
                                                "other ranks for layers whose names end so", plans=True)
    lora_alpha_pattern: dict[str, float] = _option({}, _ALPHAS, ADAPTERS, "REGEX=X,...",
                                                   "other alphas for layers whose names end so", plans=True)
    lora_full: tuple[str, ...] = _option((), names, ADAPTERS, "NAME,...",
                                         "modules that are trained as a whole and stored with the adapter", plans=True)
    lora_layers: tuple[int, ...] = _option((), layer_numbers, ADAPTERS, "N,...", "of a list of targets, only those in these layers",
                                           plans=True)
    lora_layers_pattern: tuple[str, ...] = _option((), names, ADAPTERS, "NAME,...",
                                                   "what stands before a layer's number in names", plans=True)
    lora_tied: bool = _option(False, switch, ADAPTERS, None,
                              "keep an embedding and a head that are one weight one, with one adapter", plans=True)
    lora_graph: str = _option("auto", text_option, ADAPTERS, "auto|flops|bytes|time|NAME",
                              "order of an adapted layer's products (docs/lora_compute.md)", plans=True)

    device: str = _option("auto", choice_reader("auto", "cuda", "cpu"), MEMORY, "auto|cuda|cpu", "where the model computes", plans=True)
    gpu_memory: int | None = _option(None, optional(size), MEMORY, "SIZE",
                                     "GPU memory to use (default: what is free)", plans=True)
    dram: int | None = _option(None, optional(size), MEMORY, "SIZE", "host memory to use (default: what is free)", plans=True)
    ssd: tuple[str, ...] = _option((), directories_reader("names the same directory twice"), MEMORY, "DIR[,DIR]", "directories for states, striped over all", plans=True)
    ssd_bandwidth: float | None = _option(None, optional(rate), MEMORY, "RATE",
                                          "slow each SSD directory down to this, to see what another disk would do", plans=True)
    hardware: str = _option("auto", text_option, MEMORY, "auto|none|NAME|FILE",
                            "rates to plan with (auto: this GPU machine's; none: place by a simple rule instead)", plans=True)
    states: str = _option("exact", choice_reader(*STATES), MEMORY, "|".join(STATES),
                          "how AdamW's states are stored: 12 bytes a parameter, 8 with moments in bf16, or 6.1 with moments in 8 bits", plans=True)
    tier: str = _option("auto", choice_reader("auto", "gpu", "dram", "ssd"), MEMORY, "auto|gpu|dram|ssd",
                        "force all model states into one tier", plans=True)
    checkpoint_tier: str = _option("auto", choice_reader("auto", "gpu", "dram", "ssd"), MEMORY, "auto|gpu|dram|ssd",
                                   "force the blocks' saved inputs into one tier", plans=True)
    activations: str = _option("auto", choice_reader("auto", "recompute", "spill", "gpu", "dram", "ssd"), MEMORY,
                               "auto|recompute|spill|gpu|dram|ssd",
                               "what becomes of results inside blocks that backward needs: computed again, computed again "
                               "and passed through DRAM, or kept in a tier", plans=True)
    io_backend: str = _option("auto", choice_reader("auto", "io_uring", "threads"), MEMORY, "auto|io_uring|threads",
                              "how files are read and written; a forced one never falls back")
    direct: str = _option("auto", choice_reader("auto", "on", "off"), MEMORY, "auto|on|off", "bypass the page cache")
    checksums: str = _option("on", choice_reader("on", "off"), MEMORY, "on|off",
                             "check every byte that comes back from an SSD against what was written")
    optimizer_threads: int | str = _option("auto", auto_or(_THREADS), MEMORY, "auto|N", "threads of the CPU optimizer")

    durable: str = _option("auto", choice_reader("auto", "step", "checkpoint"), REPORT, "auto|step|checkpoint",
                           "how: commits in place on the SSDs, with two versions of everything, or copies in OUT/state", plans=True)

    def __post_init__(self) -> None:
        for spec in options_of(type(self)):
            value = option_of(spec).read(getattr(self, spec.name), self.spelled(spec.name))
            object.__setattr__(self, spec.name, value)
        if self.lr is None:
            object.__setattr__(self, "lr", LR if self.lora is None else ADAPTER_LR)

    @staticmethod
    def spelled(name: str) -> str:
        """As whoever gives it knows it."""
        return name


def _grouped(config: type[CommonOptions]) -> type[CommonOptions]:
    """Its fields in the order in which help and docs show them: by group, in each a class's own
    before the common ones."""
    common, groups = CommonOptions.__dataclass_fields__, (MODEL, TRAINING, ADAPTERS, MEMORY, REPORT)
    config.__dataclass_fields__ = dict(sorted(config.__dataclass_fields__.items(), key=lambda item: (
        groups.index(option_of(item[1]).group), item[0] in common)))
    return config


@_grouped
@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommonOptions):
    """What ``ratel train`` does, complete and checked."""

    model: str | None = _option(None, optional(text_option), MODEL, "DIR|PRESET",
                                "Hugging Face directory, or the name of a preset to start from scratch", plans=True)
    unchecked: bool = _option(False, switch, MODEL, None,
                              "train even if the check of a small copy, made once for each kind of model, finds it wrong")
    data: str | None = _option(None, optional(text_option), MODEL, "FILE|DIR",
                               ".txt or .jsonl file, or a directory of them (default: the bundled example text)")
    skip_bad_lines: bool = _option(False, switch, MODEL, None, "pass over lines of .jsonl files that are not as documented; "
                                                                     "OUT/skipped.json lists them")
    tokenizer: str | None = _option(None, optional(text_option), MODEL, "DIR",
                                    "directory with a tokenizer (default: the model's own; bytes where it has none)")
    eval_data: str | None = _option(None, optional(text_option), MODEL, "FILE|DIR", "held-out text to evaluate on")
    eval_fraction: float = _option(0.01, _SHARE, MODEL, "F",
                                   "without --eval-data, hold out this share of the documents (0: none)")
    eval_every: int = _option(0, _AMOUNT, MODEL, "N", "evaluate every N steps (0: at the end only)")
    eval_sequences: int = _option(64, _AMOUNT, MODEL, "N", "sequences of one evaluation at most (0: no limit)")

    steps: int = _option(100, _COUNT, TRAINING, "N", "optimizer steps")
    batch_size: int = _option(32, _ROWS, TRAINING, "N", "sequences per step", plans=True)
    seq_len: int = _option(1024, number_reader(int, 2, MOST_AT_ONCE), TRAINING, "N", "tokens per sequence", plans=True)
    min_lr: float = _option(0.0, number_reader(float, 0), TRAINING, "X", "learning rate at the end of a decaying schedule")
    schedule: str = _option("cosine", choice_reader("constant", "linear", "cosine"), TRAINING, "constant|linear|cosine",
                            "course of the learning rate after the warm-up")
    warmup_steps: int | str = _option("auto", auto_or(_AMOUNT), TRAINING, "auto|N",
                                      "steps of linear warm-up (auto: 10, but at most a tenth of the steps)")
    deterministic: bool = _option(False, switch, TRAINING, None,
                                  "use only kernels that give the same bits every time: another run of the same ends equal, "
                                  "on a GPU too", plans=True)

    out: str | None = _option(None, optional(text_option), REPORT, "DIR",
                              "where results go (default: a new directory runs/MODEL or runs/MODEL-2, ...)")
    overwrite: bool = _option(False, switch, REPORT, None, "replace the results of an earlier run in --out")
    save_every: int = _option(0, _AMOUNT, REPORT, "N",
                              "make the training state last every N steps and at the end (0: never)", plans=True)
    keep_best: bool = _option(False, switch, REPORT, None,
                              "also keep the copy with the lowest evaluation loss")
    keep: int = _option(1, _COUNT, REPORT, "K", "states to keep; an older one goes once a newer one is complete")
    resume: bool = _option(False, switch, REPORT, None,
                           "continue the run in --out from its newest state; options not given are as they were")
    export: bool = _option(True, switch, REPORT, None, "write the trained model to OUT/model, an adapter to OUT/adapter")
    log_every: int = _option(10, _COUNT, REPORT, "N", "steps between progress lines where there is no terminal")
    trace: str | None = _option(None, optional(text_option), REPORT, "FILE",
                                "write what every resource and thread did in the third step (or the last of fewer), for Perfetto")
    quiet: bool = _option(False, switch, REPORT, None, "show no progress")

    def __post_init__(self) -> None:
        super().__post_init__()
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

    @staticmethod
    def spelled(name: str) -> str:
        return flag_of(name)

    @property
    def durability(self) -> str:
        """As a session is asked for it: commits are one state, the newest."""
        if not self.save_every:
            return "off"
        return "checkpoint" if self.durable == "auto" and (self.keep > 1 or self.keep_best) else self.durable

    @property
    def num_warmup_steps(self) -> int:
        return min(10, self.steps // 10) if self.warmup_steps == "auto" else int(self.warmup_steps)

    def to_json(self) -> dict[str, Any]:
        """The resolved configuration; feeding it back gives the same run."""
        return json.loads(json.dumps({spec.name: getattr(self, spec.name) for spec in fields(self)}))


def varied(name: str, read: Reader, **default: Any) -> Any:
    """A common option for a class that reads it otherwise, or has another default."""
    spec = CommonOptions.__dataclass_fields__[name]
    return field(default=default.get("default", spec.default), metadata={"option": replace(option_of(spec), read=read)})


def options_of(config: type[CommonOptions]) -> list[Field]:
    return [spec for spec in fields(config) if "option" in spec.metadata]


def planned_options(config: type[CommonOptions]) -> tuple[str, ...]:
    """The names of those that a plan depends on."""
    return tuple(spec.name for spec in options_of(config) if option_of(spec).plans)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")
