"""MMPareto against everything else in one setting: paired tests, corrected by Holm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pays_finished import Finished
from pays_settings import (
    GAMMAS,
    JOINT,
    MMPARETO,
    REPLAYS,
    RULES,
    SCALINGS,
    SETTINGS,
    UNIFORM,
    Result,
)
from scipy import stats
from statsmodels.stats.multitest import multipletests

SAME_LENGTH = tuple(zip(GAMMAS, SCALINGS, strict=True))
OVER_PLAIN, OVER_BEST = "rules over the plain sum", "rules over the best sum"
BETTER, WORSE, OPEN = "better", "worse", "undecided"


@dataclass(frozen=True)
class Row:
    """MMPareto minus something else in one setting: positive where MMPareto is better.

    A claim is the comparisons that Holm corrects together, over all settings: with the plain sum;
    the best sum; MMPareto's coefficients replayed; other rules; the sum made as long; simpler ways;
    encoders trained alone.
    """

    claim: str
    setting: str
    other: str
    difference: float
    low: float
    high: float
    p: float  # of no difference; in what is shown, corrected by Holm within the claim

    @property
    def verdict(self) -> str:
        """It takes both: a median's interval and the rank test need not agree."""
        if not self.p < 0.05 or self.low <= 0 <= self.high:
            return OPEN
        return BETTER if self.difference > 0 else WORSE

    @property
    def measured(self) -> str:
        """Points of accuracy, or the factor on the error."""
        if SETTINGS[self.setting].physics:
            middle, low, high = (10**-x for x in (self.difference, self.high, self.low))
            return f"x {middle:.2f} [{low:.2f}, {high:.2f}]"
        return f"{self.difference:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def compared(
    claim: str, setting: str, other: str, ours: Sequence[float], theirs: Sequence[float]
) -> Row:
    """Paired by seed: Student's t for accuracies, for logarithms of errors the median."""
    if np.array_equal(ours, theirs):  # one and the same method: neither test takes that
        return Row(claim, setting, other, 0.0, 0.0, 0.0, 1.0)
    if SETTINGS[setting].physics:
        differences = np.subtract(ours, theirs)
        interval = stats.bootstrap(
            (differences,), np.median, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        middle, p = np.median(differences), stats.wilcoxon(differences).pvalue
    else:
        test = stats.ttest_rel(ours, theirs)
        interval, p = test.confidence_interval(0.95), test.pvalue
        middle = np.mean(ours) - np.mean(theirs)
    return Row(claim, setting, other, *map(float, (middle, interval.low, interval.high, p)))


def corrected(rows: Sequence[Row]) -> list[Row]:
    """The same with p corrected by Holm, over all rows of a claim."""
    found = []
    for claim in dict.fromkeys(row.claim for row in rows):
        mine = [row for row in rows if row.claim == claim]
        adjusted = multipletests([row.p for row in mine], method="holm")[1]
        found += [replace(row, p=float(p)) for row, p in zip(mine, adjusted, strict=True)]
    return found


def rows_of(setting: str, finished: Finished) -> Iterator[Row]:
    s = SETTINGS[setting]
    best = finished.best(setting, s.scalarizations)
    variant = finished.best(setting, s.variants)
    pairs = [("plain sum", MMPARETO, UNIFORM), ("best sum", variant, best)]
    if variant != MMPARETO:
        pairs.append(("best sum, by default", MMPARETO, best))
    pairs += [("timing", MMPARETO, method) for method in REPLAYS]
    pairs += [("rules", MMPARETO, method) for method in RULES]
    if not s.physics:
        pairs += [("direction", *pair) for pair in SAME_LENGTH]
        pairs += [("simpler", MMPARETO, method) for method in (JOINT, "unimodal gradients")]
    for claim, method, other in pairs:
        ours, theirs = (finished.scores(setting, name) for name in (method, other))
        if ours and theirs:
            name = other if method == MMPARETO else f"{other} ({method})"
            yield compared(claim, setting, name, ours, theirs)
    for head in s.modalities:
        ours = finished.scores(setting, MMPARETO, head)
        theirs = finished.alone(setting, head)
        if ours and theirs:
            yield compared("alone", setting, f"{head} alone", ours, theirs)


def rows_of_rules(setting: str, finished: Finished) -> Iterator[Row]:
    """Each rule, MMPareto by default among them, minus the plain and the best sum.

    Two claims of their own; ``other`` is the rule.
    """
    best = finished.best(setting, SETTINGS[setting].scalarizations)
    for claim, sum_of in ((OVER_PLAIN, UNIFORM), (OVER_BEST, best)):
        for rule in (MMPARETO, *RULES):
            ours, theirs = (finished.scores(setting, name) for name in (rule, sum_of))
            if ours and theirs:
                yield compared(claim, setting, rule, ours, theirs)


def harmful(runs: Sequence[Result], kind: str = "harmful") -> dict[str, float]:
    """Mean share in % of the steps, by block."""
    blocks = runs[0][kind] if runs else {}
    return {block: float(np.mean([run[kind][block] for run in runs])) for block in blocks}
