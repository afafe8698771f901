"""The stats of every step of a training, kept on the device until somebody reads them."""

import csv
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mmpareto_optim.insight.phases import summary_of
from mmpareto_optim.insight.summary import Summary
from mmpareto_optim.insight.tags import tags_of
from mmpareto_optim.insight.tracks import (
    Kind,
    Track,
    When,
    columns_of,
    curves_of,
    kind_of,
    plotted_of,
)
from mmpareto_optim.stats import BlockStats

Row = dict[str, Any]
"""One block at one step."""

Columns = Callable[[BlockStats], dict[str, Tensor]]
"""From the stats of all steps to columns of the table."""


class HasStats(Protocol):
    """What is recorded: a :class:`MMParetoOptimizer`, a :class:`GradientIntegrator`."""

    @property
    def stats(self) -> Mapping[str, BlockStats]:
        """What the last integration saw, by block."""


class ScalarWriter(Protocol):
    """What scalars are written to, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Add a number to a curve."""


class ConflictRecorder:
    """Collects ``opt.stats`` step by step, for a summary, a table, TensorBoard or a picture.

    Either one line after each step or a hook, once for the whole training::

        recorder = ConflictRecorder()
        opt.register_step_post_hook(recorder.record)
        for epoch in range(epochs):
            recorder.epoch = epoch
            ...
        print(recorder.summary())

    Recording waits for nothing: a step adds one small copy a block on the block's device.
    Everything else is computed when it is read, for all steps together. A block of ``m``
    objectives takes ``8 * (m * m + m)`` bytes a step, on its device until the next reading
    and on the host from then on: 48 MB for two objectives and a million steps.

    Attributes:
        step: number of the next step to be recorded; set it when a training is resumed without
            this recorder's state.
        epoch: what the rows to come have as their epoch.
    """

    def __init__(self) -> None:
        self.step = 0
        self.epoch: int | None = None
        self._recorded = 0
        self._written = 0  # records whose curves are written
        self._points_written = 0  # numbers of those that come next, where a writer failed
        self._tracks: dict[Kind, Track] = {}
        self._orders: dict[frozenset[str], tuple[str, ...]] = {}

    def record(self, source: HasStats, *_hook_arguments: object) -> None:
        """Add what the last integration saw as one step.

        Call it once a step, whatever the number of micro-batches before it. A step of which
        nothing was integrated anew would repeat what the one before it saw. One that was not
        measured (``measure_every``) is counted and has no rows.

        Args:
            source: the optimizer or integrator, whose ``stats`` are read. What a step hook is
                handed beside it is ignored.

        Raises:
            TypeError: ``source`` has no ``stats``.
        """
        when = When(self._recorded, self.step, self.epoch)
        for block, stats in _stats_of(source).items():
            block, stats = self._in_known_order(block, stats)
            kind = kind_of(block, stats)
            if kind not in self._tracks:
                self._tracks[kind] = Track(kind)
            self._tracks[kind].append(when, stats)
        self._recorded += 1
        self.step += 1

    def summary(self) -> Summary:
        """What was recorded in a few numbers a block, and whether integration can pay there.

        Printed it is a table, with the losses that the sum opposes and a verdict for each block.
        """
        return summary_of(self._tracks.values())

    def rows(self) -> list[Row]:
        """The table, in the order of the steps; ``pandas.DataFrame(recorder.rows())`` takes it.

        Returns:
            For each step and block a dict of ``step``, ``epoch``, ``block``, ``objectives``
            (joined by ``+``), ``conflict``, ``harmful``, ``cosine`` (the smallest), ``min_norm``,
            ``scale`` (with ``rescale="tensor"`` the mean over the tensors); with
            ``measure_noise=True`` ``conflict_across`` and ``harmful_across``, the same of
            ``gram_across``; for each objective ``alpha/NAME``, ``coefficient/NAME`` and
            ``norm/NAME``; for each two of them ``cosine/NAME+NAME``. See :class:`BlockStats` for
            what they are. Norms are those of the losses as given: of losses times the scale of a
            ``GradScaler`` they are that much longer.
        """
        return [_row(*record) for record in self._since(0, columns_of)]

    def rows_to_plot(self) -> list[Row]:
        """:meth:`rows` without ``alpha`` and ``min_norm``, which take long for tens of losses."""
        return [_row(*record) for record in self._since(0, plotted_of)]

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the table; what a block does not have (another's objectives) stays empty."""
        rows = self.rows()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def write_scalars(self, writer: ScalarWriter) -> None:
        """Write what was recorded since the last call as curves, ``BLOCK/COLUMN`` over steps.

        They are what one looks at meanwhile: ``conflict``, ``harmful``, ``cosine``, ``scale``,
        ``coefficient/NAME`` and ``norm/NAME``, and what is ``across`` parts; :meth:`rows` has all.
        Names have ``-`` for ``+`` and ``_`` for what MLflow does not take. Where ``add_scalar``
        raises, the next call goes on with the number that it raised at.

        Args:
            writer: has ``add_scalar``: a ``torch.utils.tensorboard.SummaryWriter``, say.
        """
        for tag, value, step in self._points()[self._points_written :]:
            writer.add_scalar(tag, value, step)
            self._points_written += 1
        self._written, self._points_written = self._recorded, 0

    def state_dict(self) -> dict[str, Any]:
        """All that was recorded: plain values and tensors, for ``torch.save``."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "recorded": self._recorded,
            "written": self._written,
            "points_written": self._points_written,
            "tracks": [track.state_dict() for track in self._tracks.values()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the recorder that gave ``state_dict`` stopped; what is here is dropped."""
        tracks = [Track.of_state(state) for state in state_dict["tracks"]]
        self.step, self.epoch = state_dict["step"], state_dict["epoch"]
        self._recorded = state_dict["recorded"]
        self._written = state_dict["written"]
        self._points_written = state_dict["points_written"]
        self._tracks = {track.kind: track for track in tracks}
        self._orders = {frozenset(kind.objectives): kind.objectives for kind in self._tracks}

    def _in_known_order(self, block: str, stats: BlockStats) -> tuple[str, BlockStats]:
        """The same losses in another order are the same block."""
        given = stats.objectives
        known = self._orders.setdefault(frozenset(given), given)
        if known == given:
            return block, stats
        name = joined(known) if block == joined(given) else block
        return name, stats.in_order(known)

    def _points(self) -> list[tuple[str, float, int]]:
        """Tags, values and steps of what has not been written."""
        blocks = tags_of(kind.block for kind in self._tracks)
        losses = tags_of(str(name) for kind in self._tracks for name in kind.objectives)
        points = []
        for track, when, values in self._since(self._written, curves_of):
            for column, value in values.items():
                of, _, loss = column.partition("/")
                column = f"{of}/{losses[loss]}" if loss else of
                points.append((f"{blocks[track.kind.block]}/{column}", float(value), when.step))
        return points

    def _since(self, first: int, columns: Columns) -> list[tuple[Track, When, dict[str, Any]]]:
        """Records from that number on, in their order."""
        found = [
            record for track in self._tracks.values() for record in _read(track, first, columns)
        ]
        found.sort(key=lambda record: record[1].number)
        return found


def joined(objectives: Sequence[str]) -> str:
    """The name of a block that is found by reach."""
    return "+".join(map(str, objectives))


def _stats_of(source: Any) -> Mapping[str, BlockStats]:
    stats = getattr(source, "stats", None)
    if not isinstance(stats, Mapping) or not all(
        isinstance(value, BlockStats) for value in stats.values()
    ):
        raise TypeError(
            "source must have the stats of an integration, as an MMParetoOptimizer or a "
            f"GradientIntegrator has, got {type(source).__name__}: record the wrapper, not its base"
        )
    return stats


def _read(
    track: Track, first: int, columns: Columns
) -> Iterator[tuple[Track, When, dict[str, Any]]]:
    skipped = bisect_left(track.when, (first,))
    found = columns(track.stats(skipped))
    numbers = zip(*(values.tolist() for values in found.values()), strict=True)
    for when, values in zip(track.when[skipped:], numbers, strict=True):
        yield track, when, dict(zip(found, values, strict=True))


def _row(track: Track, when: When, values: dict[str, Any]) -> Row:
    row = {
        "step": when.step,
        "epoch": when.epoch,
        "block": track.kind.block,
        "objectives": joined(track.kind.objectives),
    }
    return row | values
