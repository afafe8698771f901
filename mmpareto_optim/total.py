"""A scalar that carries its losses, for trainers that call ``backward`` on one tensor."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mmpareto_optim.options import check_losses
from mmpareto_optim.rows import uncompiled
from mmpareto_optim.types import Losses


def total_of(  # noqa: D417  # a method of both classes
    self: Any,
    losses: Losses,
    *,
    features: Mapping[str, Tensor] | None = None,
    param_groups_by_modality: Mapping[str, Any] | None = None,
) -> Tensor:
    """The sum of the losses, whose ``backward()`` integrates: for trainers that call it.

    ``opt.total(losses).backward()`` does what ``opt.backward(losses)`` does, to the bit. What the
    trainer multiplies or divides the total by (a ``GradScaler``'s scale, the number of
    micro-batches) becomes a factor on every loss, and totals accumulate as ``backward`` does.

    A term that is added to a total is differentiated by itself, and its gradient is added without
    being integrated; the next micro-batch is then added too, as after any change of ``.grad``. If
    the term shares a graph with the losses, add it to one of them, or pass ``retain_graph=True``.
    Gradients go to ``.grad`` only: ``torch.autograd.grad`` does not find them, and nothing is
    filled by ``backward(inputs=...)``. Under ``torch.no_grad()`` this is the plain sum.

    Args:
        losses: as for :meth:`MMParetoOptimizer.backward`, and so are the others.
        features: see there.
        param_groups_by_modality: see there.

    Returns:
        A scalar, of shape ``()``, on the device of the first loss.

    Raises:
        TypeError, ValueError: arguments that are wrong, as for ``backward``, but at once.
        RuntimeError: in ``backward()``: with ``create_graph=True``; a second time without
            ``retain_graph=True`` in the first; and all that ``backward`` raises.
    """
    return uncompiled(_total)(self, losses, features, param_groups_by_modality)


def _total(owner: Any, losses: Any, features: Any, by_hand: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return _sum(check_losses(losses, need_graph=False))
    losses, modalities = owner._current().check_given(losses, features, by_hand)
    features = features and dict(features)
    if by_hand is not None:  # it may hold iterators, and has been read
        by_hand = {name: list(params) for name, params in modalities.items()}
    integrate = partial(owner.backward, features=features, param_groups_by_modality=by_hand)
    # As a sum would, it keeps the losses as they are now: an edit in place comes after.
    with torch._C.DisableTorchFunctionSubclass():
        losses = {name: loss.clone() for name, loss in losses.items()}
    anchor = torch.ones((), device=next(iter(losses.values())).device, requires_grad=True)
    return cast(Tensor, _Total.apply(anchor, losses, integrate))  # type: ignore[no-untyped-call]


def _sum(losses: Losses) -> Tensor:
    """The value of the sum, a plain tensor even where the losses are of a subclass."""
    with torch._C.DisableTorchFunctionSubclass():
        values = [loss.detach().reshape(()) for loss in losses.values()]
        return sum((value.to(values[0].device) for value in values[1:]), values[0] + 0)


class _Total(torch.autograd.Function):
    """The sum. Its one input is a leaf that nobody sees; ``integrate`` goes through the graphs."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, losses: Losses, integrate: Callable[..., None]) -> Tensor:
        ctx.losses, ctx.integrate = losses, integrate
        return _sum(losses)

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "total(losses).backward(create_graph=True): integrated gradients have no graph. "
                "Leave create_graph out"
            )
        if ctx.losses is None:
            raise RuntimeError(
                "backward() a second time on one total(losses), whose graphs the first has freed: "
                "make a forward pass and call total() again, or pass retain_graph=True to the first"
            )
        # Private to PyTorch: without it, a second backward is refused.
        is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
        retain_graph = is_kept is not None and is_kept()
        with torch.enable_grad():  # as where the losses are handed to backward() itself
            scaled = {name: loss * factors[0].to(loss) for name, loss in ctx.losses.items()}
            ctx.integrate(scaled, retain_graph=retain_graph)
        if not retain_graph:
            ctx.losses = ctx.integrate = None
        return None, None, None
