"""Gradients of one unit at a time: accumulated on the GPU over micro-batches, measured, and moved to DRAM once."""

from dataclasses import dataclass

import torch

from ratel.memory.arena import Arena
from ratel.memory.exchange import Exchange
from ratel.memory.lanes import Event, Lanes
from ratel.memory.slots import Slot, SlotPool
from ratel.plan.placement import weight_class
from ratel.plan.plan import Plan
from ratel.plan.shape import UnitSpec
from ratel.store.planes import Store


@dataclass(frozen=True, slots=True)
class Moved:
    """A gradient on its way to DRAM: ``host`` and ``norm`` (fp32 scalar) are valid once ``arrived``; ``slot``, if any,
    is to be given back after the update."""

    host: torch.Tensor
    norm: torch.Tensor
    arrived: Event
    slot: Slot | None

    def release(self) -> None:
        if self.slot is not None:
            self.slot.pool.release(self.slot, Event())


class Gradients:
    """``begin`` a unit before its first backward, ``fold`` after each, ``finish`` after the last.

    The norm of each parameter's gradient is taken on the device that computed it, wherever the gradient then goes, so
    that the clipping scale does not depend on placement. The total is formed as ``torch.nn.utils.clip_grad_norm_``
    does: the norm of the norms, in the module's order of parameters.
    """

    def __init__(self, plan: Plan, store: Store, arena: Arena, exchange: Exchange, lanes: Lanes,
                 param_order: dict[str, int]) -> None:
        self._plan, self._store, self._lanes = plan, store, lanes
        self._dtype = store.grad_dtype
        device = lanes.device
        self._pools = {cls: self._make_pool(cls, exchange, device) for cls in ("block", "ends", "shared")}
        self._host = {cls: self._make_host_pool(cls, arena, exchange) for cls in ("block", "ends", "shared")}
        self._acc = {cls: torch.empty(plan.max_bytes(cls, "acc") // 4, device=device) for cls in self._pools
                     } if plan.accumulate_fp32 else {}
        self._norms = torch.zeros(len(param_order), device=device)
        self._places = {u.index: torch.tensor([param_order[p.name] for p in u.params if p.trainable], device=device)
                        for u in plan.spec.units}
        self._host_norms = arena.take(plan.norm_bytes)[: 4 * len(plan.spec.units)].view(torch.float32)
        self._norms_leaving: dict[int, torch.Tensor] = {}
        self._slots: dict[int, Slot] = {}
        self._folds: dict[int, int] = {}

    def begin(self, unit: UnitSpec) -> torch.Tensor:
        """A zeroed gradient (1-D, ``num_trainable``) for the unit, on the device."""
        grad = self._resident(unit)
        if grad is None:
            slot = self._slots[unit.index] = self._pools[weight_class(unit)].acquire()
            self._lanes.wait("compute", slot.last_use)
            grad = slot.buffer[: unit.num_trainable]
        self._folds[unit.index] = 0
        return grad.zero_()

    def fold(self, unit: UnitSpec, grad: torch.Tensor) -> None:
        """Add what has been accumulated in compute precision to the fp32 accumulator, and start again from zero."""
        if not self._acc:
            return
        acc = self._acc[weight_class(unit)][: grad.numel()]
        if self._folds[unit.index] == 0:
            acc.copy_(grad)
        else:
            acc.add_(grad)
        self._folds[unit.index] += 1
        grad.zero_()

    def finish(self, unit: UnitSpec, grad: torch.Tensor) -> "Moved | None":
        """Round, measure and move to DRAM; ``None`` for a unit that is updated on the GPU."""
        if self._acc:
            grad.copy_(self._acc[weight_class(unit)][: grad.numel()])
        norm = self._measure(unit, grad)
        if self._plan.placement(unit).on_gpu:
            return None
        return self._move(unit, grad, norm)

    def total_norm(self) -> torch.Tensor:
        """fp32 scalar on the device: the global norm of the step's gradients."""
        return torch.linalg.vector_norm(self._norms)

    def not_finite(self) -> list[UnitSpec]:
        """Units of which some gradient of the step is NaN or infinite. None may be, where only the total overflows."""
        norms = self._norms.cpu()
        return [u for u in self._plan.spec.units if not torch.isfinite(norms[self._places[u.index].cpu()]).all()]

    def _measure(self, unit: UnitSpec, grad: torch.Tensor) -> torch.Tensor:
        """Norms of the unit's parameters into their places; returns the unit's own."""
        params = [p for p in unit.params if p.trainable]
        norms = torch._foreach_norm([grad[p.offset : p.end].view(p.shape) for p in params], 2, dtype=torch.float32)
        stacked = torch.stack(norms)
        self._norms[self._places[unit.index]] = stacked
        return torch.linalg.vector_norm(stacked)

    def _move(self, unit: UnitSpec, grad: torch.Tensor, norm: torch.Tensor) -> "Moved":
        host_slot = None
        if self._plan.grads_pass_through(unit):
            host_slot = self._host[weight_class(unit)].acquire()
            host = host_slot.buffer[: unit.num_trainable * self._dtype.itemsize].view(self._dtype)
        else:
            host = self._store.plane(unit.index, "g").tensor
        host_norm = self._host_norms[unit.index]
        self._lanes.wait("d2h", self._lanes.record("compute"))
        with self._lanes.work("d2h", unit.name):
            host.copy_(grad, non_blocking=True)
            host_norm.copy_(norm, non_blocking=True)
        arrived = self._lanes.record("d2h")
        slot = self._slots.pop(unit.index)
        slot.pool.release(slot, arrived)
        self._norms_leaving[unit.index] = norm  # its memory must not be reused before the copy has run
        return Moved(host, host_norm, arrived, host_slot)

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
