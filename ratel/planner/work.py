"""What one step processes, and how many buffers it has for that."""

from dataclasses import asdict, dataclass

from ratel.errors import RatelError
from ratel.planner.shape import UNIT_ALIGN


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Counts of preallocated buffers. None of them changes a result; more of them hide more
    latency."""

    weight_slots: int = 3
    """GPU slots for blocks: one in use, the others ahead of it."""
    grad_slots: int = 2
    """GPU slots for block gradients: one fills while the other leaves."""
    host_weight_slots: int = 5
    """DRAM slots for the weights of blocks that live on SSD."""
    host_grad_slots: int = 3
    """DRAM slots for block gradients that do not stay there (eager updates, or `g` on SSD)."""
    ring_slots: int = 4
    """Chunks of optimizer state in flight between SSD and the CPU optimizer."""
    chunk_elements: int = 1 << 22
    checkpoint_slots: int = 3
    """GPU slots for checkpoints on their way back, and DRAM slots for those on their way to or from
    SSD."""
    inner_slots: int = 2
    """The same for inner activations, in units of all that one block keeps of one micro-batch: one
    in use, the others ahead of it. In forward as many may be on their way out."""

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            if count < 1:
                raise RatelError("a step would wait for one for ever", field=f"buffers.{name}", value=count,
                                 remedy="Give 1 or more")
        if self.chunk_elements % UNIT_ALIGN:
            raise RatelError("chunks begin at blocks of the SSD", field="buffers.chunk_elements", value=self.chunk_elements,
                             remedy=f"Give a multiple of {UNIT_ALIGN}")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step processes."""

    rows: int
    seq_len: int
    micro_rows: int
    hidden_bytes: int
    """Bytes of one micro-batch's checkpoint: rows x positions x hidden size x bytes per element."""

    @property
    def num_micro(self) -> int:
        return -(-self.rows // self.micro_rows)
