"""The table and the picture of docs/evidence.md, of what pays.py and physics.py have finished.

python experiments/first_screen.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pays_finished
import physics_finished
from matplotlib.axes import Axes
from pages import filled, table
from pays_page import measured
from pays_settings import SETTINGS, UPGRAD
from pays_statistics import OF_ENSEMBLE, OF_RULES, TUNED, answers, shares
from physics_page import BEST_WEIGHT, Answers
from physics_problems import EQUATIONS
from physics_runs import HARD, SUM

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLUMNS = (
    "MMPareto over the best sum",
    "UPGrad over the plain sum",
    "simple control over the best sum",
)
FACTORS = (20, 10, 5, 2, 1, 0.5, 0.2, 0.1)  # ticks


@dataclass(frozen=True)
class Line:
    """One setting: its comparisons as text, and as (middle, low, high), None where not made."""

    title: str
    harmful: float  # share of the plain sum's steps, in %
    cells: tuple[str, ...]
    intervals: tuple[tuple[float, float, float] | None, ...]


def modalities(finished: pays_finished.Finished) -> Iterator[Line]:
    done = [setting for setting in measured(finished) if not SETTINGS[setting].adamw]
    found = answers(done, finished)
    for setting in done:
        rows = [found.get((q, setting)) for q in (TUNED, OF_RULES[UPGRAD], OF_ENSEMBLE)]
        yield Line(
            SETTINGS[setting].title,
            max(shares(setting, "harmful", finished).values()),
            tuple(row.cell if row else "" for row in rows),
            tuple((row.difference, row.low, row.high) if row else None for row in rows),
        )


def equations(finished: physics_finished.Finished) -> Iterator[Line]:
    answered = Answers(finished, "Adam")
    asked = (("MMPareto", BEST_WEIGHT), ("UPGrad", SUM), (HARD, BEST_WEIGHT))
    found = [{one.equation: one for one in answered.question(*pair)} for pair in asked]
    for equation in answered.equations:
        factors = [answer.get(equation) for answer in found]
        runs = finished.report(equation, "Adam", SUM)
        yield Line(
            EQUATIONS[equation].title,
            100 * float(np.mean([run["directions that raise a loss"] for run in runs])),
            tuple(str(factor or "") for factor in factors),
            tuple((one.middle, one.low, one.high) if one else None for one in factors),
        )


def rows(lines: list[Line]) -> Iterator[list[str]]:
    for line in lines:
        yield [line.title, f"{line.harmful:.2g} %", *line.cells]


def plot(several: list[Line], physics: list[Line], path: Path) -> None:
    """Intervals below each other, which a phone shows whole."""
    heights = [len(several), len(physics)]
    figure, panels = plt.subplots(
        2, figsize=(5, 1 + 0.62 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    draw(panels[0], several, 0.0)
    panels[0].set(title="Several modalities", xlabel="points of accuracy: right is better")
    draw(panels[1], physics, 1.0)
    panels[1].set(title="Physics", xlabel="times the error: right is better", xscale="log")
    panels[1].invert_xaxis()
    panels[1].set_xticks(FACTORS, [f"{factor:g}" for factor in FACTORS], minor=False)
    panels[1].minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw(panel: Axes, lines: list[Line], nothing: float) -> None:
    for number, label in enumerate(COLUMNS):
        found = [(i, line.intervals[number]) for i, line in enumerate(lines)]
        kept = [(i, interval) for i, interval in found if interval is not None]
        middle, low, high = np.array([interval for _, interval in kept]).T
        places = [i + 0.22 * (number - 1) for i, _ in kept]
        errors = [middle - low, high - middle]
        panel.errorbar(middle, places, xerr=errors, fmt="osD"[number], capsize=3, label=label)
    panel.axvline(nothing, color="black", linewidth=0.8)
    panel.set_yticks(range(len(lines)), [line.title for line in lines])
    panel.invert_yaxis()


def write(page: Path, modal: pays_finished.Finished, physical: physics_finished.Finished) -> None:
    """Fill the table, and draw the picture beside the page."""
    several, physics = list(modalities(modal)), list(equations(physical))
    content = table(("", "harmful steps", *COLUMNS), rows([*several, *physics]))
    page.write_text(filled(page.read_text(), "verdicts", content))
    plot(several, physics, page.with_suffix(".png"))


def main() -> None:
    modal = pays_finished.Finished(DOCS / "evidence_modalities.jsonl")
    physical = physics_finished.Finished(DOCS / "evidence_physics.jsonl")
    write(DOCS / "evidence.md", modal, physical)


if __name__ == "__main__":
    main()
