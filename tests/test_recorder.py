"""What was recorded over a training, as a table, curves and a picture."""

import csv
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmpareto_optim import ConflictRecorder, MMParetoOptimizer, plot_conflict
from mmpareto_optim.insight.recorder import Row
from mmpareto_optim.insight.tracks import PACK
from tests.models import LateFusion, audio_visual_batch, vectors_as_losses


def optimizer_of(model: nn.Module, **options: Any) -> MMParetoOptimizer:
    return MMParetoOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)


def expected_rows(opt: MMParetoOptimizer, step: int, epoch: int | None) -> list[Row]:
    """The rows of one step from the stats themselves, number by number."""
    rows = []
    for block, stats in opt.stats.items():
        row: Row = {"step": step, "epoch": epoch, "block": block}
        row["objectives"] = "+".join(stats.objectives)
        row["conflict"] = bool(stats.conflict)
        row["harmful"] = bool((stats.gram.sum(1) < 0).any())
        row["cosine"] = float(stats.cosine)
        row["min_norm"] = float(stats.min_norm)
        row["scale"] = float(stats.scale.mean())
        for i, name in enumerate(stats.objectives):
            row[f"alpha/{name}"] = float(stats.alpha[i])
            row[f"coefficient/{name}"] = float(stats.coefficients[i])
            row[f"norm/{name}"] = float(stats.norms[i])
            for j in range(i + 1, len(stats.objectives)):
                product = stats.gram[i, j] / stats.norms[i] / stats.norms[j]
                row[f"cosine/{name}+{stats.objectives[j]}"] = float(product)
        rows.append(row)
    return rows


def assert_same_rows(found: list[Row], expected: list[Row]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for column, value in other.items():
            if isinstance(value, float):
                assert one[column] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), column
            else:
                assert one[column] == value, column


@pytest.mark.parametrize("rescale", ["encoder", "tensor"])
def test_rows_are_the_stats_of_every_step(rescale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpareto_optim.insight.tracks.PACK", 16)
    model = LateFusion()
    opt = optimizer_of(model, rescale=rescale)
    recorder = ConflictRecorder()
    expected = []
    for step in range(39):  # packed twice and not
        recorder.epoch = step // 10
        opt.zero_grad()
        opt.step(losses=model.losses(audio_visual_batch(4)))
        recorder.record(opt)
        expected += expected_rows(opt, step, step // 10)
        if step == 20:
            assert_same_rows(recorder.rows(), expected)
    assert_same_rows(recorder.rows(), expected)
    assert_same_rows(recorder.rows(), expected)
    assert {row["conflict"] for row in expected} == {True, False}


def test_three_objectives_have_three_cosines() -> None:
    param = nn.Parameter(torch.zeros(2))
    opt = MMParetoOptimizer(torch.optim.SGD([param], lr=0.1))
    recorder = ConflictRecorder()
    opt.step(losses=vectors_as_losses(param, torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])))
    recorder.record(opt)
    (row,) = recorder.rows()
    assert row["block"] == row["objectives"] == "loss0+loss1+loss2"
    assert row["epoch"] is None
    assert row["cosine/loss0+loss1"] == 0
    assert row["cosine/loss0+loss2"] == pytest.approx(-(0.5**0.5))
    assert row["cosine/loss1+loss2"] == pytest.approx(0.5**0.5)
    assert row["cosine"] == row["cosine/loss0+loss2"]
    assert row["norm/loss1"] == pytest.approx(2)
    assert_same_rows([row], expected_rows(opt, 0, None))


def test_as_a_hook_one_row_a_step_with_accumulation() -> None:
    model = LateFusion()
    opt = optimizer_of(model)
    recorder = ConflictRecorder()
    handle = opt.register_step_post_hook(recorder.record)
    expected = []
    for step in range(3):
        opt.zero_grad()
        for _ in range(4):
            opt.backward(model.losses(audio_visual_batch()))
        opt.step()
        expected += expected_rows(opt, step, None)
    handle.remove()
    opt.step(losses=model.losses(audio_visual_batch()))
    assert_same_rows(recorder.rows(), expected)


def test_a_resumed_training_counts_on() -> None:
    model = LateFusion()
    opt = optimizer_of(model)
    recorder = ConflictRecorder()
    recorder.step = 1000
    opt.step(losses=model.losses(audio_visual_batch()))
    recorder.record(opt)
    assert [row["step"] for row in recorder.rows()] == [1000, 1000]
    assert recorder.step == 1001


def test_a_block_whose_objectives_change() -> None:
    """Modalities that a batch lacks, and a gamma that is changed on the way."""
    model = LateFusion()
    opt = optimizer_of(model, param_groups_by_modality={"audio": model.audio})
    recorder = ConflictRecorder()
    expected = []
    for step, names in enumerate((("mm", "audio"), ("audio", "mm"), ("mm",), ("mm", "audio"))):
        losses = model.losses(audio_visual_batch())
        opt.gamma = 1.0 + (step == 3)
        opt.step(losses={name: losses[name] for name in names})
        recorder.record(opt)
        expected += expected_rows(opt, step, None)
    rows = recorder.rows()
    assert_same_rows(rows, expected)
    assert [row["objectives"] for row in rows] == ["mm+audio", "audio+mm", "mm+audio"]


def test_a_rule_that_reuses_its_coefficients() -> None:
    model = LateFusion()
    weights = torch.zeros(2)
    opt = optimizer_of(model, integration=lambda gram: weights.add_(1))
    recorder = ConflictRecorder()
    for _ in range(2):
        opt.step(losses={"mm": model.losses(audio_visual_batch())["mm"]} | _audio(model))
        recorder.record(opt)
    assert [row["coefficient/mm"] for row in recorder.rows()] == [1, 2]


def _audio(model: LateFusion) -> dict[str, torch.Tensor]:
    return {"audio": model.losses(audio_visual_batch())["audio"]}


def test_recording_reads_nothing_back() -> None:
    """Meta tensors have no values: whatever asked for one would raise."""
    model = LateFusion().to("meta")
    opt = optimizer_of(model)
    recorder = ConflictRecorder()
    batch = tuple(tensor.to("meta") for tensor in audio_visual_batch())
    opt.step(losses=model.losses(batch))  # type: ignore[arg-type]
    for _ in range(PACK + 1):
        recorder.record(opt)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rescale", ["encoder", "tensor"])
def test_recording_does_not_wait_for_the_gpu(rescale: str) -> None:
    model = LateFusion().cuda()
    opt = optimizer_of(model, rescale=rescale)
    recorder = ConflictRecorder()
    with torch.device("cuda"):
        opt.step(losses=model.losses(audio_visual_batch()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(PACK + 1):
            recorder.record(opt)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_rows(recorder.rows()[:2], expected_rows(opt, 0, None))


def test_training_is_the_same() -> None:
    results = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = LateFusion()
        opt = optimizer_of(model)
        recorder = ConflictRecorder()
        for _ in range(5):
            opt.step(losses=model.losses(audio_visual_batch()))
            if recorded:
                recorder.record(opt)
                recorder.rows()
        results.append([param.detach() for param in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_csv(tmp_path: Path) -> None:
    model = LateFusion()
    opt = optimizer_of(model)
    recorder = ConflictRecorder()
    for _ in range(2):
        opt.step(losses=model.losses(audio_visual_batch()))
        recorder.record(opt)
    recorder.to_csv(tmp_path / "conflict.csv")
    with (tmp_path / "conflict.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    rows = recorder.rows()
    assert len(read) == len(rows) == 4
    for line, row in zip(read, rows, strict=True):
        assert {key for key, value in line.items() if value} == {*row} - {"epoch"}
        assert float(line["cosine"]) == row["cosine"]
        assert line["conflict"] == str(row["conflict"])
    assert read[0]["norm/visual"] == ""
    assert float(read[1]["norm/visual"]) == rows[1]["norm/visual"]


def test_nothing_recorded(tmp_path: Path) -> None:
    model = LateFusion()
    opt = optimizer_of(model)
    recorder = ConflictRecorder()
    assert recorder.rows() == []
    opt.step(losses={"mm": model.losses(audio_visual_batch())["mm"]})
    recorder.record(opt)
    assert recorder.rows() == []
    recorder.to_csv(tmp_path / "conflict.csv")
    with pytest.raises(ValueError, match="no rows"):
        plot_conflict(recorder.rows())


def test_a_table_for_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    recorder = recorded_training(steps=3)
    frame = pandas.DataFrame(recorder.rows())
    assert frame["cosine"].dtype == float
    assert frame.groupby("block")["conflict"].mean().between(0, 1).all()
    assert frame["norm/visual"].isna().sum() == 3


class Curves:
    """A writer that remembers."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.points.append((tag, scalar_value, global_step))


def recorded_training(steps: int) -> ConflictRecorder:
    model = LateFusion()
    opt = optimizer_of(model)
    recorder = ConflictRecorder()
    opt.register_step_post_hook(recorder.record)
    for step in range(steps):
        recorder.epoch = step // 10
        opt.step(losses=model.losses(audio_visual_batch(4)))
    return recorder


def test_curves_are_written_once() -> None:
    model = LateFusion()
    opt = optimizer_of(model)
    recorder, writer = ConflictRecorder(), Curves()
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
    assert {tag for tag, _, _ in writer.points} >= {"mm-visual/norm/visual", "mm-audio/conflict"}


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


def test_the_base_instead_of_the_wrapper() -> None:
    opt = optimizer_of(LateFusion())
    with pytest.raises(TypeError, match=r"MMParetoOptimizer.*SGD.*wrapper"):
        ConflictRecorder().record(opt.optimizer)  # type: ignore[arg-type]


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


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = recorded_training(steps=1).rows()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"mmpareto-optim\[plot\]"):
        plot_conflict(rows)
