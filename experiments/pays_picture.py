"""The picture of the page: gains against harmful steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from pays_finished import Finished
from pays_settings import SETTINGS, UNIFORM
from pays_statistics import Row, harmful


def plot(settings: Sequence[str], rows: Sequence[Row], finished: Finished, path: Path) -> None:
    """Gain of MMPareto over the two sums against the share of harmful steps."""
    figure, axes = plt.subplots(2, figsize=(5.5, 9), layout="constrained")
    for panel, physics in zip(axes, (False, True), strict=True):
        if not physics:  # from hundredths to tens of a per cent
            panel.set_xscale("symlog", linthresh=0.1)
        panel.set_xlim(0 if physics else -0.02, 100)
        for setting in settings:
            if SETTINGS[setting].physics == physics:
                share = max(harmful(finished.report(setting, UNIFORM)).values(), default=0.0)
                _points(panel, share, [row for row in rows if row.setting == setting])
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xlabel("harmful steps under the plain sum (%), greatest block")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
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
        beside = share + 1.5 if panel.get_xscale() == "linear" else 1.15 * share
        label = SETTINGS[row.setting].title if filled else None
        errors = [[row.difference - row.low], [row.high - row.difference]]
        panel.errorbar(
            share if filled else beside,
            row.difference,
            errors,
            fmt="o",
            color=color,
            mfc=color if filled else "white",
            capsize=3,
            label=label,
        )
