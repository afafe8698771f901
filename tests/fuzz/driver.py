"""Runs a case through the library and through the reference, and compares every ``.grad``."""

import warnings

import torch
from torch import Tensor

from tests.fuzz import reference
from tests.fuzz.cases import Case, Micro
from tests.fuzz.compare import Comparison, DeviationError, Report
from tests.fuzz.complaints import Complaints
from tests.fuzz.edits import EDITS
from tests.fuzz.history import History, Outcome
from tests.fuzz.sides import Library, Side, autocast


def run(case: Case) -> Report:
    """Runs a case to its end.

    Raises:
        DeviationError: The library and the reference differ.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return _Run(case, Complaints(case, caught)).through()


class _Run:
    """The library, a twin that uses ``step(losses=...)``, and the reference, step by step."""

    def __init__(self, case: Case, complaints: Complaints) -> None:
        self.case, self.complaints = case, complaints
        # At features a last bit that differs is rounded to bfloat16 behind them.
        self.comparison = Comparison(bool(case.autocast and case.features))
        self.report = self.comparison.report
        self.ours, self.twin = Library(Side(case)), Library(Side(case))
        self.theirs, self.history = Side(case, plain=True), History()
        self.checks_left, self.is_over = 10 if case.check else 0, False
        members = [set(self.theirs.model.encoders[k].parameters()) for k in case.modalities]
        held = self.theirs.parameters
        self.modalities = [[i for i, p in enumerate(held) if p in group] for group in members]

    def through(self) -> Report:
        for number, micros in enumerate(self.case.steps):
            self._zero_grad(self.case.zero_grad if number else "none")
            for at, micro in enumerate(micros):
                self._micro(micro, last=at == len(micros) - 1)
            if self.is_over:
                break
            self._step()
        return self.report

    def _zero_grad(self, how: str) -> None:
        for library in (self.ours, self.twin):
            library.zero_grad(how)
        if self.ours.alone or how == "none":
            self.theirs.base.zero_grad()
        elif how == "to zero":
            self.theirs.base.zero_grad(set_to_none=False)
        self.history.end_window()

    def _micro(self, micro: Micro, last: bool) -> None:
        if micro.edit:
            self._edit(micro)
        losses = self.ours.backward(micro)
        expected, at = self._reference(micro, losses)
        passed_often = self.theirs.model.regions.visits > 1
        self._pass_once_more()
        if passed_often:
            self.report.leave_out("a region that several losses pass", len(expected))
            self._go_on_from_ours()
        else:
            self._compare(expected)
            self._compare_kept(at)
            self._compare_calls()
        self._twin(micro, last)
        self.complaints.look(micro, passed_often)
        # What overwrites does so again in the next step.
        self.is_over = passed_often and not self.case.plan.place.startswith("parameter")
        if micro.spoilt:
            for side in self.sides:
                EDITS["none"](side.parameters)
        self._change(micro, "after")

    def _twin(self, micro: Micro, last: bool) -> None:
        steps = last and not micro.spoilt and not self.twin.alone and "after" not in micro.changes
        if steps:
            self.twin.step_on(micro)
        else:
            self.twin.backward(micro)
        self.twin_stepped = steps

    @property
    def sides(self) -> tuple[Side, Side, Side]:
        return self.ours.side, self.twin.side, self.theirs

    def _change(self, micro: Micro, moment: str) -> None:
        """A change on all sides, of which the reference forgets what is replaced."""
        for side in self.sides if moment == "after" else self.sides[2:]:
            replaced = side.change(micro, moment)
        for index in replaced:
            self.history.forget(index)

    def _edit(self, micro: Micro) -> None:
        unclear = [bool(side.edit(micro)) for side in self.sides]
        self._same_grads("an edit of some gradients changed others")
        if any(unclear):
            self.report.leave_out("an edit that changes nothing")
            self._zero_grad("none")

    def _reference(
        self, micro: Micro, losses: dict[str, Tensor]
    ) -> tuple[dict[int, Outcome], list[Outcome]]:
        side, settings = self.theirs, self.case.settings
        self._change(micro, "before")
        again, features = side.forward(micro, cut=bool(self.case.features))
        if any(not torch.equal(losses[k].nan_to_num(), again[k].nan_to_num()) for k in again):
            raise DeviationError("the losses differ before the backward: something was overwritten")
        self._change(micro, "in flight")
        with autocast(self.case):
            if features:
                args = (features, side.parameters, settings)
                found, at = reference.at_features(self.history, again, *args)
            else:
                rest = (side.parameters, settings, self.modalities)
                found, at = reference.exact(self.history, again, *rest), []
        self.passed = again, [*side.parameters, *(leaf for _, leaf in features)]
        return found, at

    def _compare(self, expected: dict[int, Outcome]) -> None:
        """Every ``.grad`` against the expected one."""
        found = self.ours.side.parameters
        for index, outcome in expected.items():
            self.comparison.gradient(self._name(found[index]), found[index], outcome)
        self._go_on_from_ours()

    def _go_on_from_ours(self) -> None:
        """The reference goes on with the library's ``.grad``."""
        pairs = zip(self.ours.side.parameters, self.theirs.parameters, strict=True)
        for index, (found, parameter) in enumerate(pairs):
            parameter.grad = None if found.grad is None else found.grad.clone()
            if parameter.grad is not None:
                self.history.written[index] = (parameter.grad, parameter.grad.clone())

    def _compare_kept(self, at: list[Outcome]) -> None:
        """What ``retain_grad`` kept at the features: the integrated gradient, after hooks."""
        ours, theirs = self.ours.side.model.kept, self.theirs.model.kept
        for k, outcome in zip(self.case.features, at, strict=bool(at)):
            if k in theirs and not outcome.doubt:
                got, wanted = ours[k].grad, theirs[k].grad
                if got is None or wanted is None:
                    raise DeviationError(f"retain_grad at {k}: {got}, expected {wanted}")
                if not wanted.isfinite().all() and not got.isfinite().all():
                    self.report.leave_out("not finite")
                    continue
                # A hook on the feature may have stretched it by half.
                kept = Outcome(reference.array(wanted), 1.5 * outcome.scale)
                self.comparison.measure(
                    f"retain_grad at {k}", got.dtype, reference.array(got), kept
                )

    def _pass_once_more(self) -> None:
        """As the library does that checks a step, where its hooks tell of one pass more."""
        losses, targets = self.passed
        has_more = self.ours.side.model.calls != self.theirs.model.calls
        if self.checks_left and len(losses) > 1 and has_more:
            self.checks_left -= 1
            with autocast(self.case):
                reference.of_sum(losses, targets)

    def _compare_calls(self) -> None:
        """How often hooks ran: once a loss, and once more where a step is checked."""
        ours, theirs = self.ours.side.model.calls, self.theirs.model.calls
        for name in ours | theirs:
            if ours[name] != theirs[name]:
                raise DeviationError(f"hook on {name} ran {ours[name]} times, not {theirs[name]}")

    def _step(self) -> None:
        if not self.twin_stepped:
            self.twin.step()
        self.ours.step()
        self._same_grads("step(losses=...) differs from backward(losses), step()")
        self.theirs.base.step()
        self.history.end_window()
        constants = zip(self.ours.side.model.constants, self.theirs.model.constants, strict=True)
        if not all(torch.equal(a, b) for a, b in constants):
            raise DeviationError("memory that a custom function returned was written to")
        for name, a, b, c in self._parameters():
            if not torch.equal(a.nan_to_num(), b.nan_to_num()):
                raise DeviationError(f"{name}: the base optimizer's step went elsewhere")
            if not torch.equal(a.nan_to_num(), c.nan_to_num()):
                raise DeviationError(f"{name}: step(losses=...) is not backward(losses), step()")

    def _same_grads(self, complaint: str) -> None:
        for group in zip(*(side.parameters for side in self.sides), strict=True):
            grads = [torch.zeros(0) if p.grad is None else p.grad.nan_to_num() for p in group]
            if not all(torch.equal(grads[0], other) for other in grads[1:]):
                raise DeviationError(f"{self._name(group[0])}: {complaint}")

    def _parameters(self) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        sides = (self.ours.side, self.theirs, self.twin.side)
        named = [dict(side.model.state_dict()) for side in sides]
        return [(name, a, named[1][name], named[2][name]) for name, a in named[0].items()]

    def _name(self, parameter: Tensor) -> str:
        return next(n for n, p in self.ours.side.model.named_parameters() if p is parameter)
