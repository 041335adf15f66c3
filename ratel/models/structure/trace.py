"""One forward in outline, watched: in which order the blocks run, what they take and return, who
uses which parameter.

Whatever the model does that running it block by block would change is found here and refused with
its reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ratel.errors import RatelError
from ratel.models.structure.dispatch_modes import modes_as_before
from ratel.models.structure.gates import Gates
from ratel.models.structure.given import Given
from ratel.models.structure.graph import Edge, Reach, edge_of, is_older, next_number, reach
from ratel.models.structure.inputs import BlockCall, HiddenSlot, OutputForm, Slot, leaves
from ratel.models.structure.longrope import chosen_buffers
from ratel.models.structure.shadow import Shadow


_NOT_GIVEN = "a block uses something computed before it that is not among its arguments"
_MORE_THAN_HIDDEN = ("the result uses more of a block's output than the hidden states (auxiliary loss, router logits, attention "
                     "weights)")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a forward was seen to do. Parameters are given by their index in
    ``list(module.parameters())``."""

    stages: tuple[nn.Module, ...]
    slots: tuple[HiddenSlot, ...]
    forms: tuple[OutputForm, ...]
    used: tuple[frozenset[int], ...]
    """Parameters by stage: before the blocks, each block, after the blocks."""
    begins_early: bool
    """Part of what follows the blocks is computed before them, and has a gradient."""
    reached: frozenset[int]
    """Parameters a gradient of the loss arrives at."""
    differentiable: tuple[Slot, ...]
    """Arguments other than the hidden states that trained parameters before the blocks are
    behind."""


class _Watch:
    """Handler that lets every block run and notes what goes in and out. Results are kept: ids must
    stay unique."""

    def __init__(self, shadow: Shadow, root: nn.Module) -> None:
        self.shadow, self.root = shadow, root
        self.blocks: list[nn.Module] = []
        self.calls: list[BlockCall] = []
        self.outputs: list[Any] = []
        self.begun: list[int] = []
        """Sequence number of the next autograd node when each block was called."""
        self.versions_in: list[dict[int, int]] = []
        self.versions_out: list[dict[int, int]] = []
        self.used: list[set[int]] = [set()]
        """Before the blocks; then for each block and what runs between it and the next."""
        self.between: list[set[int]] = []
        self.depth = 0

    def __call__(self, block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.depth:
            raise refusal("a block calls another block of the same list", block)
        self._close_gap()
        given = Given(block, args, kwargs)
        self.blocks.append(block)
        self.calls.append(BlockCall(args=args, kwargs=kwargs))
        self.versions_in.append(_versions((args, kwargs)))
        self.begun.append(next_number())
        self.shadow.touched = set()
        self.shadow.place, self.shadow.given = (len(self.outputs), True), given.storages
        self.depth += 1
        try:
            output = forward(*args, **kwargs)
        finally:
            self.depth -= 1
        self.shadow.place, self.shadow.given = (len(self.outputs) + 1, False), set()
        given.refuse_changes()
        self.used.append(self.shadow.touched)
        self.shadow.touched = set()
        self.outputs.append(output)
        self.versions_out.append(_versions(output))
        return output

    def _close_gap(self) -> None:
        (self.between.append if self.blocks else self.used[0].update)(self.shadow.touched)

    def release(self) -> None:
        """Free the graph from the last block to the first: a graph that is freed as a whole goes
        down it call by call, and with a thousand blocks off the end of the stack."""
        while self.calls:
            self.calls.pop()
            if self.outputs:
                self.outputs.pop()

    def close(self) -> tuple[frozenset[int], ...]:
        # What runs between two blocks runs in the head, too: it belongs to the stage before the
        # blocks.
        after = self.shadow.touched
        before = self.used[0].union(*self.between)
        return (frozenset(before), *map(frozenset, self.used[1:]), frozenset(after))


def trace(root: nn.Module, gates: Gates, run: Callable[[], Any]) -> Trace:
    """Run once in outline. ``run`` calls the model and returns its logits or its loss. Raises
    RatelError.

    Once more where a block reads what others have made: a table that the first forward of a model
    makes is there by then.
    """
    with modes_as_before():
        try:
            return _trace(root, gates, run)
        except _Foreign:
            pass
        try:
            return _trace(root, gates, run)
        except _Foreign as found:
            raise found.refusal from None


class _Foreign(Exception):
    """Something is read that a block computed in this forward and did not hand on."""

    def __init__(self, refusal: RatelError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def _trace(root: nn.Module, gates: Gates, run: Callable[[], Any]) -> Trace:
    params = list(root.parameters())
    trained = {id(p) for p in params if p.requires_grad}
    with ExitStack() as stack:
        stack.enter_context(_all_trainable(params))
        buffers = _versions(list(root.buffers()))
        shadow = Shadow(params)
        watch = _Watch(shadow, root)
        stack.enter_context(_watched_modules(root, shadow, {id(p): i for i, p in enumerate(params)}))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.enable_grad())
        with gates.handled_by(watch), shadow:
            result = run()
        used = watch.close()
        _refuse_changed_buffers(root, buffers)
        try:
            found = _examine(watch, used, result, params, trained)
            _examine_reads(watch, found.forms[-1].take(watch.outputs[-1]))
            return found
        finally:
            del result
            watch.release()


def _examine(watch: _Watch, used: tuple[frozenset[int], ...], result: Any, params: list[nn.Parameter],
             trained: set[int]) -> Trace:
    if len(watch.blocks) < 2:
        raise refusal(f"its forward called {len(watch.blocks)} of the blocks", watch.root,
                      "Give a loss_fn that runs the model's blocks")
    slots, forms = _follow_hidden(watch)
    edges = [edge_of(form.take(output)) for form, output in zip(forms, watch.outputs)]
    if None in edges:
        raise refusal("a block's output has no gradient (torch.no_grad in forward?)", watch.blocks[edges.index(None)])
    roots = [x for x in leaves(_plain(result)) if isinstance(x, Tensor) and x.requires_grad]
    if not roots:
        raise refusal("the result of forward has no gradient", watch.root)
    hidden = slots[0].get(watch.calls[0].args, watch.calls[0].kwargs)
    extra = _examine_arguments(watch, slots, edges)
    for k, (form, output) in enumerate(zip(forms, watch.outputs)):
        _examine_block(watch, k, form.take(output), [slots[k].get(watch.calls[k].args, watch.calls[k].kwargs),
                                                     *(tensor for (block, _), (tensor, _) in extra.items() if block == k)])
    before = reach([hidden, *(tensor for tensor, _ in extra.values())])
    index = {id(p): i for i, p in enumerate(params)}
    # The tail runs everything outside the blocks again. So it needs what its result was made from,
    # also where that was touched before the blocks alone: a scale computed first and used last, a
    # penalty on weights added to the loss.
    after = _examine_tail(watch, roots, edges, before)
    used = (*used[:-1], used[-1] | {index[p] for p in after.params if p in index})
    return Trace(
        stages=tuple(watch.blocks), slots=slots, forms=forms, used=used,
        begins_early=any(is_older(node, watch.begun[0]) for node in after.nodes),
        reached=frozenset(index[p] for p in reach(roots).params if p in index),
        differentiable=tuple(slot for slot, (_, found) in extra.items() if found.params & trained))


def _follow_hidden(watch: _Watch) -> tuple[tuple[HiddenSlot, ...], tuple[OutputForm, ...]]:
    """Find where each block takes the hidden states by looking for the object its predecessor
    returned."""
    slots: list[HiddenSlot] = []
    forms: list[OutputForm] = []
    for k in range(1, len(watch.blocks)):
        slot, form = _link(watch, k)
        slots.append(slot)
        forms.append(form)
    last = watch.outputs[-1]
    if _kind(last) is not forms[-1].kind or (forms[-1].kind is not None and len(last) <= forms[-1].index):
        raise refusal("the last block returns something else than the others", watch.blocks[-1])
    forms.append(_form(last, forms[-1].index))
    first = watch.calls[0]
    hidden = slots[0].get(first.args, first.kwargs)
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise refusal("the first block does not take the hidden states where the others do", watch.blocks[0])
    return (slots[0], *slots), tuple(forms)


def _link(watch: _Watch, k: int) -> tuple[HiddenSlot, OutputForm]:
    """Where block ``k`` takes what block ``k - 1`` returned."""
    output, call = watch.outputs[k - 1], watch.calls[k]
    items = list(output) if isinstance(output, (tuple, list)) else [output]
    places: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    found = [(place, index) for place, value in places for index, item in enumerate(items)
             if isinstance(item, Tensor) and item is value]
    if not found:
        raise refusal("what a block returns is changed before the next block takes it, or is not a tensor or a tuple",
                      watch.blocks[k - 1])
    if len({index for _, index in found}) > 1 or len(found) > 1:
        raise refusal("the blocks hand more than one tensor to each other", watch.blocks[k - 1])
    place, index = found[0]
    hidden = items[index]
    if watch.versions_in[k].get(id(hidden)) != watch.versions_out[k - 1].get(id(hidden)):
        raise refusal("what a block returns is changed in place before the next block takes it", watch.blocks[k - 1])
    return HiddenSlot(place=place), _form(output, index)


def _form(output: Any, index: int) -> OutputForm:
    if isinstance(output, Tensor):
        return OutputForm()
    return OutputForm(kind=_kind(output), length=len(output), index=index)


def _kind(output: Any) -> type | None:
    return type(output) if type(output) in (tuple, list) else None


def _examine_arguments(watch: _Watch, slots: Sequence[HiddenSlot],
                       edges: Sequence[Edge]) -> dict[Slot, tuple[Tensor, Reach]]:
    """Arguments other than the hidden states that parameters are behind. None may come from another
    block."""
    extra: dict[Slot, tuple[Tensor, Reach]] = {}
    for k, (call, slot) in enumerate(zip(watch.calls, slots)):
        call = slot.put(call, None)
        for number, leaf in enumerate(leaves((call.args, call.kwargs))):
            if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                continue
            found = reach([leaf], edges)
            if found.stopped_at:
                raise refusal("a block takes something computed from another block's output besides the hidden states",
                              watch.blocks[k])
            extra[k, number] = (leaf, found)
    return extra


def _examine_block(watch: _Watch, k: int, output: Tensor, given: list[Tensor]) -> None:
    """A block runs again in backward, on its arguments alone: what it has from elsewhere is of
    another run, and gets no gradient."""
    found = reach([output], [edge for edge in map(edge_of, given) if edge is not None])
    if any(is_older(node, watch.begun[k]) for node in found.nodes):
        raise refusal(_NOT_GIVEN, watch.blocks[k], "Hand it to the block as an argument")


def _examine_reads(watch: _Watch, last: Tensor) -> None:
    """Examine, as for graphs, what carries no gradient: numbers that were detached, masks,
    counts."""
    for (block, inside), (_, made_inside), storage in watch.shadow.foreign:
        if inside:
            raise _Foreign(refusal(_NOT_GIVEN, watch.blocks[block], "Hand it to the block as an argument"))
        if made_inside and block == len(watch.blocks) and storage != last.untyped_storage()._cdata:
            raise _Foreign(refusal(_MORE_THAN_HIDDEN, watch.root))


def _examine_tail(watch: _Watch, roots: list[Tensor], edges: list[Edge], before: Reach) -> Reach:
    """What the result was made from besides the last block's output."""
    after = reach(roots, edges)
    if after.stopped_at - {edges[-1]}:
        raise refusal("the result uses the output of an earlier block, not only the last one's", watch.root)
    if edges[-1] not in after.stopped_at:
        raise refusal("the result does not use the last block's output", watch.root)
    if after.nodes & before.nodes:
        raise refusal("the result uses something computed before the blocks that does not go through them (a skip "
                      "connection around them)", watch.root)
    inside = reach([edge_holder for edge_holder in _side_outputs(watch, edges)])
    if after.nodes & inside.nodes:
        raise refusal(_MORE_THAN_HIDDEN, watch.root)
    return after


def _side_outputs(watch: _Watch, edges: list[Edge]) -> Iterator[Tensor]:
    for output, edge in zip(watch.outputs, edges):
        for item in leaves(output):
            if isinstance(item, Tensor) and item.requires_grad and edge_of(item) != edge:
                yield item


def refusal(reason: str, module: nn.Module, remedy: str = "Change the model so that each block takes and returns the "
            "hidden states alone") -> RatelError:
    return RatelError(f"cannot be run one block at a time: {reason}", field="model", value=type(module).__name__,
                      remedy=remedy)


def _plain(result: Any) -> Any:
    return dict(result) if isinstance(result, dict) else result


def _versions(tree: Any) -> dict[int, int]:
    return {id(x): x._version for x in leaves(tree) if isinstance(x, Tensor)}


def _refuse_changed_buffers(root: nn.Module, before: dict[int, int]) -> None:
    written_first = chosen_buffers(root)
    for name, buffer in root.named_buffers():
        if name not in written_first and before.get(id(buffer), buffer._version) != buffer._version:
            raise RatelError("forward writes to the buffer, and a block runs twice in a step (it is recomputed in "
                             "backward)", field="model", value=name, remedy="Keep the running value outside the model")


@contextmanager
def _all_trainable(params: list[nn.Parameter]) -> Iterator[None]:
    """Every parameter leaves its mark in the graph, frozen ones too."""
    flags = [p.requires_grad for p in params]
    for param in params:
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param, flag in zip(params, flags):
            param.requires_grad_(flag)


@contextmanager
def _watched_modules(root: nn.Module, shadow: Shadow, index: dict[int, int]) -> Iterator[None]:
    """Count a module's own parameters as used when it is called: a kernel called by address is not
    seen otherwise."""
    def note(module: nn.Module, args: Any) -> None:
        shadow.touched.update(index[id(p)] for p in module._parameters.values() if p is not None)
    handles = [m.register_forward_pre_hook(note) for m in root.modules()
               if any(p is not None for p in m._parameters.values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
