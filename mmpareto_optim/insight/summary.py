"""A training in a few numbers a block, and whether integration can pay there."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

FEWEST_STEPS = 100
"""Steps from which a share is told: none of 100 is less than 3 %, with 95 % confidence."""

RARE, FREQUENT = 0.05, 0.2
"""Shares of harmful steps below which the direction cannot pay, and from which it may."""

LOPSIDED = 100.0
"""Ratio of the gradients' norms from which the shortest is less than a hundredth of the sum."""

DIVERGED = 0.1
"""Share of steps that are not finite, of all or of the last third, above which nothing else is
told: more than a GradScaler skips while it looks for its scale."""

SHOWN = 5
"""Losses of a block that are named as opposed by the sum."""

WEIGHABLE = 'under "uniform", "dualproj" or "upgrad"'
"""The rules under which a larger weight gives a loss more say in a conflict too."""


INTEGRATED = (
    "Recorded while integrating: on the path of the plain sum it can be otherwise. To learn "
    'whether integration pays, record with integration="uniform".'
)


@dataclass(frozen=True)
class PhaseSummary:
    """A block over some of its steps.

    Shares, medians, counts and the largest coefficient are those of the steps whose gradients
    are finite, NaN where there are none.

    Attributes:
        steps: how many were measured.
        conflict: share of them in which two gradients have a negative product.
        harmful: share of them in which the plain sum has a negative product with a gradient.
        norm_ratio: norm of the longest gradient over that of the shortest, the median; zero
            gradients do not count. NaN where fewer than two are left in each step.
        cosine: the smallest cosine between two gradients, the median.
        zero: number of steps that gave the block a zero gradient.
        largest_coefficient: what a gradient was multiplied by at most.
        not_finite: number of steps in which a gradient was not finite.
        first_step: number of the first of the steps, as in the recorder's rows.
        last_step: number of the last of them.
        conflict_across: share of the steps in conflict that are so by ``gram_across`` too
            (``measure_noise=True``), of all steps that have one; None where none has, and so the
            next two.
        harmful_across: share of the harmful steps that are so by ``gram_across`` too.
        cosine_across: the smallest cosine in the mean of ``gram_across`` over the steps, which
            says most of the three: the sign of one step's estimate says little. NaN where the
            estimate of a squared norm is not positive, as the noise hides the gradient.
    """

    steps: int
    conflict: float
    harmful: float
    norm_ratio: float
    cosine: float
    zero: int
    largest_coefficient: float
    not_finite: int
    first_step: int
    last_step: int
    conflict_across: float | None = None
    harmful_across: float | None = None
    cosine_across: float | None = None


@dataclass(frozen=True)
class BlockSummary:
    """A block over a training.

    Attributes:
        block: its name.
        objectives: names of the losses that reach it.
        whole: all steps in which the block was recorded with these objectives.
        early: the first third of these steps.
        late: the last third.
        harmed: by objective, the share of the finite steps in which the plain sum has a negative
            product with its gradient.
        worst_pair: the two objectives whose gradients most often have a negative product with
            each other; None where none ever have.
        worst_pair_conflict: share of the finite steps in which they have.
        turned: share of the finite steps whose coefficients were not all the same, so that the
            step left the direction of the sum.
    """

    block: str
    objectives: tuple[str, ...]
    whole: PhaseSummary
    early: PhaseSummary
    late: PhaseSummary
    harmed: dict[str, float]
    worst_pair: tuple[str, str] | None
    worst_pair_conflict: float
    turned: float

    @property
    def verdict(self) -> str:
        """Whether integration can pay, in a sentence; docs/monitoring.md has rules and reasons."""
        whole, late = self.whole, self.late
        if any(part.not_finite > DIVERGED * part.steps for part in (whole, late)):
            return (
                f"{whole.not_finite} of {whole.steps} steps had a gradient that is not finite: "
                "find out why before you read on."
            )
        finite = whole.steps - whole.not_finite
        if finite < FEWEST_STEPS:
            return (
                f"{finite} steps are too few to tell: measure {FEWEST_STEPS} or more, spread "
                "over the training."
            )
        lopsided = whole.norm_ratio >= LOPSIDED
        longest = f"longest gradient is {_rounded(whole.norm_ratio)} times the shortest"
        if whole.harmful < RARE and lopsided:
            return (
                f"The {longest}, so the sum follows one loss: weight the losses first, {WEIGHABLE}."
            )
        if whole.harmful < RARE:
            return (
                "The summed gradient agrees with every loss's own gradient in "
                f"{_percent(1 - whole.harmful)} of the steps: expect nothing from another "
                "direction, and compare with a larger learning rate."
            )
        opposes = (
            "The summed gradient opposes a loss's own gradient in "
            f"{_percent(whole.harmful)} of the steps{self._change}"
        )
        if lopsided:
            return (
                f"{opposes}, and the {longest}: weight the losses first, {WEIGHABLE}; a sweep of "
                'the weights is what integration has to beat. Without a sweep, compare "upgrad".'
            )
        if whole.harmful < FREQUENT:
            return (
                f"{opposes}: expect little from another direction, and compare with a larger "
                "learning rate before you do with integration."
            )
        return (
            f"{opposes}: integration may pay, and so may weights for the losses; compare "
            '"upgrad" with a sweep of them under "uniform".'
        )

    @property
    def _change(self) -> str:
        early, late = _percent(self.early.harmful), _percent(self.late.harmful)
        return "" if early == late else f" ({early} early, {late} late)"


@dataclass(frozen=True)
class Summary:
    """What :meth:`ConflictRecorder.summary` found; printed as a table.

    Attributes:
        blocks: one entry for each block and set of objectives, in the order of their first steps.
    """

    blocks: tuple[BlockSummary, ...]

    def __str__(self) -> str:
        if not self.blocks:
            return "nothing recorded: no step was measured in which two losses meet"
        names = _names(self.blocks)
        pairs = list(zip(names, self.blocks, strict=True))
        details = [f"{name}: {detail}" for name, block in pairs if (detail := _detail(block))]
        verdicts: dict[str, list[str]] = {}
        for name, block in pairs:
            verdicts.setdefault(block.verdict, []).append(name)
        told = [f"{', '.join(members)}: {verdict}" for verdict, members in verdicts.items()]
        if any(block.turned > 0 for block in self.blocks):
            told += ["", INTEGRATED]
        return "\n".join([*_table(self.blocks), "", *details, *[""] * bool(details), *told])


HEAD = ("block", "", "steps", "conflict", "harmful", "norm ratio", "cosine", "zero", "coefficient")
NOT_FINITE = ("not finite",)
ACROSS = ("conflict across", "harmful across", "cosine across")
PARTS = ("whole", "early", "late")


def _names(blocks: Iterable[BlockSummary]) -> list[str]:
    """Names that tell the blocks apart: one given by hand may stand for several."""
    count = Counter(block.block for block in blocks)
    return [
        f"{block.block} ({_listed(block.objectives)})" if count[block.block] > 1 else block.block
        for block in blocks
    ]


def _table(blocks: tuple[BlockSummary, ...]) -> list[str]:
    phases = [getattr(block, part) for block in blocks for part in PARTS]
    finite = not any(phase.not_finite for phase in phases)
    across = any(phase.conflict_across is not None for phase in phases)
    lines: list[tuple[str, ...]] = [HEAD + NOT_FINITE * (not finite) + ACROSS * across]
    for block in blocks:
        for part in PARTS:
            phase = getattr(block, part)
            name = block.block if part == "whole" else ""
            cells = _cells(phase) + (str(phase.not_finite),) * (not finite)
            span = f"{part} {phase.first_step}-{phase.last_step}"
            lines.append((name, span, *cells, *_cells_across(phase) * across))
    head, *rows = _aligned(lines)
    count = Counter(block.block for block in blocks)
    table = [head]
    for number, block in enumerate(blocks):
        table += rows[3 * number : 3 * number + 3]
        if count[block.block] > 1:
            table.append(f"  of {_listed(block.objectives)}")
    return table


def _detail(block: BlockSummary) -> str:
    """Whom the sum opposes, and who opposes whom; the latter is plain where there are two."""
    harmed = sorted(block.harmed.items(), key=lambda item: -item[1])
    worst = [f"{name} {_percent(share)}" for name, share in harmed[:SHOWN] if share > 0]
    found = [f"opposed by the sum: {', '.join(worst)}"] if worst else []
    if block.worst_pair is not None and len(block.objectives) > 2:
        share = _percent(block.worst_pair_conflict)
        found.append(f"worst pair: {_listed(block.worst_pair)} ({share})")
    return "; ".join(found)


def _cells(phase: PhaseSummary) -> tuple[str, ...]:
    return (
        str(phase.steps),
        _percent(phase.conflict),
        _percent(phase.harmful),
        _rounded(phase.norm_ratio),
        f"{phase.cosine:.2f}",
        str(phase.zero),
        f"{phase.largest_coefficient:.3g}",
    )


def _cells_across(phase: PhaseSummary) -> tuple[str, ...]:
    if phase.conflict_across is None or phase.harmful_across is None:
        return ("", "", "")
    shares = (_percent(phase.conflict_across), _percent(phase.harmful_across))
    return (*shares, f"{phase.cosine_across:.2f}")


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """Words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names))


def _percent(share: float) -> str:
    """One digit after the point, and neither 0 nor 100 % for what is not all or nothing."""
    if math.isnan(share):
        return "nan"
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if share < 0.001:
        return "<0.1 %"
    return ">99.9 %" if share > 0.999 else f"{100 * share:.1f} %"


def _rounded(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}"
