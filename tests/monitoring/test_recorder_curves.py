"""What was recorded, as curves for a writer and as a picture."""

import math
import posixpath
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmpareto_optim import BlockStats, ConflictRecorder, MMParetoOptimizer, plot_conflict
from tests.models import LateFusion, audio_visual_batch, vectors_as_losses
from tests.monitoring.test_recorder import Writer, optimizer_of, recorded_training


class Seen:
    """Something that has stats."""

    def __init__(self, **stats: BlockStats) -> None:
        self.stats = stats


def seen(block: str, names: tuple[str, ...]) -> Seen:
    gradients = torch.randn(len(names), 3, dtype=torch.float64)
    stats = BlockStats(names, gradients @ gradients.T, torch.ones(len(names)).double())
    return Seen(**{block: stats})


def test_curves_are_written_once() -> None:
    model = LateFusion()
    opt = optimizer_of(model)
    recorder, writer = ConflictRecorder(), Writer()
    for _ in range(3):
        for _ in range(2):
            opt.step(losses=model.losses(audio_visual_batch()))
            recorder.record(opt)
        recorder.write_scalars(writer)
    recorder.write_scalars(writer)
    cosines = [(value, step) for tag, value, step in writer.points if tag == "mm-audio/cosine"]
    rows = [row for row in recorder.rows() if row["block"] == "mm+audio"]
    assert cosines == [(row["cosine"], row["step"]) for row in rows]
    assert [step for _, step in cosines] == list(range(6))
    assert {tag for tag, _, _ in writer.points} == {
        f"mm-{name}/{column}"
        for name in ("audio", "visual")
        for column in (
            *("conflict", "harmful", "cosine", "scale"),
            *("norm/mm", f"norm/{name}", "coefficient/mm", f"coefficient/{name}"),
        )
    }


def test_each_writer_gets_everything_once() -> None:
    recorder, one, other, late = ConflictRecorder(), Writer(), Writer(), Writer()
    for _ in range(3):
        recorder.record(seen("a+b", ("a", "b")))
        recorder.write_scalars(one)
        recorder.write_scalars(other)
    recorder.write_scalars(late)
    assert one.points == other.points == late.points
    assert len(one.points) == 3 * 8


def test_what_was_written_is_not_written_again_after_an_interruption() -> None:
    recorder, before, after = ConflictRecorder(), Writer(), Writer()
    resumed = ConflictRecorder()
    for step in range(4):
        recorder.record(seen("a+b", ("a", "b")))
        if step == 1:
            recorder.write_scalars(before)
    resumed.load_state_dict(recorder.state_dict())
    resumed.write_scalars(after)
    assert [step for _, _, step in after.points] == [2] * 8 + [3] * 8


class Fragile(Writer):
    """A writer that fails now and then, before it has written."""

    def __init__(self, fails_at: set[int]) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.calls = 0

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.calls += 1
        if self.calls in self.fails_at:
            raise OSError("disk full")
        super().add_scalar(tag, scalar_value, global_step)


@given(fails_at=st.sets(st.integers(1, 60), max_size=6), more=st.booleans())
def test_a_writer_that_fails_gets_no_point_twice(fails_at: set[int], more: bool) -> None:
    recorder, writer, reliable = ConflictRecorder(), Fragile(fails_at), Writer()
    for step in range(6):
        recorder.record(seen("a+b", ("a", "b")))
        if step == 2 or more:
            try:
                recorder.write_scalars(writer)
            except OSError:
                recorder.record(seen("a+c", ("a", "c")))
    for _ in range(len(fails_at) + 1):
        with suppress(OSError):
            recorder.write_scalars(writer)
    again = ConflictRecorder()
    again.load_state_dict(recorder.state_dict() | {"written": (0, 0)})
    again.write_scalars(reliable)
    assert writer.points == reliable.points


# What mlflow.utils.validation asks of a metric's name, on every system.
MLFLOW = re.compile(r"[/\w.\- ]*")


@given(
    st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=4, unique=True),
    st.lists(st.text("ab+/.:%", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
)
def test_tags_are_of_the_kind_that_mlflow_takes(losses: list[str], blocks: list[str]) -> None:
    recorder, writer = ConflictRecorder(), Writer()
    for block in blocks:
        recorder.record(seen(block, tuple(losses)))
    recorder.write_scalars(writer)
    tags = [tag for tag, _, _ in writer.points]
    assert all(MLFLOW.fullmatch(tag) and posixpath.normpath(tag) == tag for tag in tags)
    assert not any(tag.startswith(("/", "..")) for tag in tags)
    # No two curves under one name.
    assert len(set(tags)) == len(tags) == len(blocks) * (4 + 2 * len(losses))


def test_names_stay_readable() -> None:
    recorder, writer = ConflictRecorder(), Writer()
    for block in ("mm+audio", "mm-audio"):
        recorder.record(seen(block, ("loss mm", "audio:1")))
    recorder.write_scalars(writer)
    tags = {tag for tag, _, _ in writer.points}
    assert {"mm-audio/norm/loss mm", "mm-audio_2/norm/audio_1"} <= tags


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    recorder = recorded_training(steps=3)
    with SummaryWriter(str(tmp_path)) as writer:
        recorder.write_scalars(writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("mm-audio/cosine")]
    rows = [row for row in recorder.rows() if row["block"] == "mm+audio"]
    assert found == [(row["step"], pytest.approx(row["cosine"], rel=1e-6)) for row in rows]


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


def test_picture_of_many_objectives_without_epochs_and_beside_a_zero_gradient() -> None:
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
