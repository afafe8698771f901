"""One loss -> its gradients -> a row; errors of autograd with the mend."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from mmpareto_optim.graph import leaves_beside
from mmpareto_optim.messages import warn_of_unheld
from mmpareto_optim.rows import Form, Row, forms_of, layout_of
from mmpareto_optim.types import Constants, Describe, Gradient, Losses

if TYPE_CHECKING:
    from mmpareto_optim.distributed.single import Processes

Rows = dict[str, Row]
"""By the name of the loss."""


@dataclass(frozen=True)
class Backward:
    """One backward, of which all that was given is checked.

    Attributes:
        losses: by name.
        params: what is differentiated by.
        processes: those that integrate as one.
        constants: what these have in common, by the names of error messages.
        retain_graph: whether the graph is needed again.
        describe: a parameter's name for error messages.
    """

    losses: Losses
    params: Sequence[Tensor]
    processes: "Processes"
    constants: Constants
    retain_graph: bool
    describe: Describe


class Differentiation:
    """Differentiates one loss after the other; remembers what graphs turned out to be like.

    Attributes:
        is_first: whether there has been no backward yet.
    """

    def __init__(self) -> None:
        self.is_first = True
        self._functions_call_backward = False

    def rows(self, backward: Backward) -> Rows:
        """Each loss's gradient at the parameters, averaged over the processes.

        The pass that frees the graph should be the one that reaches most of it, and the joint
        loss is usually named first: so the first loss is the last.
        """
        forms = local_forms(backward)
        others = self._leaves_to_pass_through(backward)
        names = backward.processes.losses_of_all(backward.losses, backward.constants)
        rows = {}
        for name in reversed(names):
            gradient = self.gradient_of(backward, name, backward.params, others, names[0])
            rows[name] = averaged_row(backward.processes, name, forms, gradient)
            del gradient  # autograd's own tensors, before the next pass makes more of them
        backward.processes.wait()
        self.is_first = False
        return {name: rows[name] for name in names}

    def gradient_of(
        self,
        backward: Backward,
        name: str,
        targets: Sequence[Tensor],
        others: Sequence[Tensor],
        last: str,
    ) -> Gradient:
        """A loss's gradient at some tensors; the pass of the last loss frees the graph."""
        if name not in backward.losses:  # another process has it
            return [None] * len(targets)
        try:
            gradient = backward.processes.differentiate(
                [backward.losses[name]], targets, others, backward.retain_graph or name != last
            )
        except RuntimeError as error:
            raise_explained(error, f"loss {name!r}")
        self._functions_call_backward |= add_what_functions_wrote(gradient, targets)
        check_dense(name, gradient, targets, backward.describe)
        return gradient

    def _leaves_to_pass_through(self, backward: Backward) -> Sequence[Tensor]:
        """Leaves beside the parameters, on the way to which a function may call ``backward``.

        Looked for in the first backward, and in each one where there are such functions.
        """
        if backward.processes.shares is not None:  # backward() passes through all
            return ()
        if not (self.is_first or self._functions_call_backward):
            return ()
        leaves = leaves_beside(backward.params, backward.losses)
        if self.is_first:
            warn_of_unheld(leaves)
        return list(leaves)


def local_forms(backward: Backward) -> tuple[Form, ...]:
    """What this process holds of the parameters."""
    return forms_of([backward.processes.local(param) for param in backward.params])


def averaged_row(
    processes: "Processes", name: str, forms: tuple[Form, ...], gradient: Gradient
) -> Row:
    """A gradient as a row, whose average over the processes begins."""
    given = processes.given_by_all(name, tuple(piece is not None for piece in gradient))
    row = layout_of(forms, given).flatten(gradient)
    processes.average(row)
    return row


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


def gradients_of(
    losses: Losses, params: Sequence[Tensor], describe: Describe
) -> dict[str, Gradient]:
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
