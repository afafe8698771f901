"""A training in a few numbers a block, and whether integration can pay there."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from mmpareto_optim.monitoring.history import BlockHistory

# The limits of the verdicts; docs/monitoring.md has reasons.
MIN_STEPS = 100
RARE_HARM, FREQUENT_HARM = 0.05, 0.2
LARGE_NORM_RATIO = 100.0
MAX_NOT_FINITE = 0.1  # more than a GradScaler skips while it looks for its scale
MAX_NAMED = 5  # losses of a block that are named as opposed by the sum

HEAD = "steps  conflict  harmful  norm ratio  cosine  zero  not finite"

INTEGRATED = (
    "Recorded while integrating: on the path of the plain sum it can be otherwise. To learn "
    'whether integration pays, record with integration="uniform".'
)

OF_GRADIENTS = (
    "These numbers, and a rule's promise that no loss rises, are about gradients. The steps that "
    "{} makes of them, by momentum, scaling or weight decay, may raise a loss more or less often: "
    "docs/recipes/steps_taken.md counts them."
)


@dataclass(frozen=True)
class PhaseSummary:
    """A block over some of its steps.

    Shares, medians and ``zero`` are those of the steps whose gradients are finite.

    Attributes:
        steps: how many, of those in which two losses gave the block a gradient other than zero.
        conflict: share of them in which two gradients have a negative product.
        harmful: share of them in which the plain sum has a negative product with a gradient.
        norm_ratio: norm of the longest gradient over that of the shortest not zero, the median.
        cosine: the smallest cosine between two gradients, the median.
        zero: number of steps in which the rule gave the block a zero gradient.
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
    not_finite: int
    first_step: int
    last_step: int


@dataclass(frozen=True)
class BlockSummary:
    """A block over a training.

    Attributes:
        block: its name.
        objectives: names of the losses that reach it.
        whole: all steps in which two or more of these losses met.
        early: the first third of them.
        late: the last third.
        harmed: by loss, the share of the finite steps in which the sum opposes its gradient.
        turned: share of the finite steps whose coefficients were not all the same.
    """

    block: str
    objectives: tuple[str, ...]
    whole: PhaseSummary
    early: PhaseSummary
    late: PhaseSummary
    harmed: dict[str, float]
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
                f"{finite} steps are too few to tell: measure {MIN_STEPS} or more, spread over "
                "the training."
            )
        opposes = (
            f"The summed gradient opposes a loss's own gradient in {whole.harmful:.1%} of the "
            f"steps ({self.early.harmful:.1%} early, {late.harmful:.1%} late)"
        )
        if whole.norm_ratio >= LARGE_NORM_RATIO:
            return (
                f"{opposes}, and the longest gradient is {whole.norm_ratio:,.0f} times the "
                'shortest: weight the losses first, under "uniform", "dualproj" or "upgrad".'
            )
        if whole.harmful < FREQUENT_HARM:
            gain = "nothing" if whole.harmful < RARE_HARM else "little"
            return (
                f"{opposes}: expect {gain} from another direction, and compare with a larger "
                "learning rate."
            )
        return (
            f"{opposes}: integration may pay, and so may weights for the losses; compare "
            '"upgrad" with a sweep of them under "uniform".'
        )


@dataclass(frozen=True)
class Summary:
    """What :meth:`ConflictRecorder.summary` found of each block; printed as a table."""

    blocks: tuple[BlockSummary, ...]
    base: str = ""  # whose steps are not along the gradient

    def __str__(self) -> str:
        if not self.blocks:
            return "nothing recorded: in no step did two losses give a block a gradient"
        width = max(len(_title(block)) for block in self.blocks)
        lines = [f"{'block':<{width}}  {'':<19}  {HEAD}"]
        for block in self.blocks:
            lines += _lines(block, width)
        lines += ["", *(f"{_title(each)}: {each.verdict}{_opposed(each)}" for each in self.blocks)]
        if self.base:
            lines += ["", OF_GRADIENTS.format(self.base)]
        if any(block.turned > 0 for block in self.blocks):
            lines += ["", INTEGRATED]
        return "\n".join(lines)


def summarize(histories: Iterable[BlockHistory], base: str) -> Summary:
    """The summary of the steps in which losses meet: a loss times zero is a loss left out."""
    meeting = [history.meeting() for history in histories]
    return Summary(tuple(_summarize_block(each) for each in meeting if each.steps), base)


def _summarize_block(history: BlockHistory) -> BlockSummary:
    third = max(1, len(history.steps) // 3)
    stats = history.finite().stats()
    harmed = stats.harmed.double().mean(0).tolist()
    return BlockSummary(
        history.block,
        history.objectives,
        whole=_summarize_phase(history),
        early=_summarize_phase(history.part(slice(third))),
        late=_summarize_phase(history.part(slice(-third, None))),
        harmed=dict(zip(history.objectives, harmed, strict=True)),
        turned=_mean((stats.coefficients != stats.coefficients[:, :1]).any(-1)),
    )


def _summarize_phase(history: BlockHistory) -> PhaseSummary:
    # A step whose gradients are not finite shows neither conflict nor the lack of one.
    finite = history.finite()
    stats = finite.stats()
    cosine = stats.cosines.nan_to_num(1.0).flatten(-2).amin(-1)  # NaN beside a zero gradient
    return PhaseSummary(
        steps=len(history.steps),
        conflict=_mean(stats.conflict),
        harmful=_mean(stats.harmful),
        norm_ratio=float(finite.norm_ratios().median()),
        cosine=float(cosine.median()),
        zero=int((stats.coefficients == 0).all(-1).sum()),
        not_finite=len(history.steps) - len(finite.steps),
        first_step=history.steps[0].step,
        last_step=history.steps[-1].step,
    )


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())


def _title(block: BlockSummary) -> str:
    """The block's name, and its losses where it was named by hand."""
    losses = list(map(str, block.objectives))
    return (
        block.block if block.block == "+".join(losses) else f"{block.block} ({', '.join(losses)})"
    )


def _lines(block: BlockSummary, width: int) -> Iterator[str]:
    title = _title(block)
    for name, phase in (("whole", block.whole), ("early", block.early), ("late", block.late)):
        steps = f"{name} {phase.first_step}-{phase.last_step}"
        yield (
            f"{title:<{width}}  {steps:<19}  {phase.steps:>5}  {phase.conflict:>8.1%}  "
            f"{phase.harmful:>7.1%}  {phase.norm_ratio:>10,.1f}  {phase.cosine:>6.2f}  "
            f"{phase.zero:>4}  {phase.not_finite:>10}"
        )
        title = ""


def _opposed(block: BlockSummary) -> str:
    """Whose gradients the sum opposes."""
    harmed = sorted(block.harmed.items(), key=lambda item: -item[1])
    worst = [f"{name} {share:.1%}" for name, share in harmed[:MAX_NAMED] if share > 0]
    return f" Opposed by the sum: {', '.join(worst)}." if worst else ""
