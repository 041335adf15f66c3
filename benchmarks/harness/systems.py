"""Training steps of one system in a process of its own, for comparisons: same model, weights,
tokens and settings.

    python -m benchmarks.harness.systems SPEC.json RESULTS.json
    python -m benchmarks.harness.systems --build

`Job` says what SPEC.json holds. RESULTS.json is written after each batch size, so that a process
which is ended early, or which dies at a larger batch, still has results.
"""

import gc
import json
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from ratel.memory.resident import peak_bytes, reset_peak
from ratel.models.presets import preset_config
from ratel.training.bench.step import StepBench, fill_quickly, measure, random_block, random_tokens
from ratel.units import parse_bytes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True, kw_only=True)
class Job:
    """``system``: ratel, memory (everything in the memory of the device), zero (DeepSpeed), frozen
    or plain (`benchmarks.harness.adapters`).
    ``model``: a preset, or the arguments of `preset_config`, or those of ``AutoConfig.for_model``.
    ``options`` are the session's, or the system's own (`InMemory`, `zero_config`). ``clip`` is the
    largest global norm; no weight decay."""

    system: str
    model: str | dict[str, Any]
    batches: tuple[int, ...] = (8,)
    seq_len: int = 1024
    warmup: int = 2
    steps: int = 3
    lr: float = 1e-5
    clip: float = 1.0
    device: str = "cuda"
    dtype: str = "bf16"
    gpu_memory: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


NEVER, ALWAYS = 1e9, 0.01
"""Global norms to clip at: one that no gradient has, so that clipping is on and does not fire, and
one below all (from 0.9 to 15 in this work)."""


def read_model(argument: str) -> str | dict[str, Any]:
    """``Job.model`` as a command line gives it: a preset, or a configuration as JSON."""
    return json.loads(argument) if argument.startswith("{") else argument


def model_config(model: str | dict[str, Any]) -> Any:
    if isinstance(model, str):
        return preset_config(model)
    if "name" in model:
        return preset_config(**model)
    from transformers import AutoConfig

    return AutoConfig.for_model(**model)


def run_ratel(job: Job, batch: int) -> dict[str, Any]:
    options = {"max_grad_norm": job.clip, "lr": job.lr, "betas": BETAS, "eps": EPS, "weight_decay": 0.0,
               "device": job.device, "dtype": job.dtype, "gpu_memory": job.gpu_memory, **job.options}
    bench = StepBench(model=model_config(job.model), batch_size=batch, seq_len=job.seq_len, warmup=job.warmup,
                      steps=job.steps, options=options)
    return measure(bench, progress=lambda text: print(text, flush=True))


# --- the others: Hugging Face's model, gradient checkpointing -------------------------------------------------------


class InMemory:
    """AdamW where the weights are. ``states="fp32"``: masters and moments in fp32 beside weights
    that compute, the same arithmetic as Ratel's. ``"compute"``: all in the compute type, which
    moves less and is no faithful training, but a floor under time."""

    def __init__(self, job: Job) -> None:
        self.model = make_model(job)
        self._clip, self._params = job.clip, list(self.model.parameters())
        keep = job.options.get("states", "fp32") == "fp32" and job.dtype != "fp32"
        self._masters = [p.detach().float() for p in self._params] if keep else self._params
        self._optimizer = torch.optim.AdamW(self._masters, lr=job.lr, betas=BETAS, eps=EPS, weight_decay=0.0,
                                            fused=True)

    def step(self, tokens: torch.Tensor) -> float:
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if self._masters is not self._params:
            for master, param in zip(self._masters, self._params):
                master.grad, param.grad = param.grad.float(), None
        nn.utils.clip_grad_norm_(self._masters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._masters is not self._params:
            torch._foreach_copy_([p.data for p in self._params], self._masters)
        return float(loss.detach())


class Zero:
    """DeepSpeed ZeRO-3 with states in DRAM (``options["place"]`` cpu) or on an SSD (nvme, with
    ``options["directory"]``)."""

    def __init__(self, job: Job) -> None:
        name_architecture()
        import deepspeed

        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
        config = zero_config(job)
        make_model(job, "meta")  # imports what must be imported before ZeRO changes how tensors are made
        deepspeed.init_distributed("nccl" if job.device == "cuda" else "gloo")
        with deepspeed.zero.Init(config_dict_or_path=config, dtype=DTYPES[job.dtype]):
            self.model = make_model(job)
        params = self.model.parameters()
        self._engine, *_ = deepspeed.initialize(model=self.model, model_parameters=params, config=config)

    def step(self, tokens: torch.Tensor) -> float:
        loss = self._engine(input_ids=tokens, labels=tokens).loss
        self._engine.backward(loss)
        self._engine.step()
        return float(loss.detach())


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def zero_config(job: Job) -> dict[str, Any]:
    """Settings that the peer runs best with on one GPU, tried on the same work: docs/benchmarks.md
    says which and why."""
    place = job.options["place"]
    states = {"device": place, "pin_memory": job.device == "cuda"}
    params = dict(states)
    if place == "nvme":
        config, folder = model_config(job.model), job.options["directory"]
        largest = config.hidden_size * max(config.intermediate_size, config.vocab_size)
        states |= {"nvme_path": folder, "buffer_count": 12, "pipeline_read": True, "pipeline_write": True}
        params |= {"nvme_path": folder, "buffer_count": 16, "buffer_size": int(1.05 * largest), "max_in_cpu": 0}
    return {"train_micro_batch_size_per_gpu": job.batches[0], "gradient_accumulation_steps": 1,
            "bf16": {"enabled": job.dtype == "bf16"}, "gradient_clipping": job.clip, "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": job.lr, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}},
            "aio": {"block_size": 8 << 20, "queue_depth": 16, "single_submit": False, "overlap_events": True,
                    "thread_count": 4, "intra_op_parallelism": 8},
            "zero_optimization": {
                "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 200_000_000,
                "reduce_bucket_size": 100_000_000, "stage3_max_live_parameters": 300_000_000,
                "stage3_max_reuse_distance": 300_000_000,
                # This version crashes when it prefetches parameters from an SSD.
                "stage3_prefetch_bucket_size": 0 if place == "nvme" else 100_000_000,
                "offload_optimizer": states, "offload_param": params}}


def make_model(job: Job, device: str | None = None) -> nn.Module:
    """The model with the weights of `fill_quickly`, as a session has with `use_quick_weights`."""
    from transformers import AutoModelForCausalLM

    config = model_config(job.model)
    config.use_cache = False
    with quick_initialisation(), torch.device(device or job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[job.dtype], attn_implementation="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@contextmanager
def quick_initialisation() -> Iterator[None]:
    """Weights are filled where a module makes them: ZeRO cuts a parameter up as soon as its
    module's constructor is over, too early for anything that comes later."""
    from transformers import PreTrainedModel

    random_block()  # ZeRO also changes how tensors are made meanwhile

    def reset_parameters(module: nn.Module) -> None:
        with torch.no_grad():
            fill_quickly(module.weight)

    with mock.patch.object(nn.Linear, "reset_parameters", reset_parameters), \
            mock.patch.object(nn.Embedding, "reset_parameters", reset_parameters), \
            mock.patch.object(PreTrainedModel, "initialize_weights", lambda self: None):
        yield


def run_peer(system: Callable[[Job], Any], job: Job, batch: int) -> dict[str, Any]:
    cuda, begun = job.device == "cuda", time.perf_counter()
    peer = system(job)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in peer.model.parameters())
    start_s, seconds, losses, moved = time.perf_counter() - begun, [], [], [_process_io()]
    for index in range(job.warmup + job.steps):
        tokens = random_tokens(index, batch, job.seq_len, peer.model.config.vocab_size).to(job.device)
        begun = time.perf_counter()
        losses.append(peer.step(tokens))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        moved.append(_process_io())
        print(f"step {index}: {seconds[-1]:.3f} s, loss {losses[-1]:.4f}", flush=True)
    step_s, tokens_per_step = statistics.median(seconds[job.warmup :]), batch * job.seq_len
    read, written = ((moved[-1][i] - moved[job.warmup][i]) / job.steps for i in (0, 1))
    return {"batch_size": batch, "seq_len": job.seq_len, "parameters": parameters, "step_s": step_s,
            "tokens_per_s": tokens_per_step / step_s, "tflops_6pn": 6 * parameters * tokens_per_step / step_s / 1e12,
            "losses": losses, "all_steps_s": seconds, "start_s": start_s, "ssd_read_bytes": read,
            "ssd_written_bytes": written,
            "gpu_peak_bytes": torch.cuda.max_memory_reserved() if cuda else None}


def _process_io() -> tuple[int, int]:
    """Bytes that this process has had devices read and write so far, as the kernel counts them."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["read_bytes"]), int(facts["write_bytes"])


def _start_peaks_anew(job: Job) -> None:
    gc.collect()
    reset_peak()
    if job.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_adapters(system: str, job: Job, batch: int) -> dict[str, Any]:
    from benchmarks.harness import adapters

    return run_peer(getattr(adapters, system), job, batch)


SYSTEMS: dict[str, Callable[[Job, int], dict[str, Any]]] = {
    "ratel": run_ratel,
    "memory": lambda job, batch: run_peer(InMemory, job, batch),
    "zero": lambda job, batch: run_peer(Zero, job, batch),
    "frozen": lambda job, batch: run_adapters("Frozen", job, batch),
    "plain": lambda job, batch: run_adapters("Plain", job, batch),
}


def name_architecture() -> None:
    """DeepSpeed cannot read the suffixed names (9.0a) that PyTorch's own list may have."""
    if torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, torch.cuda.get_device_capability()))


def build_zero() -> None:
    """Compile DeepSpeed's native operators into its cache; the last line printed is the version."""
    name_architecture()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    for builder in ("CPUAdamBuilder", "AsyncIOBuilder"):
        get_accelerator().create_op_builder(builder).load()
    print(deepspeed.__version__)


def main() -> None:
    if sys.argv[1:] == ["--build"]:
        build_zero()
        return
    spec, target = (Path(argument) for argument in sys.argv[1:3])
    job = Job(**json.loads(spec.read_text(encoding="utf-8")))
    if job.system != "ratel":  # which asks for it by itself: pieces too small for the logits cost others a batch size
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if job.device == "cuda" and job.gpu_memory is not None and job.system != "ratel":  # a session sees to that itself
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(job.gpu_memory) / total))
    results = []
    for batch in job.batches:
        _start_peaks_anew(job)
        try:
            results.append({**SYSTEMS[job.system](job, batch), "rss_peak_bytes": peak_bytes()})
        except Exception as error:  # noqa: BLE001 - what a system cannot do is a result
            traceback.print_exc()
            results.append({"batch_size": batch, "seq_len": job.seq_len, "error": f"{type(error).__name__}: {error}"})
        target.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
