"""Walks over autograd's graph, for what gradients alone do not tell."""

from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Edge = tuple[Any, int]
"""A node of the graph and which of its outputs."""


def edge_of(tensor: Tensor) -> Edge:
    """Where a tensor stands in the graph."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def edges_behind(starts: Iterable[Edge], stops: Container[Edge] = ()) -> Iterator[Edge]:
    """Each edge on the way from some to the leaves, once; the way ends at ``stops``."""
    seen: set[Edge] = set()
    expanded: set[Any] = set()
    waiting = list(starts)
    while waiting:
        edge = waiting.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        yield edge
        if edge not in stops and node not in expanded:
            expanded.add(node)
            waiting.extend(node.next_functions)


def leaves_of(edges: Iterable[Edge]) -> set[Tensor]:
    """The leaf tensors among some edges: those that a backward would accumulate into."""
    return {node.variable for node, _ in edges if type(node).__name__ == "AccumulateGrad"}


def leaves_behind(losses: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors behind some losses; node by node, which is faster than edge by edge."""
    waiting: list[Any] = [get_gradient_edge(loss).node for loss in losses]
    seen, leaves = set(waiting), []
    while waiting:
        node = waiting.pop()
        behind = node.next_functions
        if not behind and type(node).__name__ == "AccumulateGrad":
            leaves.append(node.variable)
        for other, _ in behind:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
    return leaves
