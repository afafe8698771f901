"""The questions that pays.py answers: paired differences, corrected by Holm within a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pages
from pays_finished import Finished
from pays_settings import (
    DGLS,
    ENSEMBLE,
    GAMMAS,
    MMPARETO,
    OTHER_RULES,
    SCALINGS,
    SETTINGS,
    UNIFORM,
    Job,
)
from scipy import stats

BY_DEFAULT = "MMPareto over the plain sum"
TUNED = "best MMPareto over the best sum"
TUNED_DGL = "best DGL over the best sum"
OF_ENSEMBLE = "ensemble over the best sum"
WITH_ADAMW = "MMPareto over the plain sum, AdamW"
OF_RULES = {rule: f"{rule} over the plain sum" for rule in OTHER_RULES}


@dataclass(frozen=True)
class Row:
    """One entry minus another in one setting, in points of accuracy, with its 95 % interval."""

    question: str
    setting: str
    ours: str
    theirs: str
    difference: float
    low: float
    high: float
    p: float  # of no difference; in what is shown, corrected by Holm within the question

    @property
    def verdict(self) -> str:
        if not self.p < 0.05:
            return "undecided"
        return "better" if self.difference > 0 else "worse"

    @property
    def measured(self) -> str:
        return f"{self.difference:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"

    @property
    def cell(self) -> str:
        """With the verdict if there is one."""
        return pages.with_verdict(self.measured, self.verdict)


def compared(question: str, setting: str, ours: str, theirs: str, finished: Finished) -> Row:
    """Paired by seed, by Student's t."""
    first, second = (finished.report(setting, entry) for entry in (ours, theirs))
    if first == second:
        return Row(question, setting, ours, theirs, 0.0, 0.0, 0.0, 1.0)
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(0.95)
    difference = np.mean(first) - np.mean(second)
    numbers = map(float, (difference, interval.low, interval.high, test.pvalue))
    return Row(question, setting, ours, theirs, *numbers)


def questions(setting: str, finished: Finished) -> dict[str, tuple[str, str]]:
    """By question which entry is compared with which."""
    s = SETTINGS[setting]
    if s.adamw:
        return {WITH_ADAMW: (MMPARETO, UNIFORM)}
    gamma, factor, dgl = (finished.best(setting, each) for each in (GAMMAS, SCALINGS, DGLS))
    pairs = {TUNED: (gamma, factor), TUNED_DGL: (dgl, factor), OF_ENSEMBLE: (ENSEMBLE, factor)}
    rules = {OF_RULES[rule]: (rule, UNIFORM) for rule in OTHER_RULES if rule in s.methods}
    return {BY_DEFAULT: (MMPARETO, UNIFORM)} | pairs | rules


def answers(settings: Sequence[str], finished: Finished) -> dict[tuple[str, str], Row]:
    """By question and setting."""
    rows = [
        compared(question, setting, *pair, finished)
        for setting in settings
        for question, pair in questions(setting, finished).items()
    ]
    return {(row.question, row.setting): row for row in corrected(rows)}


def corrected(rows: Sequence[Row]) -> list[Row]:
    """The same with p corrected by Holm, over all rows of a question."""
    found = []
    for question in dict.fromkeys(row.question for row in rows):
        found += pages.corrected([row for row in rows if row.question == question])
    return found


def failed(setting: str, entry: str, finished: Finished) -> int:
    """Trainings that end below half of the plain sum's median."""
    bound = float(np.median(finished.report(setting, UNIFORM))) / 2
    return sum(score < bound for score in finished.report(setting, entry))


def shares(setting: str, kind: str, finished: Finished) -> dict[str, float]:
    """``harmful`` or ``conflict``: mean share in % of the plain sum's steps, by block."""
    rate = finished.rate(setting, UNIFORM)
    jobs = [Job(setting, UNIFORM, rate, seed, False) for seed in finished.seeds(setting)]
    runs = [finished.results[job][kind] for job in jobs]
    return {block: float(np.mean([run[block] for run in runs])) for block in runs[0]}
