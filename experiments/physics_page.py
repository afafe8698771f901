"""docs/evidence_physics.md: what the finished trainings of physics.py say, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from pages import corrected, filled, table, with_verdict
from physics_finished import PROJECTIONS, Finished
from physics_problems import EQUATIONS
from physics_runs import BASES, CONSTANT, HARD, IN_METRIC, SUM, WEIGHTS
from scipy import stats

# The questions, each over the equations; the second is what the first is compared with.
BEST_METRIC, BEST_WEIGHT = "best rule in the metric", "best weight"
QUESTIONS = (
    ("UPGrad", SUM),
    ("UPGrad", BEST_WEIGHT),
    ("MMPareto", BEST_WEIGHT),
    ("ConFIG", BEST_WEIGHT),
    (HARD, BEST_WEIGHT),
    ("UPGrad, metric", "UPGrad"),
    ("dual projection, metric", "dual projection"),
    ("UPGrad, metric", "constant, UPGrad, metric"),
    (BEST_METRIC, BEST_WEIGHT),
)


@dataclass(frozen=True)
class Factor:
    """The error of one method over that of another: median over paired seeds, 95 % interval."""

    equation: str
    other: str
    middle: float
    low: float
    high: float
    p: float  # of no difference, by Wilcoxon's test; corrected by Holm over the equations

    @property
    def verdict(self) -> str:
        if self.p >= 0.05 or self.low <= 1 <= self.high:
            return "undecided"
        return "better" if self.middle < 1 else "worse"

    def __str__(self) -> str:
        measured = f"x {self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"
        return with_verdict(measured, self.verdict)


def factor(equation: str, other: str, ours: Sequence[float], theirs: Sequence[float]) -> Factor:
    differences = np.log(ours) - np.log(theirs)
    interval = stats.bootstrap(
        (differences,), np.median, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    p = float(stats.wilcoxon(differences).pvalue)
    middle, low, high = np.exp([np.median(differences), interval.low, interval.high])
    return Factor(equation, other, float(middle), float(low), float(high), p)


class Answers:
    """Errors and comparisons of one base optimizer."""

    def __init__(self, finished: Finished, base: str) -> None:
        self.finished, self.base = finished, base
        self.equations = [
            e for e in EQUATIONS if finished.ran(e, base, SUM) and self.errors(e, SUM)
        ]

    def named(self, equation: str, method: str) -> str:
        """What validation chose, of "best" methods."""
        if method == BEST_WEIGHT:  # the plain sum is weight 1
            choices: Iterable[str] = [SUM, *WEIGHTS]
        elif method == BEST_METRIC:
            choices = [m for m in PROJECTIONS if m in IN_METRIC]
        else:
            return method
        ran = [m for m in choices if self.finished.ran(equation, self.base, m)]
        if not ran:  # no metric with SOAP
            return method
        return min(ran, key=lambda m: self.finished.validated(equation, self.base, m))

    def errors(self, equation: str, method: str) -> list[float]:
        name = self.named(equation, method)
        return [run["error"] for run in self.finished.report(equation, self.base, name)]

    def question(self, ours: str, theirs: str) -> list[Factor]:
        """A factor an equation, p corrected over them."""
        found = []
        for equation in self.equations:
            mine, other = self.errors(equation, ours), self.errors(equation, theirs)
            if mine and other and mine != other:
                found.append(factor(equation, self.named(equation, theirs), mine, other))
        return corrected(found)

    def question_lines(self) -> Iterator[list[str]]:
        for ours, theirs in QUESTIONS:
            found = {one.equation: one for one in self.question(ours, theirs)}
            if found:
                cells = [str(found.get(equation, "")) for equation in self.equations]
                yield [f"{ours} over {theirs}", *cells]

    def methods(self) -> list[str]:
        """Those of the report, in the order of the first equation that has them."""
        names = [m for e in self.equations for m in self.finished.methods(e, self.base)]
        held = [m for m in CONSTANT if any(self.errors(e, m) for e in self.equations)]
        order = [*dict.fromkeys(names), *held]
        return [m for m in order if any(self.errors(e, m) for e in self.equations)]

    def error_lines(self) -> Iterator[list[str]]:
        for method in self.methods():
            cells = []
            for equation in self.equations:
                errors = self.errors(equation, method)
                low, middle, high = np.quantile(errors, [0.25, 0.5, 0.75]) if errors else [0.0] * 3
                cells.append(f"{middle:.2g} [{low:.2g}, {high:.2g}]" if errors else "")
            yield [method, *cells]

    def validation_lines(self) -> Iterator[list[str]]:
        """Errors and, in brackets, the rate."""
        for method in dict.fromkeys(
            m for e in self.equations for m in self.finished.methods(e, self.base)
        ):
            cells = []
            for equation in self.equations:
                if not self.finished.ran(equation, self.base, method):
                    cells.append("")
                    continue
                lr = self.finished.lr(equation, self.base, method)
                error = self.finished.validated(equation, self.base, method)
                out = method not in self.finished.race(equation, self.base)
                cells.append(f"{error:.2g} ({lr:g})" + "*" * out)
            yield [method, *cells]

    def reason_lines(self, equation: str) -> Iterator[list[str]]:
        """What the steps were: means over the seeds."""
        for method in self.methods():
            runs = self.finished.report(equation, self.base, method)
            if runs:
                first, *others = np.mean([run["coefficients"] for run in runs], 0)
                weights = [other / first for other in others]
                losses = np.median([run["losses"] for run in runs], 0)
                yield [
                    method,
                    f"{100 * fmean(run['steps that raise a loss'] for run in runs):.0f} %",
                    f"{fmean(run['step length'] for run in runs):.3f}",
                    ", ".join(f"{weight:.2g}" for weight in weights) or "-",
                    ", ".join(f"{loss:.2g}" for loss in losses),
                ]


def tables(answers: Answers) -> Iterator[tuple[str, str]]:
    """Each with its name."""
    header = ["", *(EQUATIONS[equation].title for equation in answers.equations)]
    yield f"questions {answers.base}", table(header, answers.question_lines())
    yield f"errors {answers.base}", table(header, answers.error_lines())
    yield f"validation {answers.base}", table(header, answers.validation_lines())
    header = ["", "steps that raise a loss", "length", "coefficients", "losses"]
    for equation in answers.equations:
        yield f"reasons {answers.base} {equation}", table(header, answers.reason_lines(equation))


def write_page(path: Path, finished: Finished) -> None:
    """Fill those tables for which the page has a place."""
    page = path.read_text()
    for base in BASES:
        for name, content in tables(Answers(finished, base)):
            if f"<!-- {name} -->" in page:
                page = filled(page, name, content)
    path.write_text(page)
