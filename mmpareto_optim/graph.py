"""Walks over autograd's graph, for what gradients alone do not tell."""

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

from torch import Tensor

Edge = tuple[Any, int]
"""A node of the graph and which of its outputs."""


def edge_of(tensor: Tensor) -> Edge:
    """Where a tensor stands in the graph."""
    return tensor.grad_fn, tensor.output_nr


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
    """The leaf tensors among some edges."""
    return {node.variable for node, _ in edges if kind_of(node) == "AccumulateGrad"}


def kind_of(node: Any) -> str:
    """The name of a node's class; its ``name()`` older PyTorch refuses for functions in Python."""
    return type(node).__name__


BLURRING = {
    "CompiledFunctionBackward": (
        "different outputs of one region that torch.compile compiled",
        "compile each encoder and each head for itself, as in "
        "model.audio = torch.compile(model.audio)",
    ),
    "RegisterPostBackwardFunctionBackward": (
        "different inputs of one module that fully_shard sharded",
        "shard each encoder and each head for itself, as in fully_shard(model.audio_head)",
    ),
}
"""Nodes that give zeros, not None, for what a loss does not reach: what they are, the mend."""


def check_not_blurred(losses: Mapping[str, Tensor], stops: Container[Edge] = ()) -> None:
    """Raise if ``torch.compile`` or FSDP2 hides which loss reaches which parameter.

    The backward of a compiled region gives zeros, not None, for what an output does not
    depend on, so that every loss seems to reach all that is in it; so does that of a sharded
    module for those of its inputs that a loss does not depend on.

    Raises:
        ValueError: two losses reach different parts of one region; names them.
    """
    reaching: dict[Any, dict[int, set[str]]] = {}
    for name, loss in losses.items():
        for edge in edges_behind([edge_of(loss)], stops):
            node, output = edge
            if edge not in stops and kind_of(node) in BLURRING:
                reaching.setdefault(node, {}).setdefault(output, set()).add(name)
    for node, outputs in reaching.items():
        place, mend = BLURRING[kind_of(node)]
        for one, other in combinations(outputs.values(), 2):
            if one != other:
                raise ValueError(
                    f"losses {sorted(one)} and {sorted(other)} go through {place}, which hides "
                    f"which parameters each of them reaches: {mend}, or name the blocks of "
                    "integration='mmpareto' with param_groups_by_modality"
                )
