"""What a model would take to train, without running it: shapes, FLOPs, and the memory of
activations.

One block and one loss chunk run forward and backward on tensors that have a shape and no memory.
What they would hold at once is counted, as ``ratel/runtime/planning/trial.py`` measures it where a
model is trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ratel import models
from ratel.memory.lanes import Lanes
from ratel.models.calls.tasks import Task
from ratel.models.structure.additions import Additions
from ratel.models.structure.dispatch_modes import modes_as_before
from ratel.models.structure.inputs import BlockInputs
from ratel.planner.block_profile import BlockProfile
from ratel.planner.checkpoints import Spill
from ratel.planner.search.request import BlockFacts
from ratel.planner.shape import ModelSpec, StageSpec
from ratel.runtime.blocks.loss import positions_per_chunk, run_tail
from ratel.runtime.blocks.op_trace import trace
from ratel.runtime.blocks.profile import plain_profile, profile_of
from ratel.runtime.blocks.runs import given_to
from ratel.runtime.blocks.spiller import WITHOUT_END, Spiller
from ratel.runtime.planning.shapes_only import META, FusedAttention, ShapesOnly
from ratel.runtime.planning.trial import SLACK, SLACK_BYTES
from ratel.units import MIB


LIBRARY_BYTES = 33 * MIB
"""On a GPU beside all tensors: the workspace of cuBLAS (32 MiB on Hopper), and tensors in whole
blocks of 512 bytes."""


@dataclass(frozen=True, kw_only=True)
class MicroBatchOutline:
    """One micro-batch of a model."""

    rows: int
    hidden_bytes: int
    """Bytes of a block's input."""
    activation_bytes: int
    """At the peak of a block or of the loss: everything but weights and slots, gradients
    included."""
    profiles: tuple[BlockProfile, ...]
    """By block."""
    has_chunked_loss: bool
    spill: Spill | None
    """How second runs are done where what they save goes to DRAM."""

    @property
    def workspace_bytes(self) -> int:
        """What a plan sets aside on a GPU."""
        return int(self.activation_bytes * SLACK) + SLACK_BYTES

    def facts(self, import_element_bytes: int) -> BlockFacts:
        """As a plan is made from them."""
        return BlockFacts(hidden_bytes=self.hidden_bytes, workspace_bytes=self.workspace_bytes, profiles=self.profiles,
                          has_chunked_loss=self.has_chunked_loss, spill=self.spill, import_element_bytes=import_element_bytes)


class Outline:
    """A language model, or one with a task, of which only shapes exist; ``model`` is what
    `ratel.models.load` takes, a directory need not hold the weights.

    ``dtype``: of the computation, bf16 or fp32. ``additions``: as of `ratel.models.load`. Raises RatelError for a model that cannot be
    trained, or not with sequences of ``max_seq_len`` tokens.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype, max_seq_len: int, attention: str = "auto",
                 task: Task | None = None, additions: Additions | None = None) -> None:
        # Flash attention needs its package and a GPU; what it holds is what the fused kernels hold.
        self._parts = models.load(model, dtype=dtype, device=torch.device("cpu"), max_seq_len=max_seq_len, needs_weights=False,
                                  attention="sdpa" if attention == "flash" else attention, task=task, additions=additions)

    @property
    def spec(self) -> ModelSpec:
        return self._parts.spec

    @property
    def packs(self) -> bool:
        """Documents may share a row: the model keeps them apart."""
        return not self._parts.is_causal_lm or self._parts.isolates_documents

    def facts(self, rows: int, seq_len: int, *, spills: bool = False) -> BlockFacts:
        """What a plan is made from, for micro-batches of ``rows`` rows of ``seq_len`` tokens on a
        GPU."""
        return self.micro_batch(rows, seq_len, spills=spills).facts(self._parts.stored.import_element_bytes)

    def close(self) -> None:
        """A module that was given gets its parameters back."""
        self._parts.close()

    def micro_batch(self, rows: int, seq_len: int, *, on_cuda: bool = True, spills: bool = False) -> MicroBatchOutline:
        """The outline of a micro-batch of ``rows`` rows of ``seq_len`` tokens. ``on_cuda``: with
        what CUDA's attention takes for itself. ``spills``: what second runs save goes to DRAM."""
        shapes = ShapesOnly(attention_scratch=on_cuda)
        batch = self._parts.sample(rows, seq_len)
        with modes_as_before(), _without_memory(self._parts.module), torch.random.fork_rng(devices=[]), shapes, FusedAttention():
            with torch.no_grad():
                # Positions that the model makes itself have no values here, and it would keep apart
                # what may be several documents: with a mask of seq_len x seq_len, 16 GiB at 131072.
                if self._parts.is_causal_lm:
                    batch["position_ids"] = torch.arange(seq_len)[None]
                hidden, inputs = self._parts.head(batch)
            profiles = {kind: self._profile(shapes, stage, hidden, inputs) for kind, stage in self._kinds().items()}
            spill = Spill.of(hidden.nbytes, WITHOUT_END) if spills else None
            runs = [self._run_block(shapes, stage, hidden, inputs, spill) for stage in self._kinds().values()]
            peaks = [peak for peak, _ in runs]
            peaks.append(self._run_tail(shapes, hidden, batch))
        return MicroBatchOutline(
            rows=rows, hidden_bytes=hidden.nbytes, has_chunked_loss=self._has_chunked_loss(rows, seq_len),
            activation_bytes=max(peaks) + (LIBRARY_BYTES if on_cuda else 0),
            spill=spill and replace(spill, region_bytes=max(used for _, used in runs)),
            profiles=tuple(profiles[_kind(self.spec, stage)] for stage in self._blocks()))

    def _blocks(self) -> list[StageSpec]:
        return [stage for stage in self.spec.stages if stage.kind == "block"]

    def _kinds(self) -> dict[tuple, StageSpec]:
        """The first block of each kind."""
        found: dict[tuple, StageSpec] = {}
        for stage in self._blocks():
            found.setdefault(_kind(self.spec, stage), stage)
        return found

    def _has_chunked_loss(self, rows: int, seq_len: int) -> bool:
        return self._parts.is_causal_lm and positions_per_chunk(rows, self.spec.vocab_size) < seq_len

    def _run_block(self, shapes: ShapesOnly, stage: StageSpec, hidden: Tensor, inputs: BlockInputs,
                   spill: Spill | None) -> tuple[int, int]:
        """Bytes at the peak of forward and backward, and those that are spilled."""
        leaf, inputs, block = hidden.detach().requires_grad_(), inputs.with_leaves(), stage.index - 1
        spiller = self._spiller(spill) if spill else None
        shapes.restart()
        with torch.enable_grad(), spiller.saving(given_to(self._parts, block, leaf, inputs)) if spiller else nullcontext():
            output = self._parts.block(block, leaf, inputs)
        used = spiller.used_bytes if spiller else 0
        output.backward(torch.zeros_like(output))
        self._drop_grads()
        return shapes.peak_bytes - (spill.region_bytes if spill else 0), used

    def _spiller(self, spill: Spill) -> Spiller:
        region = torch.empty(spill.region_bytes, dtype=torch.uint8, device=META)
        return Spiller(Lanes(torch.device("cpu")), region, spill)

    def _profile(self, shapes: ShapesOnly, stage: StageSpec, hidden: Tensor, inputs: BlockInputs) -> BlockProfile:
        """As the runtime learns it: a block whose operations depend on values is always run again
        in full."""
        block, leaf = stage.index - 1, hidden.detach().requires_grad_()
        shapes.restart()
        with torch.enable_grad():
            _, found = trace(lambda: self._parts.block(block, leaf, inputs.with_leaves()), self._parts.blocks[block],
                             keep_graph=False)
        return (plain_profile if shapes.values_matter else profile_of)(found, hidden.shape[0])

    def _run_tail(self, shapes: ShapesOnly, hidden: Tensor, batch: dict[str, Tensor]) -> int:
        shapes.restart()
        run_tail(self._parts, batch, hidden)
        self._drop_grads()
        return shapes.peak_bytes

    def _drop_grads(self) -> None:
        for param in self._parts.module.parameters():
            param.grad = None


def _kind(spec: ModelSpec, stage: StageSpec) -> tuple:
    """Blocks with parameters of the same shapes compute alike."""
    return tuple((p.shape, p.trainable) for index in stage.units for p in spec.units[index].params)


@contextmanager
def _without_memory(module: nn.Module) -> Iterator[None]:
    """Every parameter is on the meta device inside; tied ones stay tied."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    twins: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, param in child._parameters.items():
            if param is not None:
                replaced.append((child, name, param))
                twins.setdefault(id(param), nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device=META),
                                                         requires_grad=param.requires_grad))
    try:
        for child, name, param in replaced:
            child._parameters[name] = twins[id(param)]
        yield
    finally:
        for child, name, param in replaced:
            child._parameters[name] = param
