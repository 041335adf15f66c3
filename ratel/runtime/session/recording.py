"""The record of one step: what every lane, SSD and thread did, on one clock."""

from bisect import bisect_right
from time import perf_counter

from ratel import native
from ratel.runtime.session.machinery import Machinery
from ratel.trace.timeline import Span, Timeline

MOST_SSD_SPANS = 1 << 17
"""The most transfers recorded per directory, 8 MiB. A transfer takes one, however many requests it
is cut into: enough for 100 B parameters."""

_CLASSES = ("weights", "activations", "optimizer", "write-back", "saving")


class Recording:
    """What a step does from the making of this object to `finish`. What began before it and ends in
    it is recorded too, SSD transfers from their first request that ends in it."""

    def __init__(self, machinery: Machinery) -> None:
        self._m = machinery
        machinery.engine.watch(MOST_SSD_SPANS)
        machinery.lanes.start_trace()
        machinery.exchange.tracing.start()

    def finish(self, step: int, begun_s: float) -> Timeline:
        """The step that was called at ``begun_s`` (``perf_counter``) and ends now. Waits for the
        device."""
        m, step_s = self._m, perf_counter() - begun_s
        threads = m.exchange.tracing.stop()
        transfers, lost = m.engine.spans()
        m.engine.watch(0)
        work, clock_error_s = m.lanes.stop_trace()
        places = _places(m)
        spans = [*work, *(_of_ssd(transfer, places) for transfer in transfers), *threads]
        return Timeline(step=step, step_s=step_s, spans=tuple(_since(span, begun_s) for span in spans),
                        clock_error_s=clock_error_s, lost=lost)


Places = dict[int, list[tuple[int, str]]]
"""What begins where in each volume, ascending."""


def _places(m: Machinery) -> Places:
    store, layout, units = m.store, m.plan.slot_layout, m.plan.spec.units
    places: Places = {}
    if store.volume is not None:
        places[store.volume.handle] = [(slot * layout.num_bytes + place.offset, f"{name} {units[unit].name}")
                                       for slot in range(m.plan.num_slots) for (unit, name), place in layout.places.items()]
    if store.frozen_volume is not None:
        places[store.frozen_volume.handle] = [(place.offset, f"{name} {units[unit].name}")
                                              for (unit, name), place in m.plan.frozen_layout.places.items()]
    if store.grad_volume is not None:
        places[store.grad_volume.handle] = [(store.offset(0, u.index, "g"), f"g {u.name}") for u in units
                                            if store.has(u.index, "g") and store.plane(u.index, "g").tier == "ssd"]
    volume, activations = m.activations.on_ssd()
    if volume is not None:
        places[volume.handle] = activations
    return {handle: sorted(items) for handle, items in places.items()}


def _of_ssd(transfer: "native.nvme_ds.IoSpan", places: Places) -> Span:
    planes = places.get(transfer.volume)
    name = planes[bisect_right(planes, transfer.offset, key=lambda item: item[0]) - 1][1] if planes else _CLASSES[
        transfer.priority]
    return Span(lane=f"ssd {transfer.op} {transfer.directory}", name=name, begin_s=transfer.begin_s, end_s=transfer.end_s,
                num_bytes=transfer.num_bytes)


def _since(span: Span, begun_s: float) -> Span:
    launched_s = None if span.launched_s is None else span.launched_s - begun_s
    return Span(lane=span.lane, name=span.name, begin_s=span.begin_s - begun_s, end_s=span.end_s - begun_s,
                cause=span.cause, num_bytes=span.num_bytes, launched_s=launched_s)
