"""Runs a case through the library and through the reference, and compares every ``.grad``."""

import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.fuzz import reference
from tests.fuzz.cases import Case, Micro
from tests.fuzz.edits import EDITS
from tests.fuzz.reference import History, Outcome
from tests.fuzz.rules import TOLERANCE, Array
from tests.fuzz.sides import Library, Side


class DeviationError(AssertionError):
    """The library gave something else than the reference."""


@dataclass
class Report:
    """What was compared: how often, how far it was apart at worst, and what was left out."""

    compared: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Report") -> None:
        """Takes another report in."""
        self.compared += other.compared
        self.skipped.update(other.skipped)
        for dtype, worst in other.worst.items():
            self.worst[dtype] = max(worst, self.worst.get(dtype, 0.0))


def run(case: Case) -> Report:
    """Runs a case to its end.

    Raises:
        DeviationError: The library and the reference differ.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Run(case).through()


class _Run:
    """The library, a twin that uses ``step(losses=...)``, and the reference, step by step."""

    def __init__(self, case: Case) -> None:
        self.case, self.report = case, Report()
        self.ours, self.twin = Library(Side(case)), Library(Side(case))
        self.theirs, self.history = Side(case), History()
        members = [set(self.theirs.model.encoders[k].parameters()) for k in case.modalities]
        held = self.theirs.parameters
        self.modalities = [[i for i, p in enumerate(held) if p in group] for group in members]

    def through(self) -> Report:
        for number, micros in enumerate(self.case.steps):
            self._zero_grad(self.case.zero_grad if number else "none")
            for at, micro in enumerate(micros):
                self._micro(micro, last=at == len(micros) - 1)
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
        self._compare(expected)
        self._compare_kept(at)
        self._compare_calls()
        if last and not micro.spoilt and not self.twin.alone:
            self.twin.step_on(micro)
        else:
            self.twin.backward(micro)
        self.twin_stepped = last and not micro.spoilt and not self.twin.alone
        if micro.spoilt:
            for side in (self.ours.side, self.twin.side, self.theirs):
                EDITS["none"](side.parameters)

    def _edit(self, micro: Micro) -> None:
        unclear = [bool(side.edit(micro)) for side in (self.ours.side, self.twin.side, self.theirs)]
        self._same_grads("an edit of some gradients changed others")
        if any(unclear):
            self.report.skipped["an edit that changes nothing"] += 1
            self._zero_grad("none")

    def _reference(
        self, micro: Micro, losses: dict[str, Tensor]
    ) -> tuple[dict[int, Outcome], list[Outcome]]:
        side, settings = self.theirs, self.case.settings
        again, features = side.forward(micro, cut=bool(self.case.features))
        if any(not torch.equal(losses[k].nan_to_num(), again[k].nan_to_num()) for k in again):
            raise DeviationError("the losses differ before the backward: something was overwritten")
        if features:
            return reference.at_features(self.history, again, features, side.parameters, settings)
        args = (again, side.parameters, settings, self.modalities)
        return reference.exact(self.history, *args), []

    def _compare(self, expected: dict[int, Outcome]) -> None:
        """Every ``.grad`` against the expected one; the reference goes on with the library's."""
        found, theirs = self.ours.side.parameters, self.theirs.parameters
        for index, outcome in expected.items():
            self._compare_one(index, found[index], outcome)
            grad = found[index].grad
            theirs[index].grad = None if grad is None else grad.clone()
        for index, parameter in enumerate(theirs):
            if parameter.grad is not None:
                self.history.written[index] = (parameter.grad, parameter.grad.clone())

    def _compare_one(self, index: int, parameter: Tensor, outcome: Outcome) -> None:
        name = self._name(parameter)
        grad, value = parameter.grad, outcome.value
        if value is None or grad is None:
            if value is not None or grad is not None:
                raise DeviationError(f"{name}: .grad is {grad}, expected {value}")
            return
        if grad.dtype != parameter.dtype or grad.shape != parameter.shape:
            raise DeviationError(f"{name}: .grad is {grad.dtype} {tuple(grad.shape)}")
        got, wanted = reference.array(grad), torch.from_numpy(value)
        if not wanted.isfinite().all():
            if torch.from_numpy(got).isfinite().all():
                raise DeviationError(f"{name}: a loss that was not finite left a finite .grad")
            outcome.doubt = outcome.doubt or "not finite"
        if outcome.doubt:
            self.report.skipped[outcome.doubt] += 1
            return
        self._measure(name, parameter.dtype, got, outcome)

    def _compare_kept(self, at: list[Outcome]) -> None:
        """What ``retain_grad`` kept at the features: the integrated gradient, after hooks."""
        ours, theirs = self.ours.side.model.kept, self.theirs.model.kept
        for k, outcome in zip(self.case.features, at, strict=bool(at)):
            if k in theirs and not outcome.doubt:
                got, wanted = ours[k].grad, theirs[k].grad
                if got is None or wanted is None:
                    raise DeviationError(f"retain_grad at {k}: {got}, expected {wanted}")
                if not wanted.isfinite().all() and not got.isfinite().all():
                    self.report.skipped["not finite"] += 1
                    continue
                # A hook on the feature may have stretched it by half.
                kept = Outcome(reference.array(wanted), 1.5 * outcome.scale)
                self._measure(f"retain_grad at {k}", got.dtype, reference.array(got), kept)

    def _measure(self, name: str, dtype: torch.dtype, found: Array, outcome: Outcome) -> None:
        value = outcome.value
        assert value is not None
        apart = float(abs(found - value).max())
        relative = apart / outcome.scale if outcome.scale > 0 else apart
        if not relative <= TOLERANCE[dtype]:
            raise DeviationError(
                f"{name}: .grad off by {relative:.2g} of its largest term ({dtype})\n"
                f"    found    {found.ravel()[:6]}\n    expected {value.ravel()[:6]}"
            )
        self.report.compared += 1
        key = str(dtype).removeprefix("torch.")
        self.report.worst[key] = max(relative, self.report.worst.get(key, 0.0))

    def _compare_calls(self) -> None:
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
        sides = (self.ours.side, self.twin.side, self.theirs)
        for group in zip(*(side.parameters for side in sides), strict=True):
            grads = [torch.zeros(0) if p.grad is None else p.grad.nan_to_num() for p in group]
            if not all(torch.equal(grads[0], other) for other in grads[1:]):
                raise DeviationError(f"{self._name(group[0])}: {complaint}")

    def _parameters(self) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        sides = (self.ours.side, self.theirs, self.twin.side)
        named = [dict(side.model.state_dict()) for side in sides]
        return [(name, a, named[1][name], named[2][name]) for name, a in named[0].items()]

    def _name(self, parameter: Tensor) -> str:
        return next(n for n, p in self.ours.side.model.named_parameters() if p is parameter)
