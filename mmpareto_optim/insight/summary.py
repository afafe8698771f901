"""A training in a few numbers a block, and whether integration can pay there."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpareto_optim.insight.tracks import Track
from mmpareto_optim.stats import BlockStats, in_conflict, is_harmful

FEWEST_STEPS = 100
"""Steps from which a share is told: none of 100 is less than 3 %, with 95 % confidence."""

RARE, FREQUENT = 0.05, 0.2
"""Shares of harmful steps below which the direction cannot pay, and from which it may."""

LOPSIDED = 100.0
"""Ratio of the gradients' norms from which the shortest is less than a hundredth of the sum."""


@dataclass(frozen=True)
class PhaseSummary:
    """A block over some of its steps.

    Attributes:
        steps: how many were measured.
        conflict: share of them in which two gradients have a negative product.
        harmful: share of them in which the plain sum has a negative product with a gradient.
        norm_ratio: norm of the longest gradient over that of the shortest, the median; zero
            gradients do not count. NaN where fewer than two are left in each step.
        cosine: the smallest cosine between two gradients, the median.
        zero: number of steps that gave the block a zero gradient.
        largest_coefficient: what a gradient was multiplied by at most.
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
    conflict_across: float | None = None
    harmful_across: float | None = None
    cosine_across: float | None = None


@dataclass(frozen=True)
class BlockSummary:
    """A block over a training.

    Attributes:
        block: its name.
        objectives: names of the losses that reach it.
        whole: all its steps.
        early: the first third of them.
        late: the last third.
    """

    block: str
    objectives: tuple[str, ...]
    whole: PhaseSummary
    early: PhaseSummary
    late: PhaseSummary

    @property
    def verdict(self) -> str:
        """Whether integration can pay, in a sentence; docs/monitoring.md has rules and reasons."""
        whole = self.whole
        if whole.steps < FEWEST_STEPS:
            return (
                f"{whole.steps} steps are too few to tell: measure {FEWEST_STEPS} or more, spread "
                "over the training."
            )
        lopsided = whole.norm_ratio >= LOPSIDED
        if lopsided:
            longer = f"the longest gradient is {_rounded(whole.norm_ratio)} times the shortest"
        if whole.harmful < RARE and lopsided:
            return f"{_sentence(longer)}, so the sum follows one loss: weight the losses first."
        if whole.harmful < RARE:
            return (
                f"The sum lowers every loss in {_percent(1 - whole.harmful)} of the steps: expect "
                "nothing from another direction, and compare with a larger learning rate."
            )
        raises = f"The sum raises a loss in {_percent(whole.harmful)} of the steps{self._change}"
        if lopsided:
            return (
                f"{raises}, and {longer}: weight the losses first; a sweep of the weights is what "
                "integration has to beat."
            )
        if whole.harmful < FREQUENT:
            return (
                f"{raises}: expect little from another direction, and compare with a larger "
                "learning rate before you do with integration."
            )
        return (
            f"{raises}: integration may pay, and so may weights for the losses; compare it with "
            "a sweep of them."
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
        phases = [
            (block.block if part == "whole" else "", part, getattr(block, part))
            for block in self.blocks
            for part in ("whole", "early", "late")
        ]
        across = any(phase.conflict_across is not None for *_, phase in phases)
        lines = [HEAD + ACROSS if across else HEAD]
        lines += [(name, part, *_cells(phase, across=across)) for name, part, phase in phases]
        return "\n".join([*_aligned(lines), "", *map(_told, self.blocks)])


HEAD: tuple[str, ...] = (
    "block",
    "",
    "steps",
    "conflict",
    "harmful",
    "norm ratio",
    "cosine",
    "zero",
    "coefficient",
)
ACROSS: tuple[str, ...] = ("conflict across", "harmful across", "cosine across")


def summary_of(tracks: Iterable[Track]) -> Summary:
    """The summary of what some tracks hold, those of one block and objectives together."""
    together: dict[tuple[str, tuple[str, ...]], list[Track]] = {}
    for track in tracks:
        together.setdefault((track.kind.block, track.kind.objectives), []).append(track)
    return Summary(tuple(_block(*key, members) for key, members in together.items()))


def _block(block: str, objectives: tuple[str, ...], tracks: list[Track]) -> BlockSummary:
    order = torch.tensor([when.number for track in tracks for when in track.when]).argsort()
    columns = [_columns(track.stats()) for track in tracks]
    steps = {name: torch.cat([each[name] for each in columns])[order] for name in columns[0]}
    third = max(1, len(order) // 3)
    early = {name: values[:third] for name, values in steps.items()}
    late = {name: values[-third:] for name, values in steps.items()}
    return BlockSummary(block, objectives, _phase(steps), _phase(early), _phase(late))


def _columns(stats: BlockStats) -> dict[str, Tensor]:
    """What a phase is made of, for each step; NaN where it is not known."""
    norms = stats.norms.masked_fill(stats.norms == 0, torch.nan)
    longest = norms.nan_to_num(nan=-math.inf).amax(-1)
    shortest = norms.nan_to_num(nan=math.inf, posinf=math.inf).amin(-1)
    several = norms.isfinite().sum(-1) > 1
    smallest = stats.cosines.nan_to_num(nan=math.inf).flatten(-2).amin(-1)
    gram = stats.gram
    across = torch.full_like(gram, torch.nan) if stats.gram_across is None else stats.gram_across
    unknown = ~across.isfinite().flatten(-2).all(-1)
    conflict, harmful = stats.conflict & in_conflict(across), stats.harmful & is_harmful(across)
    return {
        "conflict": stats.conflict,
        "harmful": stats.harmful,
        "norm_ratio": (longest / shortest).masked_fill(~several, torch.nan),
        "cosine": smallest.masked_fill(~several, torch.nan),
        "zero": (stats.coefficients == 0).all(-1),
        "largest_coefficient": stats.coefficients.nan_to_num(nan=-math.inf).amax(-1),
        "conflict_across": conflict.double().masked_fill(unknown, torch.nan),
        "harmful_across": harmful.double().masked_fill(unknown, torch.nan),
        "across": across,
    }


def _smallest_cosine(gram: Tensor) -> Tensor:
    """NaN where the estimate of a square is not positive."""
    lengths = gram.diagonal().sqrt()
    return (gram / lengths.unsqueeze(0) / lengths.unsqueeze(1)).amin()


def _phase(steps: dict[str, Tensor]) -> PhaseSummary:
    known = bool(steps["conflict_across"].isfinite().any())
    return PhaseSummary(
        steps=len(steps["conflict"]),
        conflict=float(steps["conflict"].double().mean()),
        harmful=float(steps["harmful"].double().mean()),
        norm_ratio=float(steps["norm_ratio"].nanmedian()),
        cosine=float(steps["cosine"].nanmedian()),
        zero=int(steps["zero"].sum()),
        largest_coefficient=float(steps["largest_coefficient"].max()),
        conflict_across=float(steps["conflict_across"].nanmean()) if known else None,
        harmful_across=float(steps["harmful_across"].nanmean()) if known else None,
        cosine_across=float(_smallest_cosine(steps["across"].nanmean(0))) if known else None,
    )


def _cells(phase: PhaseSummary, *, across: bool) -> tuple[str, ...]:
    cells = (
        str(phase.steps),
        _percent(phase.conflict),
        _percent(phase.harmful),
        _rounded(phase.norm_ratio),
        f"{phase.cosine:.2f}",
        str(phase.zero),
        f"{phase.largest_coefficient:.3g}",
    )
    if not across:
        return cells
    if phase.conflict_across is None or phase.harmful_across is None:
        return (*cells, "", "", "")
    shares = (_percent(phase.conflict_across), _percent(phase.harmful_across))
    return (*cells, *shares, f"{phase.cosine_across:.2f}")


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


def _told(block: BlockSummary) -> str:
    return f"{block.block}: {block.verdict}"


def _percent(share: float) -> str:
    """One digit after the point, and neither 0 nor 100 % for what is not all or nothing."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if share < 0.001:
        return "<0.1 %"
    return ">99.9 %" if share > 0.999 else f"{100 * share:.1f} %"


def _rounded(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
