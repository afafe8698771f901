"""Pictures of what was recorded; needs the ``plot`` extra (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmpareto_optim.monitoring.flatness import LossSlices
from mmpareto_optim.monitoring.history import BlockHistory
from mmpareto_optim.monitoring.recorder import ConflictRecorder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = 20  # of a training, a point of a curve each
MAX_BLOCKS = 6
LINE_STYLES = ("-", "--", ":")  # of a block's curves: no more are drawn
LEGEND_LINE = 0.22  # inches
TWO_COLUMNS = 22  # characters of the longest label


def plot_conflict(recorder: ConflictRecorder) -> Figure:
    """Cosines, rates of conflict and harm, and ratio of the longest gradient to the shortest.

    A block has one color in all three panels, which lie below each other. A point is the mean over
    a twentieth of its steps (of ratios the geometric one), without those whose gradients are not
    finite, or of which fewer than two are not zero. Of more than three pairs of losses those with
    the lowest cosines are drawn; of more than six blocks those most often in conflict. Its
    ``savefig`` writes it to a file.
    """
    blocks = [history.meeting().finite() for history in recorder.histories.values()]
    blocks = [block for block in blocks if block.steps]
    if not blocks:
        raise ValueError("no steps: record one in which two losses meet, with finite gradients")
    shown = sorted(blocks, key=lambda block: -block.stats().conflict.double().mean().item())
    shown = shown[:MAX_BLOCKS]
    figure = _figure(height=7.5)
    cosine, rate, ratio = figure.subplots(3, sharex=True)
    if len(shown) < len(blocks):
        figure.suptitle(f"The {len(shown)} of {len(blocks)} blocks most often in conflict")
    for number, block in enumerate(shown):
        _plot_block(cosine, rate, ratio, block, f"C{number}")
    cosine.axhline(0, color="black", linewidth=0.8)
    cosine.set(title="Cosine between gradients")
    rate.set(title="Steps in conflict, harmful (dashed)", ylabel="%", ylim=(-3, 103))
    ratio.set(title="Norm of the longest gradient / the shortest", xlabel="step", yscale="log")
    lines, labels = cosine.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= TWO_COLUMNS else 1
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * math.ceil(len(labels) / columns))
    return figure


def plot_slices(slices: Mapping[str, LossSlices]) -> Figure:
    """Rise of the loss along random lines: mean and standard deviation over the directions.

    ``slices`` is what :func:`loss_slices` gave, by the name of a method or of a model.
    """
    if not slices:
        raise ValueError("no slices: give at least one")
    figure = _figure(height=4)
    axes = figure.subplots()
    for number, (name, of_model) in enumerate(slices.items()):
        distances, losses = of_model.distances.numpy(), of_model.losses.numpy()
        rises = losses - losses[:, losses.shape[1] // 2, None]
        mean, spread, color = rises.mean(0), rises.std(0), f"C{number}"
        axes.plot(distances, mean, color, label=f"{name}: {of_model.sharpness:.3g}")
        axes.fill_between(distances, mean - spread, mean + spread, color=color, alpha=0.2)
    axes.set(title="Rise of the loss", xlabel="distance / length of the weights")
    axes.legend(title="sharpness", fontsize="small")
    return figure


def _figure(height: float) -> Figure:
    """As narrow as a phone's screen shows it readably."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting needs matplotlib: pip install 'mmpareto-optim[plot]'", name="matplotlib"
        ) from error
    return Figure(figsize=(5.5, height), layout="constrained")


def _plot_block(cosine: Axes, rate: Axes, ratio: Axes, block: BlockHistory, color: str) -> None:
    stats, name = block.stats(), f"{block.block:.24}"
    steps = _part_means(torch.tensor([step.step for step in block.steps], device="cpu"))
    cosines, losses = stats.cosines, stats.objectives
    means = cosines.nanmean(0).nan_to_num(1.0).tolist()
    worst = sorted(combinations(range(len(losses)), 2), key=lambda pair: means[pair[0]][pair[1]])
    for (i, j), style in zip(worst, LINE_STYLES, strict=False):
        pair = f"{losses[i]}+{losses[j]}"
        label = name if pair == block.block else f"{name}: {pair:.24}"
        cosine.plot(steps, _part_means(cosines[:, i, j]), color, ls=style, label=label)
    rate.plot(steps, _part_means(100 * stats.conflict), color)
    rate.plot(steps, _part_means(100 * stats.harmful), color, ls="--")
    ratio.plot(steps, np.exp(_part_means(block.norm_ratios().log())), color)


def _part_means(values: Tensor) -> NDArray[np.float64]:
    """Means over equal parts of the steps, without NaN (beside a zero gradient)."""
    parts = values.double().tensor_split(min(PARTS, len(values)))
    return np.array([float(part.nanmean()) for part in parts])
