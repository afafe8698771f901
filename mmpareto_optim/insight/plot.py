"""Pictures of what was recorded; needs the ``plot`` extra (matplotlib)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmpareto_optim.insight.flatness import LossSlices
from mmpareto_optim.insight.recorder import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = NDArray[np.float64]

STYLES = ("-", "--", ":", "-.")
PARTS = 20


def plot_conflict(rows: Iterable[Row]) -> Figure:
    """Cosine over steps, conflict rate by epoch, and norm of the first objective over the others'.

    Curves of a step each are moving means over a fiftieth of the steps. Without epochs the
    conflict rate is that of twenty equal parts of the training.

    Args:
        rows: those of :meth:`ConflictRecorder.rows`, in their order.

    Returns:
        A ``matplotlib.figure.Figure`` that no window shows; its ``savefig`` writes it to a file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no rows.
    """
    blocks: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row["block"], row["objectives"]), []).append(row)
    if not blocks:
        raise ValueError("no rows: record at least one step in which two losses meet")
    by_epoch = all(row["epoch"] is not None for table in blocks.values() for row in table)
    figure = _figure(3)
    cosine, rate, ratio = figure.subplots(1, 3)
    for number, ((block, _), table) in enumerate(blocks.items()):
        _plot_block(cosine, ratio, block, table, f"C{number}")
        _plot_rate(rate, block, table, f"C{number}", by_epoch=by_epoch)
    cosine.axhline(0, color="black", linewidth=0.8)
    cosine.set(title="Cosine between gradients", xlabel="step")
    rate.set(title="Steps in conflict (cos < 0)", ylabel="%", ylim=(0, 100))
    rate.set_xlabel("epoch" if by_epoch else "step")
    rate.locator_params(axis="x", integer=True)
    ratio.axhline(1, color="black", linewidth=0.8)
    ratio.set(title="Ratio of the gradients' norms", xlabel="step", yscale="log")
    for axes in (cosine, rate, ratio):
        axes.legend(fontsize="small")
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


def _plot_block(cosine: Axes, ratio: Axes, block: str, rows: list[Row], colour: str) -> None:
    steps = _column(rows, "step")
    pairs = [column for column in rows[0] if column.startswith("cosine/")]
    for column, style in zip(pairs, cycle(STYLES), strict=False):
        pair = column.removeprefix("cosine/")
        label = block if len(pairs) == 1 else f"{block}: {pair}"
        curve = _moving_mean(_column(rows, column))
        cosine.plot(_moving_mean(steps), curve, color=colour, linestyle=style, label=label)
    first, *others = [column for column in rows[0] if column.startswith("norm/")]
    for column, style in zip(others, cycle(STYLES), strict=False):
        names = first.removeprefix("norm/"), column.removeprefix("norm/")
        label = " / ".join(names) if "+".join(names) == block else f"{block}: {' / '.join(names)}"
        with np.errstate(divide="ignore", invalid="ignore"):
            logarithm = np.log(_column(rows, first) / _column(rows, column))
        curve = np.exp(_moving_mean(logarithm))
        ratio.plot(_moving_mean(steps), curve, color=colour, linestyle=style, label=label)


def _plot_rate(axes: Axes, block: str, rows: list[Row], colour: str, *, by_epoch: bool) -> None:
    conflict = _column(rows, "conflict")
    if by_epoch:
        epochs = _column(rows, "epoch")
        places = np.unique(epochs)
        rates = [conflict[epochs == epoch].mean() for epoch in places]
    else:
        parts = np.array_split(np.arange(len(rows)), min(PARTS, len(rows)))
        steps = _column(rows, "step")
        places = np.array([steps[part].mean() for part in parts])
        rates = [conflict[part].mean() for part in parts]
    axes.plot(places, 100 * np.array(rates), color=colour, marker=".", label=block)


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
