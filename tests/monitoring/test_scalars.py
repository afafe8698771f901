"""What was recorded, as curves for a writer."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpareto_optim import ConflictRecorder
from tests.models import LateFusion, audio_visual_batch
from tests.monitoring.helpers import Writer, optimizer_of, recorded_training, seen


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


@dataclass(frozen=True)
class Named:
    """A writer that equals another of the same run, as those of some libraries do."""

    run: str = "run"
    points: list[tuple[str, float, int]] = field(default_factory=list, compare=False)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.points.append((tag, scalar_value, global_step))


def test_writers_that_are_equal_are_two() -> None:
    recorder, one, other = ConflictRecorder(), Named(), Named()
    assert one == other
    for _ in range(2):
        recorder.record(seen("a+b", ("a", "b")))
        recorder.write_scalars(one)
        recorder.write_scalars(other)
    assert one.points == other.points
    assert len(one.points) == 2 * 8


def test_the_writer_that_lags_behind_misses_nothing_after_an_interruption() -> None:
    recorder, often, seldom, resumed = ConflictRecorder(), Writer(), Writer(), ConflictRecorder()
    for step in range(6):
        recorder.record(seen("a+b", ("a", "b")))
        recorder.write_scalars(often)
        if step == 3:
            recorder.write_scalars(seldom)
    resumed.load_state_dict(recorder.state_dict())
    resumed.write_scalars(seldom)
    assert seldom.points == often.points


class Fragile(Writer):
    """A writer that fails at its fifth point."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        super().add_scalar(tag, scalar_value, global_step)
        if len(self.points) == 5:
            raise OSError("disk full")


def test_a_writer_that_fails_gets_all_points_at_the_next_call() -> None:
    recorder, writer, reliable = ConflictRecorder(), Fragile(), Writer()
    for _ in range(3):
        recorder.record(seen("a+b", ("a", "b")))
    with pytest.raises(OSError, match="disk full"):
        recorder.write_scalars(writer)
    recorder.write_scalars(writer)
    recorder.write_scalars(reliable)
    assert writer.points[5:] == reliable.points


# What mlflow.utils.validation asks of a metric's name, on every system.
MLFLOW = re.compile(r"[/\w.\- ]*")


@given(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=4, unique=True))
def test_tags_are_of_the_kind_that_mlflow_takes(losses: list[str]) -> None:
    recorder, writer = ConflictRecorder(), Writer()
    recorder.record(seen("+".join(losses), tuple(losses)))
    recorder.write_scalars(writer)
    assert len(writer.points) == 4 + 2 * len(losses)
    assert all(MLFLOW.fullmatch(tag) for tag, _, _ in writer.points)


def test_names_stay_readable() -> None:
    recorder, writer = ConflictRecorder(), Writer()
    recorder.record(seen("mm+audio", ("loss mm", "audio:1")))
    recorder.write_scalars(writer)
    tags = {tag for tag, _, _ in writer.points}
    assert {"mm-audio/norm/loss mm", "mm-audio/norm/audio_1"} <= tags


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
