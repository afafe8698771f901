"""What the pages of evidence share: tables, marks, verdicts, correction for several comparisons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from statsmodels.stats.multitest import multipletests

Row = TypeVar("Row", bound=Any)  # a dataclass with p


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def filled(page: str, name: str, content: str) -> str:
    """The page with what lies between the marks of that name replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    found, count = re.subn(pattern, lambda _: f"{begin}\n{content}\n{end}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} places between {begin} and {end}")
    return found


def with_verdict(measured: str, verdict: str) -> str:
    """Nothing is said of what is undecided."""
    return measured if verdict == "undecided" else f"{measured}, **{verdict}**"


def corrected(rows: Sequence[Row]) -> list[Row]:
    """The same with p corrected by Holm over all of them."""
    if not rows:
        return []
    adjusted = multipletests([row.p for row in rows], method="holm")[1]
    return [replace(row, p=float(p)) for row, p in zip(rows, adjusted, strict=True)]
