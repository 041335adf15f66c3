"""Forward and backward of whole models with adapters, in the memory of the device: ours in orders
of one's choice, beside peft's.

Weights and tokens are random; adapters have the same values on both sides, B included, so that
losses and gradients can be compared. Adapters are in the dtype of the weights on both sides, which
is how RunLoRA measures peft, and faster than peft's own fp32. Nothing is run twice (no
checkpointing).
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.lora.compute import Draws, adapt_layers, choice
from ratel.lora.compute.graphs import Size
from ratel.lora.compute.modules import AdaptedLinear
from ratel.lora.describe.config import LoraConfig
from ratel.lora.describe.layers import AdaptedLayer
from ratel.lora.describe.outline import CONV1D, LINEAR, outline_of
from ratel.lora.describe.targets import resolve
from ratel.lora.values.initial import seed_of
from ratel.models.checkpoints.config import read_config
from ratel.models.presets import preset_config
from ratel.training.bench.published import MODELS, Row
from ratel.training.bench.step import random_tokens

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LEAST_RUNS = 10
WARM_RUNS = 2
"""After the first, which compiles kernels and finds orders. The memory is these runs' peak."""
ADAPTER_STD = 0.02
SMALLER = 0.75
"""What is left of a batch that does not fit."""

Point = dict[str, Any]
Run = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class AdaptedWork:
    """``model``: one of RunLoRA's, a preset, a directory, or a file with a configuration.
    ``seq_len``: None for the longest that the model takes. ``peft``: ``auto`` takes plain PyTorch
    in its place where it cannot be imported. ``min_run_s``: of each implementation, and at least
    `LEAST_RUNS` runs."""

    model: str
    batch: int = 10
    seq_len: int | None = None
    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """All linears but the head where there are none."""
    criteria: tuple[str, ...] = ("auto",)
    dtype: str = "bf16"
    device: torch.device = torch.device("cuda")
    peft: str = "auto"
    min_run_s: float = 10.0
    has_scheme: bool = False
    """Whether the result says how each layer is computed."""

    @classmethod
    def of(cls, row: Row, **given: Any) -> "AdaptedWork":
        """``given`` may have another batch or length."""
        own = {"model": row.model, "batch": row.batch, "seq_len": row.seq_len, "rank": row.rank, "targets": row.targets}
        return cls(**{**own, **given})


# --- one row -------------------------------------------------------------------------------------------------------

def measure(work: AdaptedWork, progress: Callable[[str], None] = lambda text: None) -> Point:
    """JSON-ready: what was measured, each of ``criteria``, and the peer. A batch that does not fit
    into memory is made smaller for all of them."""
    for criterion in work.criteria:
        choice.check(criterion)
    work = replace(work, seq_len=_sequence(work))
    asked = work.batch
    while True:
        found = _tried(work, progress)
        if found is not None:
            return {"model": work.model, "batch": work.batch, "asked_batch": asked, "seq_len": work.seq_len, "rank": work.rank,
                    "alpha": work.alpha, "dropout": work.dropout, "dtype": work.dtype, "targets": list(work.targets),
                    "min_run_s": work.min_run_s, **found}
        if work.batch == 1:
            raise RatelError("does not fit into memory with a single sequence", field="--model", value=work.model,
                             remedy="Give a shorter --sequence_length")
        work = replace(work, batch=max(1, int(work.batch * SMALLER)))
        _forget()
        progress(f"out of memory: a batch of {work.batch}")


def _tried(work: AdaptedWork, progress: Callable[[str], None]) -> Point | None:
    """None where memory does not suffice. The error's frames hold tensors, so it ends here."""
    try:
        ours = []
        for criterion in work.criteria:
            ours.append(_measured(work, criterion))
            progress(_said(ours[-1]))
        peer = _measured(work, None)
        progress(_said(peer))
        return {"ours": ours, "peer": peer}
    except torch.OutOfMemoryError:
        return None


def _said(result: Point) -> str:
    return f"{result['name']}: {result['mean_s'] * 1e3:.2f} ms"


def _measured(work: AdaptedWork, criterion: str | None) -> Point:
    """One implementation on a model of its own; None: the peer."""
    _forget()
    model = build(work)
    layers = adapted_layers(work, model)
    if criterion is None:
        name, model, draws = *put_peer(work, model, layers), None
    else:
        name, draws = criterion, put_ours(work, model, layers, criterion)
    assert work.seq_len is not None
    tokens = random_tokens(0, work.batch, work.seq_len, model.config.vocab_size).to(work.device)
    result = {"name": name, **timed(work, model, tokens, draws)}
    if criterion is not None and work.has_scheme:
        result["scheme"] = scheme(work, model)
    return result


def timed(work: AdaptedWork, model: nn.Module, tokens: Tensor, draws: Draws | None) -> Point:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = 0

    def run() -> Tensor:
        nonlocal step
        step += 1
        if draws is not None:
            draws.begin(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    def timed_run() -> float:
        for parameter in trained:
            parameter.grad = None
        _settle(work.device)
        begun = time.perf_counter()
        run()
        _settle(work.device)
        return time.perf_counter() - begun

    loss = float(run().detach())
    norm = float(torch.stack([p.grad.float().norm() for p in trained]).norm())
    memory = _peaks(work.device, trained, lambda: [timed_run() for _ in range(WARM_RUNS)])
    seconds: list[float] = []
    while len(seconds) < LEAST_RUNS or sum(seconds) < work.min_run_s:
        seconds.append(timed_run())
    return {"mean_s": statistics.fmean(seconds), "median_s": statistics.median(seconds), "least_s": min(seconds),
            "runs": len(seconds), "loss": loss, "gradient_norm": norm,
            "trained_parameters": sum(p.numel() for p in trained), **memory}


def _peaks(device: torch.device, trained: Sequence[nn.Parameter], run: Callable[[], Any]) -> dict[str, int | None]:
    """The largest memory in use and reserved while it runs, above weights and adapters; None on a
    processor, whose memory nobody counts."""
    for parameter in trained:
        parameter.grad = None
    if device.type != "cuda":
        run()
        return {"memory_bytes": None, "reserved_bytes": None}
    _forget()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    run()
    return {"memory_bytes": torch.cuda.max_memory_allocated(device) - before[0],
            "reserved_bytes": torch.cuda.max_memory_reserved(device) - before[1]}


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- models --------------------------------------------------------------------------------------------------------

def config_of(name: str) -> Any:
    """Raises RatelError for what is no model, file or directory."""
    from transformers import AutoConfig

    path = Path(name)
    if name in MODELS:
        settings = dict(MODELS[name])
    elif path.is_file():
        settings = _settings(path)
    else:
        return read_config(path) if path.is_dir() else preset_config(name)
    kind = settings.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **settings)
    except ValueError as error:
        raise RatelError("has no model_type that transformers knows", field="--model", value=name,
                         remedy='Give a configuration such as {"model_type": "llama", ...}') from error


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RatelError("is not JSON", field="--model", value=path, remedy="Give a model's config.json") from error
    return found if isinstance(found, dict) else {}


def _sequence(work: AdaptedWork) -> int:
    config = config_of(work.model)
    longest = getattr(config, "max_sequence_length", None) or config.max_position_embeddings
    if work.seq_len is not None and work.seq_len > longest:
        raise RatelError(f"is longer than the {longest} tokens that the model takes", field="--sequence_length",
                         value=work.seq_len, remedy="Give fewer")
    return work.seq_len or longest


def build(work: AdaptedWork) -> nn.Module:
    """Frozen; random weights, the same each time."""
    from transformers import AutoModelForCausalLM

    config = config_of(work.model)
    config.use_cache = False
    with torch.random.fork_rng(devices=[work.device] if work.device.type == "cuda" else []), work.device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[work.dtype], attn_implementation="sdpa")
    return model.requires_grad_(False).train()


# --- adapters ------------------------------------------------------------------------------------------------------

def adapted_layers(work: AdaptedWork, model: nn.Module) -> tuple[AdaptedLayer, ...]:
    given = {"targets": work.targets} if work.targets else {}
    layers = resolve(LoraConfig(rank=work.rank, alpha=work.alpha, dropout=work.dropout, **given), outline_of(model)).layers
    for layer in layers:
        if layer.kind not in (LINEAR, CONV1D):
            raise RatelError("is no linear layer", field="--target_modules", value=layer.name, remedy="Name linear layers")
    return layers


def adapter_values(work: AdaptedWork, layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """A and B, drawn from the layer's name."""
    generator = torch.Generator(work.device).manual_seed(seed_of(0, layer.name))
    a, b = (torch.randn(shape, generator=generator, device=work.device) * ADAPTER_STD
            for shape in (layer.a_shape, layer.b_shape))
    return a.to(DTYPES[work.dtype]), b.to(DTYPES[work.dtype])


def put_ours(work: AdaptedWork, model: nn.Module, layers: Sequence[AdaptedLayer], graph: str) -> Draws:
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors[f"{layer.name}.lora_A"], tensors[f"{layer.name}.lora_B"] = adapter_values(work, layer)
    draws = Draws(seed=0)
    adapt_layers(model, layers, tensors, draws=draws, graph=graph)
    return draws


def put_peer(work: AdaptedWork, model: nn.Module, layers: Sequence[AdaptedLayer]) -> tuple[str, nn.Module]:
    """What it is called, and the model with adapters of peft's or, without it, of plain PyTorch."""
    if has_peft(work.peft):
        import peft

        return f"peft {peft.__version__}", _with_peft(work, model, layers)
    for layer in layers:
        parent, _, child = layer.name.rpartition(".")
        plain = PlainLinear(model.get_submodule(layer.name), layer.rank, layer.alpha, layer.dropout)
        _fill(plain.lora_A, plain.lora_B, work, layer)
        setattr(model.get_submodule(parent), child, plain)
    return "plain PyTorch", model


def has_peft(wanted: str) -> bool:
    """``wanted``: auto, on or off."""
    is_there = find_spec("peft") is not None
    if wanted == "on" and not is_there:
        raise RatelError("peft is not installed", field="--peft", value=wanted, remedy="pip install peft, or use --peft auto")
    return is_there and wanted != "off"


def _with_peft(work: AdaptedWork, model: nn.Module, layers: Sequence[AdaptedLayer]) -> nn.Module:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(r=work.rank, lora_alpha=work.alpha, lora_dropout=work.dropout, bias="none", task_type="CAUSAL_LM",
                        target_modules=[layer.name for layer in layers])
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for layer in layers:
        module = model.get_submodule(layer.name)
        _fill(module.lora_A["default"], module.lora_B["default"], work, layer)
    return adapted


def _fill(a: nn.Linear, b: nn.Linear, work: AdaptedWork, layer: AdaptedLayer) -> None:
    with torch.no_grad():
        for linear, values in zip((a, b), adapter_values(work, layer), strict=True):
            linear.weight.copy_(values)


class PlainLinear(nn.Module):
    """What peft's Linear computes, with its parameters in the compute type (autocast_adapter_dtype
    false, which is peft's faster way)."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout) if dropout else nn.Identity()
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        outputs, inputs = base.weight.shape if isinstance(base, nn.Linear) else base.weight.shape[::-1]
        self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False, **like), nn.Linear(rank, outputs, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scale


def scheme(work: AdaptedWork, model: nn.Module) -> dict[str, str]:
    """By each layer's name, the orders that it is computed in. Linears that share their input take
    those of the first."""
    assert work.seq_len is not None
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, AdaptedLinear):
            continue
        first = module if module.shared is None else module.shared.members[0]
        size = Size(rows=work.batch * work.seq_len, inputs=first.in_features, outputs=first.out_features,
                    rank=first.adapter.rank, drops=first.p > 0, element_bytes=first.weight.element_size())
        forward, backward = choice.choose(first.graph, size, work.device, first.weight.dtype)
        found[name] = forward if forward == choice.FUSED else f"{forward}+{backward}"
    return found
