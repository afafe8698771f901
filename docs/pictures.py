"""The pictures of the documentation, computed with the library; needs matplotlib.

python docs/pictures.py [FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Wedge
from torch import Tensor

from mmpareto_optim import (
    min_norm_weights,
    mmpareto_coefficients,
    pareto_coefficients,
    uniform_coefficients,
)

# Colours that stay apart for colour-blind readers (Okabe and Ito).
GIVEN, SUM, SHORTEST, OURS = "#666666", "#D55E00", "#0072B2", "#009E73"
STYLE: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "font.size": 11,
    "svg.fonttype": "path",
    "svg.hashsalt": "mmpareto",
}


def draw(folder: Path) -> list[Path]:
    """Draw every picture into a folder.

    Args:
        folder: made where it is missing.

    Returns:
        The pictures' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Axes], None]] = {
        "no_conflict": partial(plane, 65, "No conflict: an angle of 65°"),
        "conflict": partial(plane, 150, "Conflict: an angle of 150°"),
        "length": length,
        "direction": direction,
    }
    paths = []
    for name, fill in pictures.items():
        with rc_context(STYLE):
            figure = Figure(figsize=(4.9, 4.9), layout="constrained")
            axes = figure.subplots()
            fill(axes)
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], facecolor="white", metadata={"Date": None})
    return paths


def pair(degrees: float, lengths: tuple[float, float]) -> Tensor:
    """Two gradients in the plane as rows, the first along the x axis."""
    turn = np.deg2rad(degrees)
    first = torch.tensor([lengths[0], 0.0], dtype=torch.float64)
    second = lengths[1] * torch.tensor([np.cos(turn), np.sin(turn)], dtype=torch.float64)
    return torch.stack([first, second])


def plane(degrees: float, title: str, axes: Axes) -> None:
    """Two gradients, their sum, their min-norm point and MMPareto's result."""
    rows = pair(degrees, (1.0, 2.0))
    gram = rows @ rows.T
    common = Wedge((0, 0), 9, degrees - 90, 90, color=OURS, alpha=0.1, linewidth=0)
    common.set_label("lowers both losses")
    axes.add_patch(common)
    axes.plot(*rows.T.numpy(), ":", color=GIVEN, label="convex hull")
    for row, name, place in zip(rows, (r"$g_m$", r"$g_u$"), ((2, -17), (-2, 8)), strict=True):
        _arrow(axes, row, GIVEN, 2.0)
        axes.annotate(name, _xy(row), place, textcoords="offset points", color=GIVEN, fontsize=14)
    results = {
        "MMPareto": (mmpareto_coefficients(gram), OURS, 5.0),
        "sum": (uniform_coefficients(gram), SUM, 2.5),
        "conventional Pareto": (pareto_coefficients(gram), SHORTEST, 2.5),
    }
    for name, (coefficients, colour, width) in results.items():
        _arrow(axes, coefficients @ rows, colour, width)
        axes.plot([], [], color=colour, linewidth=width, label=name)
    shortest = min_norm_weights(gram) @ rows
    axes.plot(*_xy(shortest), "o", color=SHORTEST, markersize=6, label="min-norm point", zorder=5)
    axes.set(xlim=(-1.9, 3.1), ylim=(-0.7, 3.1), aspect="equal", title=title)
    axes.tick_params(labelbottom=False, labelleft=False, length=0)
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)


def _arrow(axes: Axes, end: Tensor, colour: str, width: float) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", _xy(end), (0, 0), arrowprops=style | {"mutation_scale": 10 + 2 * width})


def _xy(vector: Tensor) -> tuple[float, float]:
    return float(vector[0]), float(vector[1])


def length(axes: Axes) -> None:
    """Length of each method's result against the angle between the gradients."""
    for degrees, _, result, style in _by_angle():
        axes.plot(degrees, result.norm(dim=-1), **style)
    axes.set(title="Length of the result", ylim=(0, None))
    _angles(axes)


def direction(axes: Axes) -> None:
    """Cosine of each method's result with the gradient that it serves less."""
    for degrees, rows, result, style in islice(_by_angle(), 3):
        products = (result.unsqueeze(-2) * rows).sum(-1)
        cosines = products / rows.norm(dim=-1) / result.norm(dim=-1, keepdim=True)
        # At 180 degrees nothing is common, and MMPareto's and Pareto's results are zero.
        axes.plot(degrees[:-1], cosines.amin(-1)[:-1], **style)
    axes.set(title="Cosine with the gradient it serves less", ylim=(-1.05, 1.05))
    axes.axhspan(-1.05, 0, color="0.93", zorder=0)
    axes.text(4, -0.97, "one of the losses rises", color="0.35")
    _angles(axes)


def _by_angle() -> Iterator[tuple[Any, Tensor, Tensor, dict[str, Any]]]:
    degrees = np.linspace(0, 180, 361)
    rows = torch.stack([pair(turn, (1.0, 2.0)) for turn in degrees])
    gram = rows @ rows.mT
    for name, coefficients, colour, line, width in (
        ("MMPareto", mmpareto_coefficients(gram), OURS, "-", 3.5),
        ("sum", uniform_coefficients(gram), SUM, "-", 2.0),
        ("conventional Pareto", pareto_coefficients(gram), SHORTEST, "--", 2.0),
        (r"1.5 $\times$ sum", 1.5 * uniform_coefficients(gram), SUM, ":", 2.0),
    ):
        style = {"label": name, "color": colour, "linestyle": line, "linewidth": width}
        yield degrees, rows, (coefficients.unsqueeze(-1) * rows).sum(-2), style


def _angles(axes: Axes) -> None:
    axes.set(xlabel="angle between the two gradients", xlim=(0, 180), xticks=range(0, 181, 45))
    axes.xaxis.set_major_formatter("{x:.0f}°")
    axes.axvline(90, color="0.8", linewidth=0.8, zorder=0)


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "_pictures"
    print(*draw(where), sep="\n")
