"""Compares one gradient with what it has to be, and counts."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.fuzz import reference
from tests.fuzz.history import Outcome
from tests.fuzz.labelled import is_plain
from tests.fuzz.rules import TOLERANCE, Array


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

    def leave_out(self, why: str, count: int = 1) -> None:
        """So many more that were not compared."""
        self.skipped[why] += count


class Comparison:
    """Compares gradients into a report; ``rough`` where they went through bfloat16 on the way."""

    def __init__(self, rough: bool) -> None:
        self.report = Report()
        self._rough = rough

    def gradient(self, name: str, parameter: Tensor, outcome: Outcome) -> None:
        """The ``.grad`` of a parameter.

        Raises:
            DeviationError: It is another one.
        """
        grad, value = parameter.grad, outcome.value
        if value is None or grad is None:
            if value is not None or grad is not None:
                raise DeviationError(f"{name}: .grad is {grad}, expected {value}")
            return
        if grad.dtype != parameter.dtype or grad.shape != parameter.shape:
            raise DeviationError(f"{name}: .grad is {grad.dtype} {tuple(grad.shape)}")
        if not is_plain(grad):
            raise DeviationError(f"{name}: .grad is a {type(grad).__name__}")
        got, wanted = reference.array(grad), torch.from_numpy(value)
        if not wanted.isfinite().all():
            if torch.from_numpy(got).isfinite().all():
                raise DeviationError(f"{name}: a loss that was not finite left a finite .grad")
            outcome.doubt = outcome.doubt or "not finite"
        if outcome.doubt:
            self.report.leave_out(outcome.doubt)
            return
        self.measure(name, parameter.dtype, got, outcome)

    def measure(self, name: str, dtype: torch.dtype, found: Array, outcome: Outcome) -> None:
        """How far values are from what they have to be.

        Raises:
            DeviationError: Too far.
        """
        value = outcome.value
        assert value is not None
        apart = float(abs(found - value).max())
        relative = apart / outcome.scale if outcome.scale > 0 else apart
        tolerance = TOLERANCE[torch.bfloat16 if self._rough else dtype]
        if not relative <= tolerance:
            raise DeviationError(
                f"{name}: .grad off by {relative:.2g} of its largest term ({dtype})\n"
                f"    found    {found.ravel()[:6]}\n    expected {value.ravel()[:6]}"
            )
        self.report.compared += 1
        key = str(dtype).removeprefix("torch.")
        self.report.worst[key] = max(relative, self.report.worst.get(key, 0.0))
