"""One gradient for each loss at the parameters, by one ``torch.autograd.grad`` call each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.gradients.graph import edge_of, edges_behind, leaves_behind, leaves_of
from mmpareto_optim.gradients.losses import Losses
from mmpareto_optim.ground import Describe, Gradient

SUM = "sum of the losses"
"""What stands for a loss's name where all are differentiated as one."""

Differentiate = Callable[..., Gradient]
"""As :func:`by_autograd`."""

Arrived = Callable[[str, Gradient], None]
"""Takes a loss's name and its gradient."""


def by_autograd(
    outputs: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    others: Sequence[Tensor] = (),
    along: Sequence[Tensor] | None = None,
    retain_graph: bool,
) -> Gradient:
    """The gradient of some outputs, as ``backward`` would leave it in ``.grad``.

    A function whose own backward calls ``backward`` (a reversible layer) accumulates into
    ``.grad`` of the parameters inside it, which is a part of this gradient that
    ``torch.autograd.grad`` does not return.

    Args:
        outputs: what is differentiated.
        params: leaf tensors and outputs of encoders; no ``.grad`` of theirs may be in the way.
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
    gradient: Gradient = list(found[: len(params)])
    del found
    for position, param in enumerate(params):
        if param.is_leaf and param.grad is not None:
            behind, param.grad = param.grad, None
            known = gradient[position]
            gradient[position] = behind if known is None else known + behind
    return gradient


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


def leaves_not_among(params: Sequence[Tensor], losses: Losses) -> list[Tensor]:
    """The leaves behind some losses that are not among the parameters.

    Autograd leaves out what leads to nothing that it is asked for. A function that calls
    ``backward`` on parameters inside it may be on the way to another leaf alone. That can change
    from step to step, so the graph is walked in each: a hundredth of a backward or so.
    """
    stops = {edge_of(param) for param in params if not param.is_leaf}
    if stops:  # as a differentiable step leaves them
        return list(leaves_of(edges_behind(map(edge_of, losses.values()), stops)))
    held = set(map(id, params))  # a tensor's own hash is a function in Python
    return [leaf for leaf in leaves_behind(losses.values()) if id(leaf) not in held]


def gradients_of(
    losses: Mapping[str, Tensor],
    params: Sequence[Tensor],
    describe: Describe,
    differentiate: Differentiate = by_autograd,
    *,
    others: Sequence[Tensor] = (),
    retain_graph: bool = False,
    arrived: Arrived | None = None,
) -> dict[str, Gradient]:
    """Differentiate each loss by the parameters.

    Args:
        losses: scalars with a graph. What the first one reaches is freed; what only others
            reach lives until the losses do. Put the joint loss first.
        params: leaf tensors that require a gradient, and outputs of encoders.
        describe: a parameter's name for error messages.
        differentiate: how the gradient of one loss is found.
        others: as for :func:`by_autograd`.
        retain_graph: whether the graph is needed again after the last loss.
        arrived: is told of each gradient before the next loss is differentiated.

    Returns:
        For each loss one gradient for each parameter. These tensors may share memory with
        others that autograd handed out: they are to be read, not written.

    Raises:
        RuntimeError: a loss's graph was freed before, goes through
            ``torch.utils.checkpoint`` with ``use_reentrant=True``, or was compiled for a single
            backward pass; names the loss.
        TypeError: a gradient is sparse; names the loss and the parameter.
    """
    names = list(losses)
    found = {}
    # Backwards, because the pass that frees the graph should be the one that reaches most of
    # it, and the joint loss is usually named first.
    for name in reversed(names):
        with naming(f"loss {name!r}"):
            found[name] = differentiate(
                [losses[name]],
                params,
                others=others,
                retain_graph=retain_graph or name != names[0],
            )
        _check_dense(f"loss {name!r} gives", found[name], params, describe)
        if arrived is not None:
            arrived(name, found[name])
    return {name: found[name] for name in names}


def gradient_of_sum(
    losses: Mapping[str, Tensor],
    params: Sequence[Tensor],
    describe: Describe,
    differentiate: Differentiate = by_autograd,
    *,
    others: Sequence[Tensor] = (),
    retain_graph: bool = False,
) -> dict[str, Gradient]:
    """As :func:`gradients_of`, for all losses together, in one pass, as if they were one."""
    names = f"losses {list(losses)}"
    with naming(names):
        found = differentiate(
            list(losses.values()), params, others=others, retain_graph=retain_graph
        )
    _check_dense(f"one of the {names} gives", found, params, describe)
    return {SUM: found}


def _check_dense(
    what_gives: str, found: Gradient, params: Sequence[Tensor], describe: Describe
) -> None:
    for param, gradient in zip(params, found, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise TypeError(
                f"{what_gives} a sparse gradient for {describe(param)}; only dense "
                "gradients can be integrated: build the embedding with sparse=False"
            )


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors of autograd that name what is differentiated, and the mend."""
    try:
        yield
    except RuntimeError as error:
        mend = _mend_of(str(error))
        if mend is None:
            raise
        raise RuntimeError(f"{what}{mend}") from error


def _mend_of(error: str) -> str | None:
    mends: dict[str, Any] = {
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
    return next((mend for sign, mend in mends.items() if sign in error), None)
