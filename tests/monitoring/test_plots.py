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


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    rows = recorded_training(steps=40).rows()
    figure = plot_conflict(rows)
    cosine, rate, ratio = figure.axes
    audio = [row for row in rows if row["block"] == "mm+audio"]
    lines = {line.get_label(): line for line in cosine.lines}
    # Forty steps are too few to smooth.
    assert heights(lines["mm+audio"]) == pytest.approx([row["cosine"] for row in audio])
    by_epoch = [[row["conflict"] for row in audio if row["epoch"] == epoch] for epoch in range(4)]
    expected = [100 * sum(flags) / len(flags) for flags in by_epoch]
    assert heights(rate.lines[0]) == pytest.approx(expected)
    by_epoch = [[row["harmful"] for row in audio if row["epoch"] == epoch] for epoch in range(4)]
    expected = [100 * sum(flags) / len(flags) for flags in by_epoch]
    assert heights(rate.lines[1]) == pytest.approx(expected)
    assert [line.get_label() for line in rate.lines[:2]] == [
        "mm+audio: conflict",
        "mm+audio: harmful",
    ]
    assert rate.get_xlabel() == "epoch"
    ratios = [row["norm/mm"] / row["norm/audio"] for row in audio]
    assert heights(ratio.lines[0]) == pytest.approx(ratios)
    figure.savefig(tmp_path / "conflict.png")
    assert (tmp_path / "conflict.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_many_losses_without_epochs_and_beside_a_zero_gradient() -> None:
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
    cosine, rate, ratio = plot_conflict(recorder.rows()).axes
    labels = [line.get_label() for line in cosine.lines]
    assert "loss0+loss1+loss2: loss1+loss2" in labels
    assert len(labels) == 4
    assert all(math.isfinite(value) for line in cosine.lines for value in heights(line))
    assert rate.get_xlabel() == "step"
    assert len(heights(rate.lines[0])) == 20
    assert ratio.lines[0].get_label() == "loss0+loss1+loss2: loss0 / loss1"


@pytest.mark.parametrize("losses", [5, 20])
def test_picture_of_many_losses(losses: int) -> None:
    """The worst few, and a band that holds the others."""
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    names = tuple(f"loss{i}" for i in range(losses))
    recorder = ConflictRecorder()
    for _ in range(40):  # too few to smooth
        recorder.record(seen("shared", names))
    rows = recorder.rows()
    cosine, rate, ratio = plot_conflict(recorder).axes
    pairs = {
        column.removeprefix("cosine/"): np.array([row[column] for row in rows])
        for column in rows[0]
        if column.startswith("cosine/")
    }
    worst = sorted(pairs, key=lambda pair: float(pairs[pair].mean()))
    lines = {line.get_label(): line for line in cosine.lines}
    assert [f"shared: {pair}" for pair in worst[:3]] == list(lines)[:3]
    assert len(lines) == 4  # and zero
    assert heights(lines[f"shared: {worst[0]}"]) == pytest.approx(pairs[worst[0]].tolist())
    (band,) = cosine.collections
    others = np.array([pairs[pair] for pair in worst[3:]])
    corners = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert corners.min() == pytest.approx(others.min())
    assert corners.max() == pytest.approx(others.max())
    assert len(rate.lines) == 2
    assert (len(ratio.lines), len(ratio.collections)) == ((4, 1) if losses > 7 else (5, 0))


def test_zero_gradients_do_not_count_in_the_rates() -> None:
    """As in the summary: a loss times zero is a loss left out."""
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = ConflictRecorder()
    for step in range(40):
        recorder.epoch = step // 20
        stats = seen("a+b", ("a", "b")).stats["a+b"]
        stats.gram.copy_(torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))
        if step % 2:
            stats.gram[1], stats.gram[:, 1] = 0, 0
        recorder.record(Seen(**{"a+b": stats}))
    _, rate, _ = plot_conflict(recorder).axes
    assert [heights(line) for line in rate.lines] == [[100, 100]] * 2


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
def test_legends_cover_nothing(blocks: int) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = ConflictRecorder()
    for _ in range(20):
        of = {f"block{i}": seen(f"block{i}", ("a", "b", "c")).stats for i in range(blocks)}
        recorder.record(Seen(**{name: stats[name] for name, stats in of.items()}))
    figure = plot_conflict(recorder)
    figure.draw_without_rendering()
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is not None
        box = legend.get_window_extent()
        assert not any(box.overlaps(other.get_window_extent()) for other in figure.axes)
        assert not box.overlaps(axes.xaxis.label.get_window_extent())
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
        assert axes.get_window_extent().height > figure.dpi * 2.5  # curves keep their room


@pytest.mark.parametrize("epochs", [False, True])
@pytest.mark.parametrize("diverges_at", [0, 20])
def test_picture_of_a_training_that_diverges(diverges_at: int, epochs: bool) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = ConflictRecorder()
    for step in range(40):
        recorder.epoch = step // 10 if epochs else None
        source = seen("a+b", ("a", "b"))
        if step >= diverges_at:
            source.stats["a+b"].gram.fill_(math.nan)
        recorder.record(source)
    _, rate, _ = plot_conflict(recorder).axes
    flags = [row["conflict"] for row in recorder.rows()[:diverges_at]]
    expected = [100 * sum(flags[i : i + 10]) / 10 for i in range(0, diverges_at, 10)]
    assert heights(rate.lines[0]) == pytest.approx(expected if epochs else [100 * f for f in flags])


def test_the_recorder_and_its_rows_give_one_picture() -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    recorder = recorded_training(steps=40)
    for one, other in zip(
        plot_conflict(recorder).axes, plot_conflict(recorder.rows()).axes, strict=True
    ):
        assert [line.get_label() for line in one.lines] == [x.get_label() for x in other.lines]
        for line, same in zip(one.lines, other.lines, strict=True):
            assert heights(line) == heights(same)


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = recorded_training(steps=1).rows()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"mmpareto-optim\[plot\]"):
        plot_conflict(rows)


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
