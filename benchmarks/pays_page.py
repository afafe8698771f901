"""The finished runs of pays.py as statistics, tables, a picture and a file beside the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from pays_extras import SCALED, SCALES, batch_lines, scale_lines
from pays_finished import Finished
from pays_settings import ALONE, BATCH, JOINT, MMPARETO, REPLAYS, RULES, SETTINGS, UNIFORM, Result
from scipy import stats
from statsmodels.stats.multitest import multipletests

CLAIMS = {
    "plain sum": "the plain sum of the losses",
    "best sum": "the best plain sum that validation finds",
    "timing": "MMPareto's own coefficients, averaged or shuffled in time",
    "rules": "other rules of integration",
    "simpler": "one joint loss, the longer step alone, unimodal gradients",
    "alone": "the encoders trained alone",
}
BATCH_HEADER = (
    "conflict: inertial",
    "conflict: skeleton",
    "harmful: inertial",
    "harmful: skeleton",
    "accuracy",
)
BETTER, WORSE, OPEN = "better", "worse", "undecided"


@dataclass(frozen=True)
class Row:
    """MMPareto less something else in one setting: positive where MMPareto is better."""

    claim: str
    setting: str
    other: str
    difference: float
    low: float
    high: float
    p: float  # of no difference; in what is shown, corrected by Holm within the claim

    @property
    def verdict(self) -> str:
        if not self.p < 0.05:
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
    pairs += [("timing", MMPARETO, method) for method in REPLAYS]
    pairs += [("rules", MMPARETO, method) for method in RULES]
    if not s.physics:
        simpler = (JOINT, "uniform x 1.5", "unimodal gradients")
        pairs += [("simpler", MMPARETO, method) for method in simpler]
    for claim, method, other in pairs:
        ours, theirs = (finished.scores(setting, name) for name in (method, other))
        if ours and theirs:
            name = other if claim != "best sum" else f"{other} (MMPareto: {method})"
            yield compared(claim, setting, name, ours, theirs)
    for head in s.modalities:
        ours = finished.scores(setting, MMPARETO, head)
        theirs = finished.alone(setting, head)
        if ours and theirs:
            yield compared("alone", setting, f"{head} alone", ours, theirs)


def harmful(runs: Sequence[Result], kind: str = "harmful") -> dict[str, float]:
    """Mean share in % of the steps, by block."""
    blocks = runs[0][kind] if runs else {}
    return {block: float(np.mean([run[kind][block] for run in runs])) for block in blocks}


def table(lines: Iterable[Sequence[str]], header: Sequence[str], numbers: int) -> str:
    """Markdown; the last ``numbers`` columns to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def verdicts(settings: Sequence[str], rows: Sequence[Row], finished: Finished) -> str:
    """A line a setting: how often the sum harms, and what MMPareto gains over the two sums."""
    lines = []
    for setting in settings:
        found = {row.claim: row for row in rows if row.setting == setting}
        if "plain sum" not in found or "best sum" not in found:
            continue
        plain, best = found["plain sum"], found["best sum"]
        shares = harmful(finished.report(setting, UNIFORM)).values()
        lines.append(
            (
                SETTINGS[setting].title,
                " / ".join(f"{share:.1f} %" for share in shares),
                plain.measured,
                plain.verdict,
                best.measured,
                f"**{best.verdict}**",
            )
        )
    header = ("setting", "harmful steps", "over the plain sum", "", "over the best sum", "")
    return table(lines, header, 0)


def methods_table(setting: str, rows: Sequence[Row], finished: Finished) -> str:
    """A line a method: its rate, its score, and the tests against it."""
    s = SETTINGS[setting]
    tests = {row.other.split(" (")[0]: row for row in rows if row.setting == setting}
    lines = []
    for method in (m for m in s.methods if m != ALONE and finished.report(setting, m)):
        scores = finished.scores(setting, method)
        row = tests.get(method)
        test = (row.measured, f"{row.p:.2g}", row.verdict) if row else ("", "", "")
        shown = [spread(scores)]
        if s.physics:
            shown = [" / ".join(f"{10**-x:.3g}" for x in np.quantile(scores, [0.5, 0.75, 0.25]))]
        shown += [spread(finished.scores(setting, method, head)) for head in s.modalities]
        lines.append((method, f"{finished.lr(setting, method):g}", *shown, *test))
    for head in s.modalities:
        row = tests.get(f"{head} alone")
        if row:
            cells = [spread(finished.alone(setting, h)) if h == head else "" for h in s.modalities]
            rate = f"{finished.lr(setting, ALONE, head):g}"
            test = (row.measured, f"{row.p:.2g}", row.verdict)
            lines.append((f"{head} alone", rate, "", *cells, *test))
    score = ["error: median / quartiles"] if s.physics else ["both", *s.modalities]
    header = ("method", "rate", *score, "MMPareto less it, 95 %", "p (Holm)", "MMPareto is")
    return table(lines, header, 0)


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def shares_table(settings: Sequence[str], finished: Finished) -> str:
    lines = []
    for setting in settings:
        runs = finished.report(setting, UNIFORM)
        conflicts = harmful(runs, "conflict")
        for block, share in harmful(runs).items():
            title = SETTINGS[setting].title
            lines.append((title, block, f"{conflicts[block]:.1f} %", f"{share:.1f} %"))
    return table(lines, ("setting", "block", "in conflict", "harmful"), 2)


def plot(settings: Sequence[str], rows: Sequence[Row], finished: Finished, path: Path) -> None:
    """Gain of MMPareto over the two sums against the share of harmful steps."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, physics in zip(axes, (False, True), strict=True):
        for setting in settings:
            if SETTINGS[setting].physics == physics:
                share = max(harmful(finished.report(setting, UNIFORM)).values(), default=0.0)
                _points(panel, share, [row for row in rows if row.setting == setting])
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xlabel("harmful steps under the plain sum (%), greatest block")
        panel.legend(fontsize="small")
    axes[0].set(title="Multimodal", ylabel="gain of MMPareto (points of accuracy)")
    axes[1].set(title="Physics", ylabel="gain of MMPareto (decades of error)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _points(panel: Axes, share: float, rows: Sequence[Row]) -> None:
    """The best sum filled, the plain sum hollow, a colour a setting."""
    color = f"C{len(panel.get_legend_handles_labels()[1])}"
    for row in rows:
        if row.claim not in ("plain sum", "best sum"):
            continue
        filled = row.claim == "best sum"
        label = SETTINGS[row.setting].title if filled else None
        errors = [[row.difference - row.low], [row.high - row.difference]]
        panel.errorbar(
            share * (1 if filled else 1.02),
            row.difference,
            errors,
            fmt="o",
            color=color,
            mfc=color if filled else "white",
            capsize=3,
            label=label,
        )


def write_runs(settings: Sequence[str], finished: Finished, path: Path) -> None:
    """All finished runs, a line each."""
    lines = []
    for setting in settings:
        for job, result in finished.all(setting):
            kept: dict[str, Any] = {"setting": setting, "method": job.method, "lr": job.lr}
            kept |= {"seed": job.seed, "validation": job.validate}
            kept |= {"scale": job.scale} if job.scale != 1 else {}
            kept |= {"batch": job.batch} if job.batch != BATCH else {}
            for name in ("accuracy", "error", "conflict", "harmful", "mean_coefficients"):
                if result.get(name):
                    kept[name] = _short(result[name])
            lines.append(json.dumps(kept))
    head = json.dumps({"torch": torch.__version__, "runs": len(lines)})
    path.write_text("\n".join([head, *lines]) + "\n")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.4g}")


def filled(page: str, name: str, content: str) -> str:
    """The page with what lies between the marks of that name replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    found, count = re.subn(pattern, lambda _: f"{begin}\n{content}\n{end}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} places between {begin} and {end}")
    return found


def write_page(settings: Sequence[str], finished: Finished, path: Path) -> None:
    """Fill the marked tables of the page; write the picture and the runs beside it."""
    rows = corrected([row for setting in settings for row in rows_of(setting, finished)])
    page = filled(path.read_text(), "verdicts", verdicts(settings, rows, finished))
    page = filled(page, "shares", shares_table(settings, finished))
    for setting in settings:
        page = filled(page, setting, methods_table(setting, rows, finished))
        if setting in SCALED and f"<!-- scaled {setting} -->" in page:
            header = ("", *(f"{scale:g}" for scale in SCALES))
            lines = scale_lines(setting, finished)
            page = filled(page, f"scaled {setting}", table(lines, header, len(SCALES)))
    if "<!-- batches -->" in page:
        header = ("batch", *BATCH_HEADER)
        page = filled(page, "batches", table(batch_lines(finished), header, 5))
    path.write_text(page)
    plot(settings, rows, finished, path.with_name("evidence.png"))
    write_runs(settings, finished, path.with_name("evidence_runs.jsonl"))
