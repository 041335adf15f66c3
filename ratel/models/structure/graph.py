"""Walking autograd graphs: which parameters a tensor depends on, and through which other
tensors."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Edge = tuple[Any, int]
"""One output of one node."""


@dataclass
class Reach:
    """What lies behind some tensors. Nodes are kept alive here, so that their identity holds."""

    nodes: set[Any] = field(default_factory=set)
    params: set[int] = field(default_factory=set)
    """Ids of the leaf tensors that require grad."""
    stopped_at: set[Edge] = field(default_factory=set)


def edge_of(tensor: Tensor) -> Edge | None:
    return (tensor.grad_fn, tensor.output_nr) if tensor.grad_fn is not None else None


def next_number() -> int:
    """No node that this thread has made so far has a number as high."""
    with torch.enable_grad():
        return torch.zeros((), requires_grad=True).clone().grad_fn._sequence_nr()


def is_older(node: Any, number: int) -> bool:
    return node._sequence_nr() < number


def reach(roots: Iterable[Tensor], stops: Iterable[Edge] = ()) -> Reach:
    """Everything the roots were computed from, not looking past ``stops``."""
    found, stop_set = Reach(), set(stops)
    pending: list[Edge] = []
    for root in roots:
        if root.grad_fn is not None:
            pending.append((root.grad_fn, root.output_nr))
        elif root.requires_grad:
            found.params.add(id(root))
    while pending:
        edge = pending.pop()
        node = edge[0]
        if edge in stop_set:
            found.stopped_at.add(edge)
            continue
        if node in found.nodes:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:  # AccumulateGrad: a leaf, possibly shared with other parts of the model
            found.params.add(id(variable))
            continue
        found.nodes.add(node)
        pending.extend((next_node, number) for next_node, number in node.next_functions if next_node is not None)
    return found
