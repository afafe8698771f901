"""One loss, or an encoder's output, -> its gradients; errors of autograd with the mend."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from mmpareto_optim.types import Describe, Gradient, Losses

Edge = tuple[Any, int]
"""A node of the graph and which of its outputs."""

DEEPEST = 1000
"""How many nodes deep a graph is walked. Each node that was looked at is freed by a recursion in
PyTorch, which ends the process some ten thousand nodes deep."""


def by_autograd(
    outputs: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Sequence[Tensor] = (),
    *,
    along: Sequence[Tensor] | None = None,
    retain_graph: bool = False,
) -> Gradient:
    """The gradient of some outputs; None where they do not depend on a parameter.

    Args:
        outputs: what is differentiated.
        params: leaf tensors and outputs of encoders.
        others: leaves that are passed through as well, so that no part of the graph is left out.
        along: gradients at the outputs that are not scalars.
        retain_graph: whether the graph is needed again.
    """
    targets = [*params, *others]
    if not targets:
        return []
    found = torch.autograd.grad(
        outputs, targets, along, retain_graph=retain_graph, allow_unused=True
    )
    return list(found[: len(params)])


def add_what_functions_wrote(gradient: Gradient, params: Sequence[Tensor]) -> bool:
    """Add to a gradient what was accumulated into ``.grad`` meanwhile; whether there was any.

    A function whose own backward calls ``backward`` (a reversible layer) accumulates there for
    the parameters inside it, which is a part of the gradient that ``torch.autograd.grad`` does not
    return.
    """
    any_written = False
    for position, param in enumerate(params):
        if param.is_leaf and param.grad is not None:
            written, param.grad = param.grad, None
            known = gradient[position]
            gradient[position] = written if known is None else known + written
            any_written = True
    return any_written


@contextmanager
def grads_set_aside(params: Sequence[Tensor]) -> Iterator[Gradient]:
    """No parameter has a ``.grad`` meanwhile; gives those that there were, and puts them back."""
    before = [param.grad for param in params]
    try:
        try:
            for param, gradient in zip(params, before, strict=True):
                if gradient is not None:
                    param.grad = None
            yield before
        finally:
            _put_back(params, before)
    finally:  # once more, after an interrupt in the middle
        _put_back(params, before)


def _put_back(params: Sequence[Tensor], gradients: Gradient) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        if param.grad is not gradient:
            param.grad = gradient


def gradients_of(losses: Losses, params: Sequence[Tensor], describe: Describe) -> dict[str, Gradient]:
    """Differentiate each loss by the parameters, on this process.

    Args:
        losses: scalars with a graph, which is freed.
        params: leaf tensors that require a gradient.
        describe: a parameter's name for error messages.

    Returns:
        For each loss one gradient for each parameter. These tensors may share memory with
        others that autograd handed out: they are to be read, not written.
    """
    found = {}
    for name in reversed(list(losses)):
        retain = name != next(iter(losses))
        found[name] = by_autograd([losses[name]], params, retain_graph=retain)
        add_what_functions_wrote(found[name], params)
        check_dense(name, found[name], params, describe)
    return {name: found[name] for name in losses}


def check_dense(
    name: str, gradient: Gradient, params: Sequence[Tensor], describe: Describe
) -> None:
    """Raise TypeError for a sparse gradient; names the loss and the parameter."""
    for param, piece in zip(params, gradient, strict=True):
        if piece is not None and piece.layout != torch.strided:
            raise TypeError(
                f"loss {name!r} gives a sparse gradient for {describe(param)}; only dense "
                "gradients can be integrated: build the embedding with sparse=False"
            )


def edge_of(tensor: Tensor) -> Edge:
    """Where a tensor stands in the graph."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def edges_behind(
    starts: Iterable[Edge], stops: Container[Edge] = (), seen: set[Edge] | None = None
) -> Iterator[Edge]:
    """Each edge on the way from some to the leaves, once, down to a depth of ``DEEPEST``.

    Args:
        starts: where the way begins.
        stops: edges where it ends.
        seen: edges to leave out; those that are given are added.
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


def leaves_of(edges: Iterable[Edge]) -> set[Tensor]:
    """The leaf tensors among some edges: those that a backward would accumulate into."""
    return {node.variable for node, _ in edges if type(node).__name__ == "AccumulateGrad"}


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


def raise_explained(error: RuntimeError, what: str) -> NoReturn:
    """Raise an error of autograd again; named, and with the mend, if that is known."""
    mend = next((mend for sign, mend in MENDS.items() if sign in str(error)), None)
    if mend is None:
        raise error
    raise RuntimeError(f"{what}{mend}") from error


MENDS = {
    "second time": (
        ": its graph has been freed by an earlier backward. step(losses=...) and "
        "backward(losses) differentiate by themselves: remove a backward of yours, and make a "
        "forward pass for each call. Where two wrappers step on one graph, give both "
        "optimizers to one, as in MMParetoOptimizer([first, second]). Only where two gradients "
        "are to add up, pass retain_graph=True to the first backward"
    ),
    "use_reentrant=True": (
        " goes through torch.utils.checkpoint with use_reentrant=True, whose parameters cannot "
        "be differentiated one loss at a time: pass use_reentrant=False (Hugging Face: "
        "gradient_checkpointing_kwargs={'use_reentrant': False})"
    ),
    "donated buffer": (
        " goes through a region that torch.compile compiled for a single backward pass, and "
        "each loss takes one: set torch._functorch.config.donated_buffer = False before the "
        "first backward"
    ),
    "fabric.backward(loss)": (
        " comes from a module that Fabric set up, whose outputs refuse every backward but "
        "Fabric's with this precision: compute it with the model itself, under "
        "fabric.autocast()"
    ),
    "engine.backward(loss)": (
        " comes from a DeepSpeed engine, whose outputs refuse every backward but the engine's: "
        "compute it with engine.module, and see the recipe for DeepSpeed"
    ),
}
"""By a part of autograd's message what follows the name of the loss."""
