"""Gradients of one unit at a time: accumulated on the GPU over micro-batches, measured, and moved
to DRAM once."""

import torch

from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.memory.lanes import Lanes
from ratel.memory.slots import Slot, SlotPool
from ratel.planner.plan import Plan
from ratel.planner.shape import ParamSpec, UnitSpec
from ratel.runtime.updates.jobs import GradientInFlight
from ratel.store.planes import Store


CPU_CHUNK = 1 << 16


def cpu_norm(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 scalar. PyTorch's own adds up all squares of a large tensor in a few fp32 numbers on a
    CPU: of 28 M elements it is off by up to 2e-3, where on a GPU it is off by 1e-7. Here chunks
    are, and their norms are added in fp64."""
    flat = tensor.reshape(-1)
    whole = flat.numel() // CPU_CHUNK * CPU_CHUNK
    if whole == 0 or flat.numel() == CPU_CHUNK:
        return torch.linalg.vector_norm(flat, dtype=torch.float32)
    chunks = torch.linalg.vector_norm(flat[:whole].view(-1, CPU_CHUNK), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return torch.linalg.vector_norm(torch.cat([chunks, rest[None]]), dtype=torch.float64).float()


class Gradients:
    """``begin`` a unit before its first backward, ``collect`` after each; ``close``, ``measure``
    and ``move`` after the last.

    The norm of each parameter's gradient is taken on the device that computed it, wherever the
    gradient then goes, so that the clipping scale does not depend on placement. The total is formed
    as ``torch.nn.utils.clip_grad_norm_`` does: the norm of the norms, in the module's order of
    parameters.
    """

    def __init__(self, plan: Plan, store: Store, arena: Arena, exchange: Exchange, lanes: Lanes,
                 param_order: dict[str, int]) -> None:
        self._plan, self._store, self._lanes = plan, store, lanes
        self._dtype = store.grad_dtype
        device = lanes.device
        classes = [cls.name for cls in plan.spec.slot_classes]
        self._pools = {cls: self._make_pool(cls, exchange, device) for cls in classes}
        self._host = {cls: self._make_host_pool(cls, arena, exchange) for cls in classes}
        self._acc = {cls: torch.empty(plan.max_bytes(cls, "acc") // 4, dtype=torch.float32, device=device)
                     for cls in self._pools
                     if cls in plan.accumulators}
        self._norms = torch.zeros(len(param_order), dtype=torch.float32, device=device)
        self._places = {u.index: torch.tensor([param_order[p.name] for p in u.params if p.trainable], device=device)
                        for u in plan.spec.units}
        self._host_norms = arena.take(plan.norm_bytes)[: 4 * len(plan.spec.units)].view(torch.float32)
        self._norms_leaving: dict[int, torch.Tensor] = {}
        self._slots: dict[int, Slot] = {}
        self._passes: dict[int, int] = {}
        self._cut: dict[tuple[int, int, torch.dtype], list[torch.Tensor]] = {}
        """By unit, and address and type of a buffer."""

    def begin(self, unit: UnitSpec) -> torch.Tensor:
        """Where the unit's gradient will be (1-D, ``num_trainable``, on the device); complete after
        ``close``."""
        grad = self._resident(unit)
        if grad is None:
            slot = self._slots[unit.index] = self._pools[self._plan.class_of(unit)].acquire("gradient", unit.name)
            self._lanes.wait("compute", slot.last_use)
            grad = slot.buffer[: unit.num_trainable]
        self._passes[unit.index] = 0
        return grad

    def collect(self, unit: UnitSpec, grad: torch.Tensor, parts: list[torch.Tensor | None]) -> None:
        """Take over what one backward pass has left on the parameters (None: this pass did not use
        it).

        Autograd's own tensors are read once and go; accumulating in place on attached views would
        read and write the sum as well, in compute precision.
        """
        total = self._total(unit, grad)
        views = self._views(unit, total)
        first = self._passes[unit.index] == 0
        self._passes[unit.index] += 1
        if first:
            _zero_gaps(total, _trained(unit))
            for view, part in zip(views, parts, strict=True):
                if part is None:
                    view.zero_()
        pairs = [(view, part) for view, part in zip(views, parts, strict=True) if part is not None]
        if pairs:  # in one call: on a GPU a launch for each parameter costs more than the copies of a small block
            (torch._foreach_copy_ if first else torch._foreach_add_)(*map(list, zip(*pairs)))

    def close(self, unit: UnitSpec, grad: torch.Tensor) -> None:
        """The last pass has been collected: round the sum into ``grad``, which is complete then.

        What several processes add up, they add up between this and ``measure``.
        """
        total = self._total(unit, grad)
        if total is not grad:
            with self._lanes.work("compute", f"gradient {unit.name}"):
                grad.copy_(total)

    def measure(self, unit: UnitSpec, grad: torch.Tensor) -> torch.Tensor:
        """Norms of the unit's parameters into their places in the total; returns the unit's own
        (fp32 scalar on the device)."""
        with self._lanes.work("compute", f"gradient {unit.name}"):
            views = self._views(unit, grad)
            norms = [cpu_norm(view) for view in views] if grad.device.type == "cpu" else torch._foreach_norm(views, 2, dtype=torch.float32)
            stacked = torch.stack(norms)
            self._norms[self._places[unit.index]] = stacked
            return torch.linalg.vector_norm(stacked)

    def move(self, unit: UnitSpec, grad: torch.Tensor, norm: torch.Tensor) -> GradientInFlight | None:
        """Send it to DRAM; ``None`` for a unit that is updated on the GPU."""
        if self._plan.placement(unit).on_gpu:
            return None
        host, host_slot = self._host_place(unit)
        host_norm = self._host_norms[unit.index]
        self._lanes.wait("d2h", self._lanes.record("compute"))
        with self._lanes.work("d2h", f"gradient {unit.name}", grad.numel() * grad.element_size() + norm.element_size()):
            host.copy_(grad, non_blocking=True)
            host_norm.copy_(norm, non_blocking=True)
        arrived = self._lanes.record("d2h")
        slot = self._slots.pop(unit.index)
        slot.pool.release(slot, arrived)
        self._norms_leaving[unit.index] = norm  # its memory must not be reused before the copy has run
        return GradientInFlight(host=host, norm=host_norm, arrived=arrived, host_slot=host_slot)

    def _host_place(self, unit: UnitSpec) -> tuple[torch.Tensor, Slot | None]:
        if not self._plan.grads_pass_through(unit):
            return self._store.plane(unit.index, "g").tensor, None
        # Eager: what holds it is an update; deferred: the write of an earlier gradient.
        slot = self._host[self._plan.class_of(unit)].acquire("SSD write" if self._plan.deferred else "update slot", unit.name)
        return slot.buffer[: unit.num_trainable * self._dtype.itemsize].view(self._dtype), slot

    def total_norm(self) -> torch.Tensor:
        """fp32 scalar on the device: the global norm of the step's gradients."""
        return torch.linalg.vector_norm(self._norms)

    def not_finite(self) -> list[UnitSpec]:
        """Units of which some gradient of the step is NaN or infinite. None may be, where only the
        total overflows."""
        norms = self._norms.cpu()
        return [u for u in self._plan.spec.units if not torch.isfinite(norms[self._places[u.index].cpu()]).all()]

    def _total(self, unit: UnitSpec, grad: torch.Tensor) -> torch.Tensor:
        """Where passes are summed: the fp32 accumulator of the unit's class, or the gradient
        itself."""
        acc = self._acc.get(self._plan.class_of(unit))
        return grad if acc is None or unit.fp32 else acc[: grad.numel()]

    def _views(self, unit: UnitSpec, flat: torch.Tensor) -> list[torch.Tensor]:
        """One for each trained parameter, made once: buffers stay where they are."""
        key = unit.index, flat.data_ptr(), flat.dtype
        if key not in self._cut:
            self._cut[key] = [flat[p.offset : p.end].view(p.shape) for p in _trained(unit)]
        return self._cut[key]

    def _resident(self, unit: UnitSpec) -> torch.Tensor | None:
        if self._plan.placement(unit).on_gpu:
            return self._store.plane(unit.index, "g").tensor
        return None

    def _make_pool(self, cls: str, exchange: Exchange, device: torch.device) -> SlotPool:
        num_elements = self._plan.max_bytes(cls, "grads") // self._plan.grad_bytes
        return SlotPool(exchange, [torch.zeros(num_elements, dtype=self._dtype, device=device)
                                   for _ in range(self._plan.grad_slot_count(cls))])

    def _make_host_pool(self, cls: str, arena: Arena, exchange: Exchange) -> SlotPool:
        num_bytes = self._plan.max_bytes(cls, "grads")
        return SlotPool(exchange, [arena.take(num_bytes) for _ in range(self._plan.host_grad_slot_count(cls))])


def _trained(unit: UnitSpec) -> list[ParamSpec]:
    return [p for p in unit.params if p.trainable]


def _zero_gaps(flat: torch.Tensor, params: list[ParamSpec]) -> None:
    """Padding holds zeros; the buffer may have held a unit with other gaps before."""
    ends = [0, *(p.end for p in params)]
    begins = [*(p.offset for p in params), flat.numel()]
    for end, begin in zip(ends, begins, strict=True):
        if end < begin:
            flat[end:begin].zero_()
