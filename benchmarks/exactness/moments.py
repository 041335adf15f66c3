"""Which 8 bits moments may be stored in: the same small model trained by a plain AdamW of PyTorch
whose moments pass through a format after every step, from several seeds.

    python -m benchmarks.exactness.moments --json benchmarks/results/h200_moments.json

Nothing of the runtime is in it. Formats are named by how the first and the second moment are
stored in blocks of 128: on a `linear` scale, on one of square roots (`sqrt`), or on a logarithmic
one of 5 bits of exponent and 3 of mantissa (`log`), rounded to `nearest` or by `draws`.
"""

import argparse
import json
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.exactness.states import SMALL, Text, files
from benchmarks.harness.report import Report
from benchmarks.harness.systems import model_config, read_model
from ratel.training.schedule import make_schedule

BLOCK = 128
Format = Callable[[Tensor], Tensor]
BETAS, EPS, DECAY, CLIP = (0.9, 0.999), 1e-8, 0.1, 1.0


def in_blocks(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)


def rounded(x: Tensor, draws: bool) -> Tensor:
    return torch.floor(x + (torch.rand_like(x) if draws else 0.5))


def linear(draws: bool) -> Format:
    def store(values: Tensor) -> Tensor:
        blocks = in_blocks(values)
        step = blocks.abs().amax(1, keepdim=True).clamp_min(1e-35) / 127
        return (rounded(blocks / step, draws).clamp(-127, 127) * step).flatten()[: values.numel()].view_as(values)

    return store


def sqrt(draws: bool) -> Format:
    """What is not zero does not become zero: it would be divided by."""
    def store(values: Tensor) -> Tensor:
        roots = in_blocks(values).abs().sqrt()
        step = roots.amax(1, keepdim=True).clamp_min(1e-18) / 255
        codes = rounded(roots / step, draws).clamp_max(255)
        codes = torch.where(roots > 0, codes.clamp_min(1), codes)
        return (codes * step).square().flatten()[: values.numel()].view_as(values)

    return store


def log(draws: bool) -> Format:
    """The largest exponent of a block and 31 below it."""
    def store(values: Tensor) -> Tensor:
        bits = in_blocks(values).contiguous().view(torch.int32)
        noise = torch.randint(0, 1 << 20, bits.shape, device=bits.device, dtype=torch.int32) if draws else 1 << 19
        codes = (bits + noise) >> 20
        least = (codes.amax(1, keepdim=True) - 255).clamp_min(1)
        codes = torch.where(bits > 0, torch.maximum(codes, least), 0)
        return (codes << 20).view(torch.float32).flatten()[: values.numel()].view_as(values)

    return store


SCALES = {"linear": linear, "sqrt": sqrt, "log": log}
FORMATS: dict[str, tuple[Format, Format] | None] = {"fp32": None, **{
    f"m linear {how}, v {scale} {how}": (linear(how == "draws"), SCALES[scale](how == "draws"))
    for scale, how in product(("linear", "sqrt", "log"), ("nearest", "draws"))}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=json.dumps(SMALL), help="a preset, or a configuration as JSON")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(arguments)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    report = Report(args.json, kind="moments", gpu=gpu, torch=torch.__version__, model=read_model(args.model),
                    settings={key: value for key, value in vars(args).items() if key not in ("json", "seeds", "formats", "model")})
    text = Text(files(), args.seq_len)
    for seed, name in product(args.seeds, args.formats):
        report.add({"format": name, "seed": seed, "eval_loss": train(args, text, FORMATS[name], seed)})
        print(f"seed {seed}: {name}: {report.points[-1]['eval_loss']:.4f}", flush=True)


def train(args: argparse.Namespace, text: Text, formats: tuple[Format, Format] | None, seed: int) -> float:
    """The evaluation loss at the end."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config(read_model(args.model))).to(args.device)
    schedule = make_schedule("cosine", lr=args.lr, steps=args.steps, warmup_steps=args.steps // 20)
    states = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step, batch in enumerate(text.batches(args.rows, args.steps, seed), start=1):
        model(**on(args.device, batch)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for state in states:
            update(*state, formats, lr=schedule(step - 1), step=step)
    with torch.no_grad():
        return float(model(**on(args.device, text.evaluation())).loss)


def on(device: str, batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def update(parameter: Tensor, m: Tensor, v: Tensor, formats: tuple[Format, Format] | None, *, lr: float,
           step: int) -> None:
    grad, parameter.grad = parameter.grad, None
    m.lerp_(grad, 1 - BETAS[0])
    v.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    if parameter.ndim > 1:
        parameter.mul_(1 - lr * DECAY)
    root = v.sqrt() / (1 - BETAS[1] ** step) ** 0.5
    parameter.addcdiv_(m, root + EPS, value=-lr / (1 - BETAS[0] ** step))
    if formats is not None:
        m.copy_(formats[0](m))
        v.copy_(formats[1](v))


if __name__ == "__main__":
    main()
