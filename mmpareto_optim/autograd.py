"""One loss -> its gradients -> a row; errors of autograd with the mend."""

from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.accumulation import Autocast, add_what_functions_wrote, switched
from mmpareto_optim.check import SumCheck
from mmpareto_optim.graph import leaves_beside
from mmpareto_optim.messages import raise_explained
from mmpareto_optim.rows import Form, Row, flatten, forms_of, is_capturing
from mmpareto_optim.types import Constants, Describe, Gradient, Losses
from mmpareto_optim.watch import Watch

if TYPE_CHECKING:
    from mmpareto_optim.distributed.single import Processes

Rows = dict[str, Row]
"""By the name of the loss."""


class Backward(NamedTuple):
    """One backward, of which all that was given is checked.

    Attributes:
        constants: what the processes have in common, by the names of error messages.
        accumulates: whether rows are needed after the step.
        autocast: in which the passes are made, by type of device; all else is made without.
    """

    losses: Losses
    params: Sequence[Tensor]
    processes: "Processes"
    constants: Constants
    retain_graph: bool
    accumulates: bool
    describe: Describe
    autocast: Autocast


class Differentiation:
    """Differentiates one loss after the other; with ``check`` compares the first with their sum."""

    def __init__(self, check: bool, watch: Watch) -> None:
        self.watch = watch
        self._checks_left = 10 if check else 0
        self._checked: set[str] = set()
        self._functions_call_backward = False
        self._may_stay: dict[int, bool] = {}

    def rows(self, backward: Backward) -> Rows:
        """Each loss's gradient at the parameters, averaged over the processes."""
        forms = local_forms(backward)
        others = self._leaves_to_pass_through(backward)
        memory = self.memory(backward, forms)
        rows = {}
        check = self.check_of(backward, backward.params)
        for name, gradient, is_last in self.gradients(backward, backward.params, others, check):
            # The pass of a check comes after all, and may write over what is in its way.
            kept = () if check is not None else memory.kept(name, gradient, is_last=is_last)
            rows[name] = averaged_row(backward.processes, name, forms, gradient, kept)
            memory.learn(gradient, rows[name])
            del gradient  # autograd's own tensors, before the next pass makes more of them
        memory.check()
        backward.processes.wait()
        if backward.processes.shares is None:
            self.watch.note_rows(rows, backward.params, backward.losses)
        return dict(reversed(rows.items()))

    def memory(self, backward: Backward, forms: Sequence[Form]) -> "ForeignMemory":
        """Which of autograd's tensors may stay where they are in this backward."""
        if len(self._may_stay) > len(backward.params):  # some have been replaced
            held = set(map(id, backward.params))
            self._may_stay = {key: may for key, may in self._may_stay.items() if key in held}
        return ForeignMemory(backward, forms, self._may_stay)

    def gradients(
        self,
        backward: Backward,
        targets: Sequence[Tensor],
        others: Sequence[Tensor],
        check: SumCheck | None,
    ) -> Iterator[tuple[str, Gradient, bool]]:
        """Each loss's gradient at some tensors, by its name, and whether it is the last.

        The pass that frees the graph should be the one that reaches most of it, and the joint
        loss is usually named first: so the first loss is the last.
        """
        processes, losses = backward.processes, backward.losses
        names = processes.losses_of_all(losses, backward.constants)
        for name in reversed(names):
            gradient: Gradient = [None] * len(targets)
            if name in losses:  # otherwise another process has it
                differentiate = partial(self._gradient_of, backward, [name], targets, others)
                retain = backward.retain_graph or name != names[0]
                try:
                    gradient = differentiate(retain or check is not None)
                except RuntimeError:
                    if retain or check is None:
                        raise
                    # There are regions that cannot be passed if the graph is to be kept.
                    check, gradient = None, differentiate(False)
            if check is not None:
                check.add(gradient)
            yield name, gradient, name == names[0]
            del gradient
        if check is not None:
            whole = partial(self._gradient_of, backward, list(losses), targets, others)
            is_done = check.compare(
                partial(whole, backward.retain_graph), targets, backward.describe
            )
            self._checked |= set(losses) if is_done else set()

    def check_of(self, backward: Backward, targets: Sequence[Tensor]) -> SumCheck | None:
        """What compares gradients of losses for the first time, as often as it takes."""
        is_known = len(backward.losses) < 2 or backward.losses.keys() <= self._checked
        has_values = not (is_capturing() or any(target.is_meta for target in targets))
        is_whole = backward.processes.shares is None
        if is_known or not (self._checks_left and has_values and is_whole):
            return None
        self._checks_left -= 1
        return SumCheck(forms_of([backward.processes.local(target) for target in targets]))

    def _gradient_of(
        self,
        backward: Backward,
        names: Sequence[str],
        targets: Sequence[Tensor],
        others: Sequence[Tensor],
        retain_graph: bool,
    ) -> Gradient:
        """The gradient of a loss, or of the sum of several, at some tensors."""
        losses = [backward.losses[name] for name in names]
        try:
            with switched(backward.autocast, on=True):
                gradient = backward.processes.differentiate(losses, targets, others, retain_graph)
        except Exception as error:
            raise_explained(error, _title(names))
        self._functions_call_backward |= add_what_functions_wrote(gradient, targets)
        check_dense(names, gradient, targets, backward.describe)
        return gradient

    def _leaves_to_pass_through(self, backward: Backward) -> Sequence[Tensor]:
        """Leaves beside the parameters, on the way to which a function may call ``backward``.

        Looked for once a loss, and in each backward where there are such functions.
        """
        passes_through_all = backward.processes.shares is not None
        is_known = backward.losses.keys() <= self.watch.layouts.keys()
        if passes_through_all or (is_known and not self._functions_call_backward):
            return ()
        leaves = leaves_beside(backward.params, backward.losses)
        self.watch.note_unheld(leaves)
        return list(leaves)


def _title(names: Sequence[str]) -> str:
    return f"loss {names[0]!r}" if len(names) == 1 else f"the sum of {list(names)}"


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
        self._long = [i for i, form in enumerate(forms) if not copies and form.is_long]
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
            if newer is None:  # nothing that could have written over it
                continue
            is_reused = newer.data_ptr() == piece.data_ptr()
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
    # Outputs of a subclass, as those of MONAI, would take what autograd finds for their own.
    with torch._C.DisableTorchFunctionSubclass():
        found = torch.autograd.grad(
            outputs, targets, along, retain_graph=retain_graph, allow_unused=True
        )
    return list(found[: len(params)])


def check_dense(
    names: Sequence[str], gradient: Gradient, params: Sequence[Tensor], describe: Describe
) -> None:
    """Raise TypeError for a sparse gradient; names the loss and the parameter."""
    layouts = [torch.strided if piece is None else piece.layout for piece in gradient]
    if layouts.count(torch.strided) < len(layouts):
        param = next(
            p for p, layout in zip(params, layouts, strict=True) if layout != torch.strided
        )
        raise TypeError(
            f"{_title(names)} gives a sparse gradient for {describe(param)}; only dense "
            "gradients can be integrated: build the embedding with sparse=False"
        )
