"""The finished runs of pays.py as statistics, tables, a picture and a file beside the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pays_extras import (
    SCALED,
    SCALES,
    batch_lines,
    noise_lines,
    scale_lines,
    sweep_lines,
)
from pays_finished import Finished
from pays_picture import plot
from pays_settings import (
    ALONE,
    BATCH,
    MMPARETO,
    SETTINGS,
    UNIFORM,
)
from pays_statistics import (
    OVER_BEST,
    OVER_PLAIN,
    SAME_LENGTH,
    Row,
    corrected,
    harmful,
    rows_of,
    rows_of_rules,
)

BATCH_HEADER = (
    "conflict: inertial",
    "conflict: skeleton",
    "harmful: inertial",
    "harmful: skeleton",
    "accuracy",
    "MMPareto minus the sum, 95 %",
)
NOISE_HEADER = (
    "cosine: inertial",
    "cosine: skeleton",
    "across halves: inertial",
    "across halves: skeleton",
)


def table(lines: Iterable[Sequence[str]], header: Sequence[str], numbers: int) -> str:
    """Markdown; the last ``numbers`` columns to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def verdicts(settings: Sequence[str], rows: Sequence[Row], finished: Finished) -> str:
    """A line a setting: how often the sum harms, and what MMPareto gains over the sums."""
    lines = []
    for setting in settings:
        found = {row.claim: row for row in rows if row.setting == setting}
        if "plain sum" not in found or "best sum" not in found:
            continue
        plain, best = found["plain sum"], found["best sum"]
        shares = harmful(finished.report(setting, UNIFORM)).values()
        long = [
            row
            for row in rows
            if (row.claim, row.other) == ("direction", "uniform x 1.5") and row.setting == setting
        ]
        lines.append(
            (
                SETTINGS[setting].title,
                " / ".join(f"{share:.2g} %" for share in shares),
                f"{plain.measured}, {plain.verdict}",
                f"{long[0].measured}, {long[0].verdict}" if long else "",
                f"{best.measured}, **{best.verdict}**",
                best.other,
            )
        )
    gains = ("over the plain sum", "over the sum x 1.5", "over the best sum", "best sum")
    return table(lines, ("setting", "harmful steps", *gains), 0)


def methods_table(setting: str, rows: Sequence[Row], finished: Finished) -> str:
    """A line a method: its rate, its score, and the tests against it."""
    s = SETTINGS[setting]
    tests = {row.other: row for row in rows if row.setting == setting}
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
    header = ("method", "rate", *score, "MMPareto minus this, 95 %", "p (Holm)", "MMPareto is")
    return table(lines, header, 0)


def lengths_table(settings: Sequence[str], rows: Sequence[Row]) -> str:
    """MMPareto minus the sum that is as long: what the direction gives."""
    lines = []
    for setting in settings:
        mine = [row for row in rows if (row.claim, row.setting) == ("direction", setting)]
        for row, (ours, theirs) in zip(mine, SAME_LENGTH, strict=False):
            cells = (ours, theirs, row.measured, f"{row.p:.2g}", row.verdict)
            lines.append((SETTINGS[setting].title, *cells))
    header = ("setting", "MMPareto", "sum", "difference, 95 %", "p (Holm)", "MMPareto is")
    return table(lines, header, 0)


def rules_table(settings: Sequence[str], finished: Finished) -> str:
    """Each rule against both sums, a line a setting and rule."""
    found = {}
    for row in corrected([row for s in settings for row in rows_of_rules(s, finished)]):
        found[row.setting, row.other, row.claim] = f"{row.measured}, {row.verdict}"
    lines = [
        (SETTINGS[s].title, rule, found[s, rule, OVER_PLAIN], found[s, rule, OVER_BEST])
        for s, rule in dict.fromkeys((s, rule) for s, rule, _ in found)
    ]
    return table(lines, ("setting", "rule", "over the plain sum", "over the best sum"), 0)


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def shares_table(settings: Sequence[str], finished: Finished) -> str:
    lines = []
    for setting in settings:
        runs = finished.report(setting, UNIFORM)
        conflicts = harmful(runs, "conflict")
        for block, share in harmful(runs).items():
            title = SETTINGS[setting].title
            lines.append((title, block, f"{conflicts[block]:.1f} %", f"{share:.2f} %"))
    return table(lines, ("setting", "block", "in conflict", "harmful"), 2)


def write_runs(settings: Sequence[str], finished: Finished, path: Path) -> None:
    """All finished runs, a line each."""
    lines = []
    for setting in settings:
        for job, result in finished.all(setting):
            kept: dict[str, Any] = {"setting": setting, "method": job.method, "lr": job.lr}
            kept |= {"seed": job.seed, "validation": job.validate}
            kept |= {"scale": job.scale} if job.scale != 1 else {}
            kept |= {"batch": job.batch} if job.batch != BATCH else {}
            kept |= {"parts": job.parts} if job.parts != 1 else {}
            told = ("accuracy", "error", "conflict", "harmful", "cosine", "cosine_across")
            for name in (*told, "mean_coefficients") if job.method == MMPARETO else told:
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
    page = filled(page, "lengths", lengths_table(settings, rows))
    page = filled(page, "rules", rules_table(settings, finished))
    for setting in settings:
        measured = any(row.setting == setting for row in rows)
        content = methods_table(setting, rows, finished) if measured else "Not run to the end."
        page = filled(page, setting, content)
        if setting in SCALED and f"<!-- scaled {setting} -->" in page:
            header = ("", *(f"{scale:g}" for scale in SCALES))
            lines = scale_lines(setting, finished)
            page = filled(page, f"scaled {setting}", table(lines, header, len(SCALES)))
        if f"<!-- sweep {setting} -->" in page:
            tries = len(SETTINGS[setting].scalarizations)
            header = ("", *map(str, range(1, tries + 1)))
            lines = sweep_lines(setting, finished)
            page = filled(page, f"sweep {setting}", table(lines, header, tries))
    if "<!-- batches -->" in page:
        header = ("batch", *BATCH_HEADER)
        page = filled(page, "batches", table(batch_lines(finished), header, 6))
        header = ("batch", *NOISE_HEADER)
        page = filled(page, "noise", table(noise_lines(finished), header, 4))
    path.write_text(page)
    plot(settings, rows, finished, path.with_name("evidence.png"))
    write_runs(settings, finished, path.with_name("evidence_runs.jsonl"))
