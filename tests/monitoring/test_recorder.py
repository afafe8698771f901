"""What was recorded over a training, as a table."""

import copy
import csv
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmpareto_optim import (
    BlockStats,
    ConflictRecorder,
    GradientIntegrator,
    MMParetoOptimizer,
    plot_conflict,
)
from mmpareto_optim.monitoring.history import PACK_SIZE
from mmpareto_optim.monitoring.recorder import Row
from tests.models import LateFusion, audio_visual_batch, vectors_as_losses
from tests.monitoring.helpers import Seen, Writer, optimizer_of, recorded_training, seen


def expected_rows(
    opt: MMParetoOptimizer | GradientIntegrator, step: int, epoch: int | None
) -> list[Row]:
    """The rows of one step from the stats themselves, number by number."""
    rows = []
    for block, stats in opt.stats.items():
        row: Row = {"step": step, "epoch": epoch, "block": block}
        row["objectives"] = "+".join(stats.objectives)
        row["conflict"] = bool(stats.conflict)
        row["harmful"] = bool((stats.gram.sum(1) < 0).any())
        row["cosine"] = float(stats.cosine)
        row["scale"] = float(stats.scale.mean())
        row["min_norm"] = float(stats.min_norm)
        row["alignment"] = float(stats.alignment)
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
    monkeypatch.setattr("mmpareto_optim.monitoring.history.PACK_SIZE", 16)
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


def test_three_losses_have_three_cosines() -> None:
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


def test_a_block_whose_losses_change() -> None:
    """Modalities that a batch lacks, and a gamma that is changed on the way."""
    model = LateFusion()
    opt = optimizer_of(model, param_groups_by_modality={"audio": model.audio})
    recorder = ConflictRecorder()
    expected = []
    for step, names in enumerate((("mm", "audio"), ("mm",), ("mm", "audio"))):
        losses = model.losses(audio_visual_batch())
        opt.gamma = 1.0 + (step == 2)
        opt.step(losses={name: losses[name] for name in names})
        recorder.record(opt)
        expected += expected_rows(opt, step, None)
    rows = recorder.rows()
    assert_same_rows(rows, expected)
    assert [row["objectives"] for row in rows] == ["mm+audio"] * 2


def test_the_same_losses_in_another_order_are_the_same_block() -> None:
    model, batch = LateFusion(), audio_visual_batch()
    opt = optimizer_of(model, param_groups_by_modality={"audio": model.audio})
    recorder = ConflictRecorder()
    for names in (("mm", "audio"), ("audio", "mm")):
        losses = model.losses(batch)
        opt.zero_grad()
        opt.backward({name: losses[name] for name in names})
        recorder.record(opt)
    one, other = recorder.rows()
    assert (one["objectives"], other["objectives"]) == ("mm+audio", "mm+audio")
    for column in ("norm/mm", "norm/audio", "coefficient/mm", "cosine"):
        assert other[column] == pytest.approx(one[column], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_that_moves_between_devices() -> None:
    recorder = ConflictRecorder()
    for device in ("cpu", "cuda"):
        stats = seen("a+b", ("a", "b")).stats["a+b"]
        moved = BlockStats(stats.objectives, stats.gram.to(device), stats.coefficients.to(device))
        recorder.record(Seen(**{"a+b": moved}))
    assert [row["step"] for row in recorder.rows()] == [0, 1]


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
    for _ in range(PACK_SIZE + 1):
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
        for _ in range(PACK_SIZE + 1):
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
    with pytest.raises(ValueError, match="no steps"):
        plot_conflict(recorder)


def test_a_table_for_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    recorder = recorded_training(steps=3)
    frame = pandas.DataFrame(recorder.rows())
    assert frame["cosine"].dtype == float
    assert frame.groupby("block")["conflict"].mean().between(0, 1).all()
    assert frame["norm/visual"].isna().sum() == 3


def test_the_base_instead_of_the_wrapper() -> None:
    opt = optimizer_of(LateFusion())
    with pytest.raises(TypeError, match=r"MMParetoOptimizer.*SGD.*wrapper"):
        ConflictRecorder().record(opt.optimizer)  # type: ignore[arg-type]


@pytest.mark.parametrize("stats", [None, []])
def test_other_stats(stats: Any) -> None:
    class Other:
        pass

    source: Any = Other()
    source.stats = stats
    recorder = ConflictRecorder()
    with pytest.raises(TypeError, match="GradientIntegrator, got Other"):
        recorder.record(source)
    assert recorder.step == 0


def test_an_integrator() -> None:
    model = LateFusion()
    integrator = GradientIntegrator(model.parameters())
    recorder = ConflictRecorder()
    expected = []
    for step in range(3):
        integrator.zero_grad()
        integrator.backward(model.losses(audio_visual_batch()))
        recorder.record(integrator)
        expected += expected_rows(integrator, step, None)
    assert_same_rows(recorder.rows(), expected)


@pytest.mark.parametrize("rescale", ["encoder", "tensor"])
def test_a_training_that_is_interrupted(rescale: str, tmp_path: Path) -> None:
    """What was recorded is saved and loaded, and goes on as if nothing had been."""
    model = LateFusion()
    opt = optimizer_of(model, rescale=rescale)
    whole, part = ConflictRecorder(), ConflictRecorder()
    for step in range(8):
        if step == 4:
            torch.save(part.state_dict(), tmp_path / "recorder.pt")
            part.record(opt)  # lost
            part = ConflictRecorder()
            part.load_state_dict(torch.load(tmp_path / "recorder.pt", weights_only=True))
        opt.zero_grad()
        opt.step(losses=model.losses(audio_visual_batch()))
        for recorder in (whole, part):
            recorder.epoch = step // 3
            recorder.record(opt)
    assert part.rows() == whole.rows()
    assert part.step == whole.step == 8
    assert str(part.summary()) == str(whole.summary())


def test_a_recorder_is_copied_and_pickled() -> None:
    recorder = recorded_training(steps=2)
    recorder.write_scalars(Writer())
    for other in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
        assert other.rows() == recorder.rows()
        assert (other.step, other.epoch) == (2, 0)


def test_a_state_is_no_view() -> None:
    model = LateFusion()
    opt = optimizer_of(model)
    recorder, other = ConflictRecorder(), ConflictRecorder()
    opt.step(losses=model.losses(audio_visual_batch()))
    recorder.record(opt)
    state, before = recorder.state_dict(), recorder.rows()
    other.load_state_dict(state)
    state["histories"][0]["table"].zero_()
    other.record(opt)
    assert recorder.rows() == before
    assert other.rows()[: len(before)] == before
    assert len(recorder.state_dict()["histories"][0]["steps"]) == 1


def test_an_empty_recorder_is_saved_too(tmp_path: Path) -> None:
    torch.save(ConflictRecorder().state_dict(), tmp_path / "recorder.pt")
    recorder = recorded_training(steps=2)
    recorder.load_state_dict(torch.load(tmp_path / "recorder.pt", weights_only=True))
    assert recorder.rows() == []
    assert recorder.step == 0
