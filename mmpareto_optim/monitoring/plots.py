"""Pictures of what was recorded; needs the ``plot`` extra (matplotlib)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmpareto_optim.monitoring.flatness import LossSlices
from mmpareto_optim.monitoring.recorder import ConflictRecorder, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = NDArray[np.float64]
Style = tuple[str, str]  # color and line style

LINE_STYLES = ("-", "--", ":", "-.")
RATE_POINTS = 20
MAX_CURVES = 6  # blocks, and curves of a block, up to which each is drawn
WORST_CURVES = 3  # that are drawn of more
LEGEND_LINE = 0.18  # inches that an entry of a legend is high
BELOW_AXES = 0.5  # inches that ticks and a label take below the axes


def plot_conflict(recorded: ConflictRecorder | Iterable[Row]) -> Figure:
    """Cosines over steps, rates of conflict and harm, and norm of the first loss over the others'.

    Cosines and ratios are moving means over a fiftieth of the steps. Without epochs the rates are
    those of twenty equal parts of the training. They leave out steps whose gradients are not
    finite, or of which fewer than two are not zero. Of more than six pairs of losses, or ratios,
    of a block the three that are lowest or farthest from 1 on average are drawn, and a band from
    the lowest to the highest of the others; of more than six blocks those most often in conflict.

    Args:
        recorded: a recorder, or the rows of :meth:`ConflictRecorder.rows` in their order, which
            take longer with tens of losses.

    Returns:
        A figure that no window shows; its ``savefig`` writes it to a file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no rows.
    """
    blocks: dict[tuple[str, str], list[Row]] = {}
    rows = recorded.rows_to_plot() if isinstance(recorded, ConflictRecorder) else recorded
    for row in rows:
        blocks.setdefault((row["block"], row["objectives"]), []).append(row)
    if not blocks:
        raise ValueError("no rows: record at least one step in which two losses meet")
    by_epoch = all(row["epoch"] is not None for table in blocks.values() for row in table)
    figure = _figure(3)
    cosine, rate, ratio = figure.subplots(1, 3)
    by_conflict = sorted(blocks, key=lambda key: -_column(blocks[key], "conflict").mean())
    shown = [key for key in blocks if key in by_conflict[:MAX_CURVES]]
    if len(shown) < len(blocks):
        figure.suptitle(f"The {len(shown)} of {len(blocks)} blocks most often in conflict")
    for number, key in enumerate(shown):
        block, rows, styles = key[0], blocks[key], _styles(number, len(blocks))
        _plot_cosines(cosine, block, rows, styles)
        _plot_rates(rate, block, rows, styles[0][0], by_epoch=by_epoch)
        _plot_ratios(ratio, block, rows, styles)
    cosine.axhline(0, color="black", linewidth=0.8)
    cosine.set(title="Cosine between gradients", xlabel="step")
    rate.set(title="Steps in conflict, and harmful", ylabel="%", ylim=(-3, 103))
    rate.set_xlabel("epoch" if by_epoch else "step")
    rate.locator_params(axis="x", integer=True)
    ratio.axhline(1, color="black", linewidth=0.8)
    ratio.set(title="Ratio of the gradients' norms", xlabel="step", yscale="log")
    _legends_below(figure)
    return figure


def plot_slices(slices: Mapping[str, LossSlices]) -> Figure:
    """Rise of the loss along random lines: mean and standard deviation over the directions.

    Args:
        slices: what :func:`loss_slices` gave, by the name of a method or of a model.
    """
    if not slices:
        raise ValueError("no slices: give at least one")
    figure = _figure(1)
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


def _figure(panels: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting needs matplotlib: pip install 'mmpareto-optim[plot]'", name="matplotlib"
        ) from error
    return Figure(figsize=(13 / 3 * panels, 4), layout="constrained")


def _legends_below(figure: Figure) -> None:
    """A legend under each picture, where it covers no curve, and as much more paper."""
    from matplotlib.transforms import ScaledTranslation

    # In inches: the layout would not settle if it were a part of the height that it looks for.
    down = ScaledTranslation(0, -BELOW_AXES, figure.dpi_scale_trans)
    entries = 0
    for axes in figure.axes:
        legend = axes.legend(
            fontsize="small",
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            bbox_transform=axes.transAxes + down,
            borderaxespad=0,
        )
        entries = max(entries, len(legend.get_texts()))
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * entries)


def _styles(number: int, blocks: int) -> list[Style]:
    """Those of a block's curves: a color each if there is no other block, else a line style."""
    if blocks == 1:
        return [(f"C{index}", "-") for index in range(MAX_CURVES)]
    return [(f"C{number}", style) for style in islice(cycle(LINE_STYLES), MAX_CURVES)]


def _plot_cosines(axes: Axes, block: str, rows: list[Row], styles: list[Style]) -> None:
    curves = [
        (_label(block, pair.removeprefix("cosine/")), _column(rows, pair))
        for pair in rows[0]
        if pair.startswith("cosine/")
    ]
    _plot_curves(axes, rows, curves, _label(block, "other pairs"), styles)


def _plot_ratios(axes: Axes, block: str, rows: list[Row], styles: list[Style]) -> None:
    norms = {c.removeprefix("norm/"): _column(rows, c) for c in rows[0] if c.startswith("norm/")}
    first, *others = norms
    curves = []
    for other in others:
        label = f"{first} / {other}"
        with np.errstate(divide="ignore", invalid="ignore"):
            logarithm = np.log(norms[first] / norms[other])
        curves.append((label if block == f"{first}+{other}" else _label(block, label), logarithm))
    _plot_curves(axes, rows, curves, _label(block, f"{first} / others"), styles, log=True)


def _plot_curves(
    axes: Axes,
    rows: list[Row],
    curves: list[tuple[str, Curve]],
    rest_label: str,
    styles: list[Style],
    *,
    log: bool = False,
) -> None:
    """All curves where they are few; otherwise the worst ones, and where the rest lie."""
    steps = _moving_mean(_column(rows, "step"))
    heights = np.array([_moving_mean(values) for _, values in curves])
    means = np.ma.masked_invalid(heights).mean(1).filled(0.0)
    if log:
        heights, means = np.exp(heights), -np.abs(means)
    shown = np.arange(len(curves))
    if len(curves) > MAX_CURVES:
        shown, rest = np.split(np.argsort(means, kind="stable"), [WORST_CURVES])
        low, high = np.fmin.reduce(heights[rest]), np.fmax.reduce(heights[rest])
        color = styles[0][0]
        axes.fill_between(steps, low, high, label=rest_label, color=color, alpha=0.2, linewidth=0)
    for index, (color, style) in zip(shown, styles, strict=False):
        axes.plot(steps, heights[index], color, linestyle=style, label=curves[index][0])


def _plot_rates(axes: Axes, block: str, rows: list[Row], color: str, *, by_epoch: bool) -> None:
    norms = np.array([_column(rows, column) for column in rows[0] if column.startswith("norm/")])
    counted = np.isfinite(norms).all(0) & ((norms > 0).sum(0) > 1)
    steps = _column(rows, "epoch" if by_epoch else "step")[counted]
    parts = steps if by_epoch else np.arange(len(steps)) * RATE_POINTS // max(1, len(steps))
    groups = [parts == part for part in np.unique(parts)]
    places = [steps[group].mean() for group in groups]
    for column, style in (("conflict", "-"), ("harmful", "--")):
        flags = _column(rows, column)[counted]
        rates = [100 * flags[group].mean() for group in groups]
        label = _label(block, column)
        axes.plot(places, rates, color=color, marker=".", linestyle=style, label=label)


def _label(block: str, name: str) -> str:
    """What a curve is of, short enough to leave room for the picture."""
    names = dict.fromkeys([block, name])
    return ": ".join(name if len(name) <= 24 else f"{name[:21]}..." for name in names)


def _column(rows: list[Row], name: str) -> Curve:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _moving_mean(values: Curve) -> Curve:
    """Over a window of one part in 50, leaving out what is not finite (beside a zero gradient)."""
    kernel = np.ones(max(1, len(values) // 50))
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0), kernel, mode="valid")
    count = np.convolve(finite.astype(np.float64), kernel, mode="valid")
    mean: Curve = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)
    return mean
