"""Rows of evidence: paired differences, their intervals and verdicts, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CLAIMS = {
    1: (
        "Conflict exists, most in early training",
        "Share of the steps of uniform training in which the two gradients of a block have a "
        "negative cosine; then that share in the first third minus that in the last third. A share "
        "cannot be negative, so the first row can hardly fail: read its size.",
    ),
    2: (
        "Joint gradients are smaller in magnitude and covariance than unimodal ones",
        "(unimodal - joint) / (unimodal + joint) of the mean gradient's length and of the "
        "batch covariance's trace in each encoder (`gradient_noise`, 16 batches of 64, after a "
        "tenth, a half and all of uniform training).",
    ),
    3: ("Conventional Pareto is below uniform", "Accuracy of uniform minus that of Pareto."),
    4: (
        "MMPareto is above uniform",
        "Accuracy of MMPareto minus that of uniform, and minus that of uniform times 1.5: the "
        "control, which has the longer step without the direction.",
    ),
    5: (
        "MMPareto's encoders match or beat those trained alone",
        "Accuracy of an encoder's own head minus that of the encoder trained by its own loss "
        "alone, at its own learning rate. *Undecided* also covers a match.",
    ),
    6: (
        "MMPareto helps where the tasks' difficulty differs",
        "Overlaid digits, the right one noisy: accuracy of MMPareto minus that of uniform and of "
        "the control.",
    ),
    7: (
        "MMPareto reaches flatter minima",
        "Sharpness (`loss_slices`, radius 0.5, 10 directions, sum of all losses on 512 training "
        "samples) of uniform's end minus that of MMPareto's.",
    ),
    8: (
        "MMPareto converges to Pareto-stationary points",
        "In training: length of the min-norm point over the mean length of the gradients (of "
        "mini-batches), its mean in the first third minus that in the last. Convex: two quadratics "
        "in 5 dimensions with different Hessians, 1000 steps; orders of magnitude by which the "
        "end is nearer to the known Pareto set than the start, minus 2: what holds has come a "
        "hundred times nearer. At a constant rate the stretched step need not vanish near the set.",
    ),
}
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Row:
    """Values by seed of both sides (or one), and their difference: positive where as claimed."""

    claim: int
    data: str
    quantity: str
    figures: str
    differences: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float, float]:
        return interval(self.differences)

    @property
    def verdict(self) -> str:
        return verdict(*self.interval[1:])


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and both ends of its 95 % confidence interval, by Student's t."""
    values = np.asarray(differences, dtype=float)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    middle = float(values.mean())
    return middle, middle - float(half), middle + float(half)


def verdict(low: float, high: float) -> str:
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else OPEN


def compared(
    claim: int, data: str, quantity: str, higher: Sequence[float], lower: Sequence[float]
) -> Row:
    """A row of the claim that the first is higher, paired by seed."""
    figures = f"{spread(higher)} / {spread(lower)}"
    pairs = zip(higher, lower, strict=True)
    return Row(claim, data, quantity, figures, tuple(a - b for a, b in pairs))


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}"


def table(rows: Sequence[Row], *, judged: bool) -> str:
    """Markdown, the verdict in front where the rows are ``judged``."""
    columns = ["difference", "mean and 95 % interval", "sides, mean ± std", "data", "n"]
    alignments = ["---", "---:", "---:", "---", "---:"]
    lines = [
        [*(["verdict"] if judged else []), *columns],
        [*(["---"] if judged else []), *alignments],
    ]
    for row in rows:
        middle, low, high = row.interval
        measured = f"{middle:+.3g} [{low:+.3g}, {high:+.3g}]"
        cells = [row.quantity, measured, row.figures, row.data, str(len(row.differences))]
        lines.append([*([row.verdict] if judged else []), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(claim: int, rows: Sequence[Row]) -> str:
    """The claim in words, how it was measured, and its rows."""
    title, method = CLAIMS[claim]
    mine = [row for row in rows if row.claim == claim]
    verdicts = [row.verdict for row in mine]
    counts = ", ".join(f"{v} {verdicts.count(v)}" for v in (HOLDS, FAILS, OPEN) if v in verdicts)
    parts = [f"## {claim}. {title}", f"{method} Verdicts: {counts or 'none measured'}."]
    return "\n\n".join([*parts, table(mine, judged=True)] if mine else parts)


def page(rows: Sequence[Row], ablations: Sequence[Row], notes: Sequence[str], run: str) -> str:
    parts = [
        "# Evidence: the paper's claims, rerun",
        "Each row is one difference, paired by seed, and positive if the claim is right. "
        "*Holds*: its 95 % interval (Student's t) lies above 0; *does not hold*: below 0; "
        "*undecided*: it contains 0. The intervals are not corrected for multiple comparisons.",
        *(section(claim, rows) for claim in CLAIMS),
        "## Ablations",
        "Accuracy in % (mean of the main heads) minus that of the second method named.",
        table(ablations, judged=False) if ablations else "Not run.",
        "## How it was run",
        "\n".join(f"- {note}" for note in notes),
        f"```sh\n{run}\n```",
    ]
    return "\n\n".join(parts) + "\n"
