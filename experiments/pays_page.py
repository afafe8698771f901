"""The tables of docs/evidence_modalities.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pages import filled, table
from pays_finished import Finished
from pays_settings import (
    ALONE,
    AT_SUMS_RATE,
    DGL,
    ENSEMBLE,
    JOINT,
    MMPARETO,
    OTHER_RULES,
    SCALINGS,
    SETTINGS,
    UNIFORM,
    UPGRAD,
    Job,
)
from pays_statistics import (
    BY_DEFAULT,
    OF_ENSEMBLE,
    OF_RULES,
    TUNED,
    TUNED_DGL,
    WITH_ADAMW,
    Row,
    answers,
    compared,
    failed,
    shares,
)

FEWEST_SEEDS = 3  # an interval takes some
Answers = dict[tuple[str, str], Row]


def measured(finished: Finished) -> list[str]:
    """The settings that were run to the end."""
    return [setting for setting in SETTINGS if len(finished.seeds(setting)) >= FEWEST_SEEDS]


def spread(scores: Sequence[float]) -> str:
    return f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"


def tables(finished: Finished) -> Iterator[tuple[str, str]]:
    """Each with its name."""
    done = measured(finished)
    found = answers(done, finished)
    sgd = [setting for setting in done if not SETTINGS[setting].adamw]
    yield "summary", summary_table(sgd, found, finished)
    yield "choices", choices_table(sgd, found)
    yield "accuracies", accuracies_table(done, finished)
    yield "adamw", adamw_table([s for s in done if s not in sgd], found, finished)
    yield "rules", rules_table(sgd, found)
    yield "at the sum's rate", at_rate_table(done, finished)
    yield "shares", shares_table(done, finished)
    yield "heads", heads_table(done, finished)
    for setting in SETTINGS:
        yield (
            setting,
            methods_table(setting, finished) if setting in done else "Not run to the end.",
        )


def summary_table(settings: Sequence[str], found: Answers, finished: Finished) -> str:
    asked = (BY_DEFAULT, TUNED, OF_ENSEMBLE)
    lines = (
        (
            SETTINGS[setting].title,
            f"{max(shares(setting, 'harmful', finished).values()):.2f} %",
            *(found[question, setting].cell for question in asked),
        )
        for setting in settings
    )
    return table(("setting", "harmful steps", *asked), lines)


def choices_table(settings: Sequence[str], found: Answers) -> str:
    lines = []
    for setting in settings:
        best, dgl = found[TUNED, setting], found[TUNED_DGL, setting]
        lines.append((SETTINGS[setting].title, best.theirs, best.ours, dgl.ours, dgl.cell))
    return table(("setting", "best sum", "best MMPareto", "best DGL", TUNED_DGL), lines)


def accuracies_table(settings: Sequence[str], finished: Finished) -> str:
    lines = []
    for setting in settings:
        entries = (JOINT, UNIFORM, finished.best(setting, SCALINGS), MMPARETO, ENSEMBLE)
        cells = (spread(finished.report(setting, entry)) for entry in entries)
        seeds = len(finished.seeds(setting))
        lines.append((SETTINGS[setting].title, f"{seeds}", *cells))
    header = ("setting", "seeds", JOINT, "plain sum", "best sum", MMPARETO, ENSEMBLE)
    return table(header, lines)


def adamw_table(settings: Sequence[str], found: Answers, finished: Finished) -> str:
    """A verdict on the first comparison, the others as intervals."""
    lines = []
    for setting in settings:
        best = finished.best(setting, SCALINGS)
        pairs = ((UPGRAD, UNIFORM), (DGL, best), (ENSEMBLE, best))
        others = (compared("", setting, *pair, finished).measured for pair in pairs)
        lines.append((SETTINGS[setting].title, found[WITH_ADAMW, setting].cell, *others))
    header = ("MMPareto over the plain sum", "UPGrad over the plain sum")
    return table(("setting", *header, "DGL over the best sum", OF_ENSEMBLE), lines)


def rules_table(settings: Sequence[str], found: Answers) -> str:
    lines = []
    for setting in settings:
        rows = (found.get((OF_RULES[rule], setting)) for rule in OTHER_RULES)
        lines.append((SETTINGS[setting].title, *(row.cell if row else "" for row in rows)))
    return table(("over the plain sum", *OTHER_RULES), lines)


def at_rate_table(settings: Sequence[str], finished: Finished) -> str:
    """MMPareto and its control as a drop-in, at the rate of the plain sum."""
    lines = []
    for setting in settings:
        cells = [SETTINGS[setting].title, f"{finished.rate(setting, UNIFORM):g}"]
        for entry in (name + AT_SUMS_RATE for name in (SCALINGS[1], MMPARETO)):
            gain, failures = "", ""
            if entry in SETTINGS[setting].entries:
                gain = compared("", setting, entry, UNIFORM, finished).measured
                failures = f"{failed(setting, entry, finished)}"
            cells += [gain, failures]
        lines.append(cells)
    header = ("setting", "rate", "sum x 1.5 over the plain sum", "failed")
    return table((*header, BY_DEFAULT, "failed"), lines)


def shares_table(settings: Sequence[str], finished: Finished) -> str:
    lines = []
    for setting in settings:
        harmful = shares(setting, "harmful", finished)
        for block, share in shares(setting, "conflict", finished).items():
            cells = (f"{share:.1f} %", f"{harmful[block]:.2f} %")
            lines.append((SETTINGS[setting].title, block, *cells))
    return table(("setting", "block", "in conflict", "harmful"), lines)


def heads_table(settings: Sequence[str], finished: Finished) -> str:
    """The single heads' accuracies; each method at the rate of its joint head."""
    lines = []
    for setting in settings:
        for head in SETTINGS[setting].modalities:
            cells = [
                np.mean(of_head(setting, m, head, finished)) for m in (JOINT, UNIFORM, MMPARETO)
            ]
            cells.append(np.mean(finished.report(setting, head + ALONE)))
            lines.append((SETTINGS[setting].title, head, *(f"{cell:.1f}" for cell in cells)))
    return table(("setting", "head", JOINT, "plain sum", MMPARETO, "alone"), lines)


def of_head(setting: str, method: str, head: str, finished: Finished) -> list[float]:
    rate = finished.rate(setting, method)
    jobs = (Job(setting, method, rate, seed, False) for seed in finished.seeds(setting))
    return [float(finished.results[job]["accuracy"][head]) for job in jobs]


def methods_table(setting: str, finished: Finished) -> str:
    """A line an entry: its rate, its scores, the interval of its gain over the plain sum."""
    lines = []
    for entry in SETTINGS[setting].entries:
        scores = finished.report(setting, entry)
        cells = [rate_cell(setting, entry, finished), spread(scores), f"{np.median(scores):.1f}"]
        if entry.endswith(ALONE):
            cells += ["", ""]
        else:
            gain = compared("", setting, entry, UNIFORM, finished).measured
            cells += [f"{failed(setting, entry, finished)}", "" if entry == UNIFORM else gain]
        lines.append((entry, *cells))
    header = ("method", "rate", "mean ± sd", "median", "failed", "over the plain sum")
    return table(header, lines)


def rate_cell(setting: str, entry: str, finished: Finished) -> str:
    """A star where it is at an end of the grid."""
    rate, rates = finished.rate(setting, entry), SETTINGS[setting].rates
    return f"{rate:g}" + "\\*" * (rate in (rates[0], rates[-1]))


def write_page(finished: Finished, path: Path) -> None:
    """Fill the marked tables of the page."""
    page = path.read_text()
    for name, content in tables(finished):
        page = filled(page, name, content)
    path.write_text(page)
