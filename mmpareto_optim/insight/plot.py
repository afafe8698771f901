"""Pictures of what was recorded; needs the ``plot`` extra (matplotlib)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmpareto_optim.insight.flatness import LossSlices
from mmpareto_optim.insight.recorder import ConflictRecorder, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = NDArray[np.float64]

STYLES = ("-", "--", ":", "-.")
PARTS = 20
LINES = 6
"""Blocks, and curves of a block, up to which each is drawn."""
WORST = 3
"""Curves that are drawn of more."""

LEGEND_LINE = 0.18
"""Inches that an entry of a legend is high."""
BELOW_AXES = 0.5
"""Inches that ticks and a label take below the axes."""


class Look(NamedTuple):
    """Of a curve."""

    colour: str
    style: str


def plot_conflict(recorded: ConflictRecorder | Iterable[Row]) -> Figure:
    """Cosines over steps, rates of conflict and harm, and norm of the first loss over the others'.

    Curves of a step each are moving means over a fiftieth of the steps. Without epochs the
    rates are those of twenty equal parts of the training. Steps whose gradients are not finite
    are left out. Of more than six curves of a block,
    pairs of losses or ratios, the three that are lowest or farthest from 1 on average are drawn,
    and a band from the lowest to the highest of the others; of more than six blocks those that
    are most often in conflict.

    Args:
        recorded: a recorder, or the rows of :meth:`ConflictRecorder.rows` in their order, which
            take longer with tens of losses.

    Returns:
        A ``matplotlib.figure.Figure`` that no window shows; its ``savefig`` writes it to a file.

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
    shown = _most_in_conflict(blocks)
    if len(shown) < len(blocks):
        figure.suptitle(f"The {len(shown)} of {len(blocks)} blocks most often in conflict")
    for number, ((block, _), table) in enumerate(shown.items()):
        looks = _looks(number, len(blocks))
        _plot_cosines(cosine, block, table, looks)
        _plot_rates(rate, block, table, looks[0].colour, by_epoch=by_epoch)
        _plot_ratios(ratio, block, table, looks)
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

    Returns:
        A ``matplotlib.figure.Figure``, as :func:`plot_conflict`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no slices.
    """
    if not slices:
        raise ValueError("no slices: give at least one")
    figure = _figure(1)
    axes = figure.subplots()
    for number, (name, these) in enumerate(slices.items()):
        distances, losses = these.distances.numpy(), these.losses.numpy()
        rises = losses - losses[:, losses.shape[1] // 2, None]
        middle, spread = rises.mean(0), rises.std(0)
        axes.plot(distances, middle, f"C{number}", label=f"{name}: {these.sharpness:.3g}")
        axes.fill_between(
            distances, middle - spread, middle + spread, color=f"C{number}", alpha=0.2
        )
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


def _most_in_conflict(blocks: dict[tuple[str, str], list[Row]]) -> dict[Any, list[Row]]:
    """In their order, as many blocks as there is room for."""
    order = sorted(blocks, key=lambda key: -_column(blocks[key], "conflict").mean())
    return {key: rows for key, rows in blocks.items() if key in order[:LINES]}


def _plot_cosines(axes: Axes, block: str, rows: list[Row], looks: list[Look]) -> None:
    pairs = [column for column in rows[0] if column.startswith("cosine/")]
    curves = np.array([_moving_mean(_column(rows, column)) for column in pairs])
    labels = [f"{_short(block)}: {_short(column.removeprefix('cosine/'))}" for column in pairs]
    if len(pairs) == 1:
        labels = [block]
    steps = _moving_mean(_column(rows, "step"))
    rest = f"{_short(block)}: other pairs"
    _plot_curves(axes, steps, curves, labels, _mean(curves), rest, looks)


def _plot_ratios(axes: Axes, block: str, rows: list[Row], looks: list[Look]) -> None:
    first, *others = [c.removeprefix("norm/") for c in rows[0] if c.startswith("norm/")]
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = [
            np.log(_column(rows, f"norm/{first}") / _column(rows, f"norm/{other}"))
            for other in others
        ]
    curves = np.array([_moving_mean(logarithm) for logarithm in logarithms])
    labels = [f"{first} / {other}" for other in others]
    if f"{first}+{others[0]}" != block:
        labels = [f"{_short(block)}: {label}" for label in labels]
    steps = _moving_mean(_column(rows, "step"))
    rest = f"{_short(block)}: {first} / others"
    _plot_curves(axes, steps, np.exp(curves), labels, -np.abs(_mean(curves)), rest, looks)


def _plot_curves(
    axes: Axes,
    steps: Curve,
    curves: Curve,
    labels: list[str],
    order: Curve,
    of_rest: str,
    looks: list[Look],
) -> None:
    """All curves where they are few; otherwise the first in some order, and where the rest lie."""
    shown = np.arange(len(curves))
    if len(curves) > LINES:
        shown, rest = np.split(np.argsort(order, kind="stable"), [WORST])
        low, high = np.fmin.reduce(curves[rest]), np.fmax.reduce(curves[rest])
        pale: dict[str, Any] = {"color": looks[0].colour, "alpha": 0.2, "linewidth": 0}
        axes.fill_between(steps, low, high, label=of_rest, **pale)
    for index, look in zip(shown, looks, strict=False):
        axes.plot(steps, curves[index], look.colour, linestyle=look.style, label=labels[index])


def _plot_rates(axes: Axes, block: str, rows: list[Row], colour: str, *, by_epoch: bool) -> None:
    norms = [column for column in rows[0] if column.startswith("norm/")]
    rows = [row for row in rows if all(np.isfinite(row[norm]) for norm in norms)]
    steps = _column(rows, "epoch" if by_epoch else "step")
    if by_epoch:
        places = np.unique(steps)
        parts = [np.flatnonzero(steps == place) for place in places]
    else:
        parts = np.array_split(np.arange(len(rows)), min(PARTS, len(rows))) if rows else []
        places = np.array([steps[part].mean() for part in parts])
    for column, style in (("conflict", "-"), ("harmful", "--")):
        flags = _column(rows, column)
        rates = 100 * np.array([flags[part].mean() for part in parts])
        label = f"{_short(block)}: {column}"
        axes.plot(places, rates, color=colour, marker=".", linestyle=style, label=label)


def _looks(number: int, blocks: int) -> list[Look]:
    """Those of a block's curves: a colour each if there is no other block, otherwise a style."""
    if blocks == 1:
        return [Look(f"C{index}", "-") for index in range(LINES)]
    return [Look(f"C{number}", style) for style in islice(cycle(STYLES), LINES)]


def _mean(curves: Curve) -> Curve:
    """Over the steps of each curve, leaving out what is not finite."""
    finite = np.isfinite(curves)
    count = np.maximum(finite.sum(1), 1)
    mean: Curve = np.where(finite, curves, 0).sum(1) / count
    return mean


def _short(name: str) -> str:
    """A name that leaves room for the picture."""
    return name if len(name) <= 24 else f"{name[:21]}..."


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
