"""Walks over autograd's graph, for what gradients alone do not tell."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from mmpareto_optim.types import Losses

Edge = tuple[Any, int]
"""A node of the graph and which of its outputs."""

DEEPEST = 3000
"""How many nodes deep a graph is walked. Nodes that were looked at are freed by a recursion in
PyTorch, which ends the process 40,000 nodes deep, and 4,000 deep on a stack of 1 MB."""


def edge_of(tensor: Tensor) -> Edge:
    """Where a tensor stands in the graph."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def edges_behind(
    starts: Iterable[Edge],
    stops: Container[Edge] = (),
    seen: set[Edge] | None = None,
    *,
    to_the_end: bool = False,
) -> Iterator[Edge]:
    """Each edge on the way from some to the leaves, once, but for those seen; ends at stops.

    Raises:
        ValueError: the graph is deeper than is walked, and has to be walked ``to_the_end``.
    """
    seen = set() if seen is None else seen
    level = list(starts)
    for _ in range(DEEPEST):
        behind: list[Edge] = []
        for edge in level:
            if edge[0] is None or edge in seen:
                continue
            seen.add(edge)
            yield edge
            if edge not in stops:
                behind.extend(edge[0].next_functions)
        level = behind
        if not level:
            return
    if to_the_end:
        raise ValueError(
            f"the graph is more than {DEEPEST} operations deep, too deep to tell which parameters "
            "are behind the features: leave features out for the exact gradients"
        )


def leaves_of(edges: Iterable[Edge]) -> set[Tensor]:
    """The leaf tensors among some edges: those that a backward would accumulate into."""
    leaves = {node.variable for node, _ in edges if type(node).__name__ == "AccumulateGrad"}
    return {leaf for leaf in leaves if leaf.requires_grad}  # some may have been frozen since


def leaves_beside(params: Sequence[Tensor], losses: Losses) -> Mapping[Tensor, str]:
    """The leaves behind some losses that are not among the parameters, and the first such loss.

    Autograd leaves out what leads to nothing that it is asked for. A function that calls
    ``backward`` on parameters inside it may be on the way to another leaf alone.
    """
    stops, seen = {edge_of(param) for param in params}, set[Edge]()
    held = set(params)
    return {
        leaf: name
        for name, loss in losses.items()
        for leaf in leaves_of(edges_behind([edge_of(loss)], stops, seen))
        if leaf not in held
    }
