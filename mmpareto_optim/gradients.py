"""One gradient per loss, by one ``torch.autograd.grad`` call each."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmpareto_optim.graph import edge_of, edges_behind, kind_of

Gradient = list[Tensor | None]
"""One tensor for each parameter, None where the loss does not reach it."""

Differentiate = Callable[..., Sequence[Tensor | None]]
"""A loss, parameters and whether to ``retain_graph``, by name, to the loss's gradient."""


def by_autograd(
    loss: Tensor, params: Sequence[Tensor], *, retain_graph: bool
) -> Sequence[Tensor | None]:
    """The gradient of a loss, with no trace in ``.grad`` and no hook of a module run."""
    if not params:
        return []
    return torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)


def check_losses(losses: Any) -> None:
    """Raise unless ``losses`` maps names to scalars that have a graph."""
    if not isinstance(losses, Mapping):
        raise TypeError(
            "losses must be a mapping from a name to a scalar tensor, such as "
            f'{{"mm": loss, "audio": audio_loss}}, got {type(losses).__name__}'
        )
    if not losses:
        raise ValueError("losses is empty: give at least one loss")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss {name!r} must be a scalar tensor, got {type(loss).__name__}: "
                "pass the tensor itself, not its .item()"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"loss {name!r} must be a scalar, got shape {tuple(loss.shape)}: "
                "reduce it with .mean() or .sum()"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"loss {name!r} has no graph, so it has no gradient: compute it from the "
                "model's output outside torch.no_grad() and without .detach(), or leave it "
                "out of losses"
            )


def gradients_of(
    losses: Mapping[str, Tensor],
    params: Sequence[Tensor],
    describe: Callable[[Tensor], str],
    differentiate: Differentiate = by_autograd,
) -> dict[str, Gradient]:
    """Differentiate each loss by the parameters.

    Args:
        losses: scalars with a graph. What the first one reaches is freed; what only others
            reach lives until the losses do not. Put the joint loss first.
        params: leaf tensors that require a gradient.
        describe: a parameter's name for error messages.
        differentiate: how the gradient of one loss is found.

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
        retain_graph = name != names[0]
        run = partial(differentiate, losses[name], params, retain_graph=retain_graph)
        found[name] = _named(name, run)
        for param, gradient in zip(params, found[name], strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise TypeError(
                    f"loss {name!r} gives a sparse gradient for {describe(param)}; only dense "
                    "gradients can be integrated: build the embedding with sparse=False"
                )
    if any(all(g is None for g in column) for column in zip(*found.values(), strict=True)):
        _check_not_reentrant(losses)
    return {name: found[name] for name in names}


def _named(name: str, run: Callable[[], Sequence[Tensor | None]]) -> Gradient:
    """The gradient that ``run`` finds; errors of autograd name the loss and the mend."""
    try:
        return list(run())
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(
                f"loss {name!r}: its graph has been freed by an earlier backward. Compute the "
                "losses anew with a forward pass before each backward() or step(losses=...)"
            ) from error
        if "use_reentrant=True" in str(error):
            raise _reentrant(name) from error
        if "donated buffer" in str(error):
            raise RuntimeError(
                f"loss {name!r} goes through a region that torch.compile compiled for a single "
                "backward pass, and each loss takes one: set "
                "torch._functorch.config.donated_buffer = False before the first backward"
            ) from error
        raise


def _check_not_reentrant(losses: Mapping[str, Tensor]) -> None:
    """Raise if a graph holds a reentrant checkpoint: autograd sees no parameter inside it.

    Worth a walk only where some parameter is reached by no loss.
    """
    for name, loss in losses.items():
        for node, _ in edges_behind([edge_of(loss)]):
            if kind_of(node) == "CheckpointFunctionBackward":
                raise _reentrant(name)


def _reentrant(name: str) -> RuntimeError:
    return RuntimeError(
        f"loss {name!r} goes through torch.utils.checkpoint with use_reentrant=True, whose "
        "parameters cannot be differentiated one loss at a time: pass use_reentrant=False "
        "(Hugging Face: gradient_checkpointing_kwargs={'use_reentrant': False})"
    )
