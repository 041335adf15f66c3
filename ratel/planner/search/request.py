"""What a plan is made for: the model, what was asked, what there is, and what was learned of its
micro-batches."""

from dataclasses import dataclass

from ratel.planner.activation_policy import AUTO, Kept, kept_by_choice
from ratel.planner.block_profile import BlockProfile
from ratel.planner.checkpoints import Spill
from ratel.planner.formats import FORMATS, StateFormats
from ratel.planner.placement import Forced
from ratel.planner.search.options import SessionOptions
from ratel.planner.shape import ModelSpec, outside_blocks
from ratel.planner.work import Buffers, Work


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """In bytes; ``None``: no limit, and nothing is put there unasked (GPU), or no SSD directory was
    given."""

    gpu: int | None
    dram: int
    ssd: int | None
    process_bytes: int = 0
    """Bytes of the DRAM budget that the process holds before anything of a plan is reserved."""


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What was learned of a model with micro-batches of one size, by trying it out or by
    counting."""

    hidden_bytes: int
    """Bytes of a block's input."""
    workspace_bytes: int
    """As in the plan."""
    profiles: tuple[BlockProfile, ...]
    """By block."""
    has_chunked_loss: bool
    """The loss of a micro-batch goes in chunks, so that gradients of the tail are sums even of one
    micro-batch."""
    spill: Spill | None = None
    """How second runs are done where what they save goes to DRAM."""
    loss_s: float | None = None
    """As in the plan."""
    import_element_bytes: int = 4
    """As in the plan."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Budgets are bytes, as in `Budgets`. A search varies ``optimizer``, ``buffers``,
    ``early_units``, ``kept`` and ``durable``, which begin as the options have them."""

    spec: ModelSpec
    formats: StateFormats
    options: SessionOptions = SessionOptions()
    work: Work
    gpu_budget: int | None
    dram_budget: int
    ssd_budget: int | None
    process_bytes: int = 0
    import_element_bytes: int = 4
    """As in the plan."""
    workspace_bytes: int = 0
    accumulators: tuple[str, ...] = ()
    profiles: tuple[BlockProfile, ...] = ()
    loss_s: float | None = None
    """As in the plan."""
    spill: Spill | None = None
    """As in the plan; then nothing is ``kept``."""
    on_host: bool = False
    """The device is the CPU."""
    optimizer: str
    """``eager``, ``deferred``, ``speculative``, ``auto``: of the last two the better one, or
    ``any``: of all three."""
    buffers: Buffers = Buffers()
    early_units: int = 0
    """As in the plan. The choice of them sets it."""
    kept: Kept = ()
    """Inner activations, as in the plan."""
    durable: str = "off"
    """``auto``, or what `Plan.durable` can be."""

    @property
    def forced(self) -> Forced | None:
        return self.options.forced

    @property
    def checkpoint_tier(self) -> str:
        return self.options.checkpoint_tier

    @property
    def num_blocks(self) -> int:
        return sum(stage.kind == "block" for stage in self.spec.stages)


def request_for(spec: ModelSpec, options: SessionOptions, budgets: Budgets, facts: BlockFacts, *, rows: int, seq_len: int,
                micro_rows: int, on_host: bool = False, has_rates: bool = True) -> Request:
    """``has_rates``: of the machine, by which a search finds out what is worth keeping of the
    inside of blocks."""
    formats = FORMATS[options.states][options.dtype]
    work = Work(rows=rows, seq_len=seq_len, micro_rows=micro_rows, hidden_bytes=facts.hidden_bytes)
    is_searched = options.activations == AUTO and has_rates and facts.spill is None
    return Request(spec=spec, formats=formats, options=options, work=work, gpu_budget=budgets.gpu, dram_budget=budgets.dram,
                   ssd_budget=budgets.ssd, process_bytes=budgets.process_bytes, import_element_bytes=facts.import_element_bytes,
                   workspace_bytes=facts.workspace_bytes, accumulators=_accumulators(spec, formats, work, facts),
                   profiles=facts.profiles, loss_s=facts.loss_s, spill=facts.spill, on_host=on_host,
                   optimizer=options.update_mode, buffers=options.buffers,
                   kept=() if is_searched else kept_by_choice(facts.profiles, options.activations),
                   durable="checkpoint" if options.durable == AUTO and options.checksums == "off" else options.durable)


def _accumulators(spec: ModelSpec, formats: StateFormats, work: Work, facts: BlockFacts) -> tuple[str, ...]:
    """Weight classes whose gradients are sums of several passes, whose rounding in bf16 would add
    up."""
    if formats.merges:
        return ()
    if work.num_micro > 1:
        return tuple(cls.name for cls in spec.slot_classes)
    return outside_blocks(spec) if facts.has_chunked_loss else ()
