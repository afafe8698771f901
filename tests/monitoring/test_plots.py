"""Pictures of what was recorded, and of lines through a minimum."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmpareto_optim import (
    ConflictRecorder,
    LossSlices,
    MMParetoOptimizer,
    plot_conflict,
    plot_slices,
)
from tests.models import vectors_as_losses
from tests.monitoring.helpers import Seen, recorded_training, seen


def heights(line: Any) -> list[float]:
    values: list[float] = np.asarray(line.get_ydata()).tolist()
    return values


def part_means(values: list[float]) -> list[float]:
    return [float(np.mean(part)) for part in np.array_split(values, 20)]


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = recorded_training(steps=50)
    figure = plot_conflict(recorder)
    cosine, rate, ratio = figure.axes
    audio = [row for row in recorder.rows() if row["block"] == "mm+audio"]
    place = [line.get_label() for line in cosine.lines].index("mm+audio")
    line = cosine.lines[place]
    assert np.asarray(line.get_xdata()).tolist() == part_means([row["step"] for row in audio])
    assert heights(line) == pytest.approx(part_means([row["cosine"] for row in audio]))
    for column, rates in zip(("conflict", "harmful"), rate.lines[2 * place :], strict=False):
        expected = part_means([100 * row[column] for row in audio])
        assert heights(rates) == pytest.approx(expected)
    logarithms = [abs(math.log(row["norm/mm"] / row["norm/audio"])) for row in audio]
    assert np.log(heights(ratio.lines[place])) == pytest.approx(part_means(logarithms), rel=1e-3)
    figure.savefig(tmp_path / "conflict.png")
    assert (tmp_path / "conflict.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_three_losses_and_beside_a_zero_gradient() -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    param = nn.Parameter(torch.zeros(2))
    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=0.1))
    recorder = ConflictRecorder()
    for step in range(100):
        gradients = torch.randn(3, 2)
        gradients[2] *= step != 50
        opt.step(losses=vectors_as_losses(param, gradients))
        recorder.record(opt)
    assert math.isnan(recorder.rows()[50]["cosine"])
    cosine, rate, ratio = plot_conflict(recorder).axes
    labels = [line.get_label() for line in cosine.lines]
    assert "loss0+loss1+loss2: loss1+loss2" in labels
    assert len(labels) == 4  # and zero
    for axes in (cosine, rate, ratio):
        assert all(math.isfinite(value) for line in axes.lines for value in heights(line))


def test_picture_of_many_losses() -> None:
    """The three pairs that are lowest on average."""
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = ConflictRecorder()
    for _ in range(40):
        recorder.record(seen("shared", tuple(f"loss{i}" for i in range(8))))
    rows = recorder.rows()
    pairs = [column for column in rows[0] if column.startswith("cosine/")]
    worst = sorted(pairs, key=lambda pair: float(np.mean([row[pair] for row in rows])))
    labels = [line.get_label() for line in plot_conflict(recorder).axes[0].lines]
    assert labels[:3] == [f"shared: {pair.removeprefix('cosine/')}" for pair in worst[:3]]
    assert len(labels) == 4  # and zero


def test_zero_gradients_do_not_count_in_the_rates() -> None:
    """As in the summary: a loss times zero is a loss left out."""
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = ConflictRecorder()
    for step in range(40):
        stats = seen("a+b", ("a", "b")).stats["a+b"]
        stats.gram.copy_(torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))
        if step % 2:
            stats.gram[1], stats.gram[:, 1] = 0, 0
        recorder.record(Seen(**{"a+b": stats}))
    _, rate, _ = plot_conflict(recorder).axes
    assert [heights(line) for line in rate.lines] == [[100] * 20] * 2


def test_picture_of_many_blocks() -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = ConflictRecorder()
    for _ in range(20):
        blocks = [seen(f"mm+{i}", ("mm", str(i))).stats for i in range(9)]
        recorder.record(Seen(**{name: stats for of in blocks for name, stats in of.items()}))
    rows, figure = recorder.rows(), plot_conflict(recorder)
    rates = {
        f"mm+{i}": sum(row["conflict"] for row in rows if row["block"] == f"mm+{i}")
        for i in range(9)
    }
    labels = [str(line.get_label()) for line in figure.axes[0].lines if len(heights(line)) == 20]
    assert len(labels) == 6
    assert sorted(rates[label] for label in labels) == sorted(rates.values())[3:]
    assert "6 of 9 blocks" in figure.get_suptitle()


@pytest.mark.parametrize("blocks", [1, 3, 12])
def test_the_legend_covers_nothing(blocks: int) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = ConflictRecorder()
    for _ in range(20):
        of = {f"block{i}": seen(f"block{i}", ("a", "b", "c")).stats for i in range(blocks)}
        recorder.record(Seen(**{name: stats[name] for name, stats in of.items()}))
    figure = plot_conflict(recorder)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == 3 * min(blocks, 6)
    assert figure.bbox.contains(box.x0, box.y0)
    assert figure.bbox.contains(box.x1, box.y1)
    for axes in figure.axes:
        assert not box.overlaps(axes.get_window_extent())
        assert not box.overlaps(axes.xaxis.label.get_window_extent())
        assert axes.get_window_extent().height > figure.dpi * 1.7  # curves keep their room


def test_picture_of_a_training_that_diverges() -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = ConflictRecorder()
    for step in range(40):
        source = seen("a+b", ("a", "b"))
        if step >= 20:
            source.stats["a+b"].gram.fill_(math.nan)
        recorder.record(source)
    _, rate, _ = plot_conflict(recorder).axes
    assert heights(rate.lines[0]) == [100 * row["conflict"] for row in recorder.rows()[:20]]


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded_training(steps=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"mmpareto-optim\[plot\]"):
        plot_conflict(recorder)


def test_picture_of_slices(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    distances = torch.tensor([-1.0, 0.0, 1.0])
    sharp = LossSlices(distances, torch.tensor([[5.0, 1.0, 7.0], [3.0, 1.0, 3.0]]))
    figure = plot_slices({"sharp": sharp, "flat": LossSlices(distances, torch.zeros(2, 3))})
    (axes,) = figure.axes
    assert [np.asarray(line.get_ydata()).tolist() for line in axes.lines] == [[3, 0, 4], [0, 0, 0]]
    assert axes.lines[0].get_label() == "sharp: 3.5"
    figure.savefig(tmp_path / "slices.png")
    with pytest.raises(ValueError, match="no slices"):
        plot_slices({})
