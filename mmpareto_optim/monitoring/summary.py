"""A training in a few numbers a block, and whether integration can pay there."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

# The limits of the verdicts; docs/monitoring.md has reasons.
MIN_STEPS = 100
RARE_HARM, FREQUENT_HARM = 0.05, 0.2
LARGE_NORM_RATIO = 100.0
MAX_NOT_FINITE = 0.1  # more than a GradScaler skips while it looks for its scale

MAX_NAMED = 5  # losses of a block that are named as opposed by the sum

PHASES = ("whole", "early", "late")
HEAD = ["block", "", "steps", "conflict", "harmful", "norm ratio", "cosine", "zero"]
HEAD += ["coefficient", "not finite"]

# The rules under which a larger weight gives a loss more say in a conflict too.
WEIGHT_FIRST = 'weight the losses first, under "uniform", "dualproj" or "upgrad"'
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
        steps: how many. Only steps in which two or more losses gave the block a gradient other than
            zero are summarized: a loss times zero is a loss left out.
        conflict: share of them in which two gradients have a negative product.
        harmful: share of them in which the plain sum has a negative product with a gradient.
        norm_ratio: norm of the longest gradient over that of the shortest not zero, the median.
        cosine: the smallest cosine between two gradients, the median.
        zero: number of steps in which the rule gave the block a zero gradient.
        largest_coefficient: what a gradient was multiplied by at most, with ``rescale="tensor"``
            the largest stretch included.
        not_finite: number of steps in which a gradient was not finite.
        first_step: number of the first of the steps, as in the recorder's rows.
        last_step: number of the last of them.
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


@dataclass(frozen=True)
class BlockSummary:
    """A block over a training.

    Attributes:
        block: its name.
        objectives: names of the losses that reach it.
        whole: all steps in which the block was recorded with these losses.
        early: the first third of these steps.
        late: the last third.
        harmed: by loss, the share of the finite steps in which the plain sum has a negative
            product with its gradient.
        worst_pair: the two losses whose gradients most often have a negative product with each
            other; None where none ever have.
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
        if any(phase.not_finite > MAX_NOT_FINITE * phase.steps for phase in (whole, late)):
            return (
                f"{whole.not_finite} of {whole.steps} steps had a gradient that is not finite: "
                "find out why before you read on."
            )
        finite = whole.steps - whole.not_finite
        if finite < MIN_STEPS:
            return (
                f"{finite} steps are too few to tell: measure {MIN_STEPS} or more, spread "
                "over the training."
            )
        longest = f"longest gradient is {_ratio(whole.norm_ratio)} times the shortest"
        if whole.harmful < RARE_HARM:
            if whole.norm_ratio >= LARGE_NORM_RATIO:
                return f"The {longest}, so the sum follows one loss: {WEIGHT_FIRST}."
            return (
                "The summed gradient agrees with every loss's own gradient in "
                f"{_percent(1 - whole.harmful)} of the steps: expect nothing from another "
                "direction, and compare with a larger learning rate."
            )
        shares = [_percent(phase.harmful) for phase in (whole, self.early, late)]
        opposes = f"The summed gradient opposes a loss's own gradient in {shares[0]} of the steps"
        if shares[1] != shares[2]:
            opposes += f" ({shares[1]} early, {shares[2]} late)"
        if whole.norm_ratio >= LARGE_NORM_RATIO:
            return (
                f"{opposes}, and the {longest}: {WEIGHT_FIRST}; a sweep of the weights is what "
                'integration has to beat. Without a sweep, compare "upgrad".'
            )
        if whole.harmful < FREQUENT_HARM:
            return (
                f"{opposes}: expect little from another direction, and compare with a larger "
                "learning rate before you do with integration."
            )
        return (
            f"{opposes}: integration may pay, and so may weights for the losses; compare "
            '"upgrad" with a sweep of them under "uniform".'
        )


@dataclass(frozen=True)
class Summary:
    """What :meth:`ConflictRecorder.summary` found; printed as a table.

    Attributes:
        blocks: one entry for each block and set of losses, in the order of their first steps.
    """

    blocks: tuple[BlockSummary, ...]

    def __str__(self) -> str:
        if not self.blocks:
            return "nothing recorded: in no step did two losses give a block a gradient"
        head, *rows = _aligned([HEAD, *chain(*map(_lines, self.blocks))])
        count = Counter(block.block for block in self.blocks)
        table, details = [head], []
        verdicts: dict[str, list[str]] = {}
        for number, block in enumerate(self.blocks):
            table += rows[len(PHASES) * number : len(PHASES) * (number + 1)]
            name = block.block
            if count[name] > 1:  # given by hand, for several sets of losses
                table.append(f"  of {_listed(block.objectives)}")
                name = f"{name} ({_listed(block.objectives)})"
            details += [f"{name}: {detail}" for detail in [_detail(block)] if detail]
            verdicts.setdefault(block.verdict, []).append(name)
        sentences = [f"{', '.join(names)}: {verdict}" for verdict, names in verdicts.items()]
        integrated = [INTEGRATED] if any(block.turned > 0 for block in self.blocks) else []
        parts = (table, details, sentences, integrated)
        return "\n\n".join("\n".join(part) for part in parts if part)


def _lines(block: BlockSummary) -> Iterator[list[str]]:
    for name in PHASES:
        phase: PhaseSummary = getattr(block, name)
        yield [
            block.block if name == "whole" else "",
            f"{name} {phase.first_step}-{phase.last_step}",
            str(phase.steps),
            _percent(phase.conflict),
            _percent(phase.harmful),
            _ratio(phase.norm_ratio),
            f"{phase.cosine:.2f}",
            str(phase.zero),
            f"{phase.largest_coefficient:.3g}",
            str(phase.not_finite),
        ]


def _aligned(lines: list[list[str]]) -> list[str]:
    """Words to the left, numbers to the right; no last column where all of it is finite."""
    columns = list(zip(*lines, strict=True))
    if set(columns[-1][1:]) == {"0"}:
        columns.pop()
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if index > 1 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    ]


def _detail(block: BlockSummary) -> str:
    """Whom the sum opposes, and which of three or more losses oppose each other."""
    harmed = sorted(block.harmed.items(), key=lambda item: -item[1])
    worst = [f"{name} {_percent(share)}" for name, share in harmed[:MAX_NAMED] if share > 0]
    details = [f"opposed by the sum: {', '.join(worst)}"] if worst else []
    if block.worst_pair is not None and len(block.objectives) > 2:
        share = _percent(block.worst_pair_conflict)
        details.append(f"worst pair: {_listed(block.worst_pair)} ({share})")
    return "; ".join(details)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(str, names))


def _percent(share: float) -> str:
    """One digit after the point, and neither 0 nor 100 % for what is not all or nothing."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if share < 0.001:
        return "<0.1 %"
    return ">99.9 %" if share > 0.999 else f"{100 * share:.1f} %"


def _ratio(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}"
