"""One loss -> its gradients -> a row; errors of autograd with the mend."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.graph import leaves_beside
from mmpareto_optim.messages import raise_explained, warn_of_unheld
from mmpareto_optim.rows import LONG, Form, Row, flatten, forms_of, is_capturing
from mmpareto_optim.types import Constants, Describe, Gradient, Losses

if TYPE_CHECKING:
    from mmpareto_optim.distributed.single import Processes

Rows = dict[str, Row]
"""By the name of the loss."""


class Backward(NamedTuple):
    """One backward, of which all that was given is checked.

    Attributes:
        constants: what the processes have in common, by the names of error messages.
        accumulates: whether rows are needed after the step.
    """

    losses: Losses
    params: Sequence[Tensor]
    processes: "Processes"
    constants: Constants
    retain_graph: bool
    accumulates: bool
    describe: Describe


class Differentiation:
    """Differentiates one loss after the other; remembers what graphs turned out to be like."""

    def __init__(self) -> None:
        self.is_first = True
        self._functions_call_backward = False
        self._walked: set[str] = set()
        self._may_stay: dict[int, bool] = {}

    def rows(self, backward: Backward) -> Rows:
        """Each loss's gradient at the parameters, averaged over the processes.

        The pass that frees the graph should be the one that reaches most of it, and the joint
        loss is usually named first: so the first loss is the last.
        """
        forms = local_forms(backward)
        others = self._leaves_to_pass_through(backward)
        names = backward.processes.losses_of_all(backward.losses, backward.constants)
        memory = self.memory(backward, forms)
        rows = {}
        for name in reversed(names):
            gradient = self.gradient_of(backward, name, backward.params, others, names[0])
            kept = memory.kept(name, gradient, is_last=name == names[0])
            rows[name] = averaged_row(backward.processes, name, forms, gradient, kept)
            memory.learn(gradient, rows[name])
            del gradient  # autograd's own tensors, before the next pass makes more of them
        memory.check()
        backward.processes.wait()
        self.is_first = False
        self._walked = set(backward.losses) | (self._walked if len(self._walked) < 1000 else set())
        return {name: rows[name] for name in names}

    def memory(self, backward: Backward, forms: Sequence[Form]) -> "ForeignMemory":
        """Which of autograd's tensors may stay where they are in this backward."""
        return ForeignMemory(backward, forms, self._may_stay)

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

        Looked for once a loss, and in each backward where there are such functions.
        """
        passes_through_all = backward.processes.shares is not None
        is_known = backward.losses.keys() <= self._walked and not self._functions_call_backward
        if passes_through_all or is_known:
            return ()
        leaves = leaves_beside(backward.params, backward.losses)
        if self.is_first:
            warn_of_unheld(leaves)
        return list(leaves)


def local_forms(backward: Backward) -> tuple[Form, ...]:
    """What this process holds of the parameters."""
    return forms_of([backward.processes.local(param) for param in backward.params])


class ForeignMemory:
    """Long gradients that stay in autograd's memory until the step ends, where that is safe.

    It is not where a backward returns the same buffer each time, as that of
    ``make_graphed_callables`` does: a fresh tensor cannot have the address of one that is alive.
    So a parameter's gradient is copied until one has been seen to outlast a later pass.

    Args:
        backward: what is differentiated.
        forms: what its parameters are.
        may_stay: by id of a parameter what has been learned of it; added to.
    """

    def __init__(
        self, backward: Backward, forms: Sequence[Form], may_stay: dict[int, bool]
    ) -> None:
        self._params = backward.params
        self._forms = forms
        self._describe = backward.describe
        self._may_stay = may_stay
        copies = backward.accumulates or backward.processes.writes_rows or is_capturing()
        self._long = [i for i, form in enumerate(forms) if not copies and form.size >= LONG]
        self._learning: dict[int, tuple[Tensor, Tensor]] = {}
        self._alive: dict[int, tuple[str, int, Tensor, int]] = {}

    def kept(self, name: str, gradient: Gradient, *, is_last: bool) -> Container[int]:
        """Positions of a loss's gradients that need not be copied; all that none comes after.

        Raises:
            RuntimeError: one is in the memory of another loss's; names both.
        """
        found = {
            i: piece
            for i in self._long
            if type(piece := gradient[i]) is Tensor
            and (is_last or self._may_stay.get(id(self._params[i])))
        }
        known = {piece.data_ptr(): self._alive.get(piece.data_ptr()) for piece in found.values()}
        self._refuse([other for other in known.values() if other is not None])
        self._alive |= {
            piece.data_ptr(): (name, position, piece, piece._version)
            for position, piece in found.items()
            if not piece.is_meta
        }
        return found

    def learn(self, gradient: Gradient, row: Row) -> None:
        """Whether gradients of earlier passes, which were copied, have outlasted this one."""
        for position, (piece, copy) in self._learning.items():
            flat, param = self._forms[position].flat(piece), id(self._params[position])
            newer = gradient[position]
            is_reused = newer is not None and newer.data_ptr() == piece.data_ptr()
            is_intact = not is_reused and bool(((flat == copy) | (flat != flat)).all())
            self._may_stay[param] = self._may_stay.get(param, True) and is_intact
        for position in self._long:
            found, is_known = gradient[position], id(self._params[position]) in self._may_stay
            is_to_learn = position in self._learning or not is_known
            if found is not None and not found.is_meta and is_to_learn:
                self._learning[position] = found, row.part(row.layout.places[position])

    def check(self) -> None:
        """Raise RuntimeError if a gradient was written to by a later pass; names it."""
        self._refuse([each for each in self._alive.values() if each[2]._version != each[3]])

    def _refuse(self, shared: Sequence[tuple[str, int, Tensor, int]]) -> None:
        for _, position, _, _ in shared:
            self._may_stay[id(self._params[position])] = False
        for name, position, _, _ in shared:
            parameter = self._describe(self._params[position])
            raise RuntimeError(
                f"the gradient of loss {name!r} for {parameter} is in memory that a later backward "
                "pass uses too: some backward began to return the same buffer each time. Nothing "
                "has changed; make a forward pass and step again. From now on that gradient is "
                "copied after each pass"
            )


def averaged_row(
    processes: "Processes",
    name: str,
    forms: tuple[Form, ...],
    gradient: Gradient,
    kept: Container[int] = (),
) -> Row:
    """A gradient as a row, whose average over the processes begins."""
    # What can fail on one process comes before all agree on what they average.
    row = flatten(forms, gradient, kept)
    row = row.extended(processes.given_by_all(name, row.layout.given))
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

    ``others`` are leaves that are passed through as well, so that no part of the graph is left
    out, and ``along`` are the gradients at outputs that are not scalars.
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
    written = {i: p.grad for i, p in enumerate(params) if p.is_leaf and p.grad is not None}
    for position, by_function in written.items():
        known, params[position].grad = gradient[position], None
        gradient[position] = by_function if known is None else known + by_function
    return bool(written)


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
    """For each loss its gradient at the parameters, on this process; frees the graph.

    These tensors may share memory with others that autograd handed out: they are to be read.
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
    layouts = [torch.strided if piece is None else piece.layout for piece in gradient]
    if layouts.count(torch.strided) < len(layouts):
        param = next(
            p for p, layout in zip(params, layouts, strict=True) if layout != torch.strided
        )
        raise TypeError(
            f"loss {name!r} gives a sparse gradient for {describe(param)}; only dense "
            "gradients can be integrated: build the embedding with sparse=False"
        )
