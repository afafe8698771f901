"""A backward pass for each loss, whose gradient at once becomes a row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mmpareto_optim.autograd import (
    add_what_functions_wrote,
    check_dense,
    raise_explained,
    leaves_beside,
)
from mmpareto_optim.distributed.processes import Processes
from mmpareto_optim.features import FeaturePaths, hooks_set_aside
from mmpareto_optim.messages import warn_of_unheld
from mmpareto_optim.rows import Form, Row, forms_of, layout_of
from mmpareto_optim.types import Constants, Describe, Features, Gradient, Losses

Rows = dict[str, Row]
"""By the name of the loss."""

IntegrateAt = Callable[[Rows], Sequence[Tensor]]
"""From the rows at the features to one gradient for each feature."""


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
    processes: Processes
    constants: Constants
    retain_graph: bool
    describe: Describe


class Differentiation:
    """Differentiates one loss after the other; remembers what graphs turned out to be like."""

    def __init__(self) -> None:
        self._is_first = True
        self._functions_call_backward = False

    def rows(self, backward: Backward) -> Rows:
        """Each loss's gradient at the parameters, averaged over the processes.

        The pass that frees the graph should be the one that reaches most of it, and the joint
        loss is usually named first: so the first loss is the last.
        """
        forms = _local_forms(backward)
        others = self._leaves_to_pass_through(backward)
        names = backward.processes.losses_of_all(backward.losses, backward.constants)
        rows = {}
        for name in reversed(names):
            gradient = self._gradient(backward, name, backward.params, others, names[0])
            rows[name] = _averaged_row(backward.processes, name, forms, gradient)
            del gradient  # autograd's own tensors, before the next pass makes more of them
        backward.processes.wait()
        self._is_first = False
        return {name: rows[name] for name in names}

    def rows_through(
        self, backward: Backward, features: Features, integrate_at: IntegrateAt
    ) -> tuple[Rows, Row, Mapping[str, set[Tensor]]]:
        """Each loss's gradient down to the features, and the integrated one behind them.

        Returns:
            The rows at the parameters that are behind no feature; the gradient of those that are,
            which is added as it is; and by feature the leaves that it is computed from.
        """
        params, processes = backward.params, backward.processes
        paths = FeaturePaths(backward.losses, features, params, backward.describe)
        if self._is_first:
            leaves = [*paths.others_before, *paths.others_behind]
            warn_of_unheld(dict.fromkeys(leaves, next(iter(backward.losses))))
        outputs = list(features.values())
        forms, forms_at = _local_forms(backward), forms_of(outputs)
        targets = [*outputs, *(params[position] for position in paths.heads)]
        names = processes.losses_of_all(backward.losses, backward.constants)
        rows, rows_at = {}, {}
        with hooks_set_aside(outputs):
            for name in reversed(names):
                found = self._gradient(backward, name, targets, paths.others_before, names[0])
                at, gradient = found[: len(outputs)], _spread(found, paths.heads, len(params))
                del found
                given = processes.given_by_all(name, tuple(piece is not None for piece in at))
                rows_at[name] = layout_of(forms_at, given).flatten(at)
                rows[name] = _averaged_row(processes, name, forms, gradient)
                del at, gradient
        integrated = integrate_at({name: rows_at[name] for name in names})
        behind = paths.through_encoders(params, integrated, backward.retain_graph)
        add_what_functions_wrote(behind, params)
        plain = _averaged_row(processes, "features", forms, behind)
        processes.wait()
        self._is_first = False
        return {name: rows[name] for name in names}, plain, paths.behind

    def _gradient(
        self,
        backward: Backward,
        name: str,
        targets: Sequence[Tensor],
        others: Sequence[Tensor],
        last: str,
    ) -> Gradient:
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
        if not (self._is_first or self._functions_call_backward):
            return ()
        leaves = leaves_beside(backward.params, backward.losses)
        if self._is_first:
            warn_of_unheld(leaves)
        return list(leaves)


def _local_forms(backward: Backward) -> tuple[Form, ...]:
    return forms_of([backward.processes.local(param) for param in backward.params])


def _averaged_row(
    processes: Processes, name: str, forms: tuple[Form, ...], gradient: Gradient
) -> Row:
    given = processes.given_by_all(name, tuple(piece is not None for piece in gradient))
    row = layout_of(forms, given).flatten(gradient)
    processes.average(row)
    return row


def _spread(found: Gradient, heads: Sequence[int], size: int) -> Gradient:
    """What was found behind the features, by position of the parameter."""
    gradient: Gradient = [None] * size
    for position, piece in zip(heads, found[-len(heads) :] if heads else (), strict=True):
        gradient[position] = piece
    return gradient
