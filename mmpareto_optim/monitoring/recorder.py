"""The stats of every step of a training, kept on the device until somebody reads them."""

import csv
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from mmpareto_optim.monitoring.history import BlockHistory, HistoryKey, RecordedStep, columns_of
from mmpareto_optim.monitoring.scalar_tags import scalar_tags
from mmpareto_optim.monitoring.summarize import summarize
from mmpareto_optim.monitoring.summary import Summary
from mmpareto_optim.stats import BlockStats

Row = dict[str, Any]
"""One block at one step."""

# Attributes of the stats that become columns.
ALL_COLUMNS = (
    *("conflict", "harmful", "cosine", "min_norm", "scale"),
    *("alpha", "coefficients", "norms", "cosines"),
)
SCALAR_COLUMNS = ("conflict", "harmful", "cosine", "scale", "coefficients", "norms")
PLOT_COLUMNS = ("conflict", "harmful", "norms", "cosines")


class HasStats(Protocol):
    """A :class:`MMParetoOptimizer`, a :class:`GradientIntegrator`."""

    @property
    def stats(self) -> Mapping[str, BlockStats]:
        """What the last integration saw, by block."""


class ScalarWriter(Protocol):
    """A ``torch.utils.tensorboard.SummaryWriter``, say."""

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

    Recording waits for nothing: a step adds one small copy a block on the block's device, where it
    stays until the next reading. Everything else is computed when it is read, for all steps
    together. A block of ``m`` losses takes ``8 * (m * m + m)`` bytes a step: 48 MB for two losses
    and a million steps.

    Attributes:
        step: number of the next step; to be set where steps are not recorded.
        epoch: what the rows to come have as their epoch.
    """

    def __init__(self) -> None:
        self.step = 0
        self.epoch: int | None = None
        self._recorded = 0
        self._histories: dict[HistoryKey, BlockHistory] = {}
        self._orders: dict[frozenset[str], tuple[str, ...]] = {}
        # Records that a writer has, and points of the next one, where it failed in between.
        self._written: WeakKeyDictionary[ScalarWriter, tuple[int, int]] = WeakKeyDictionary()
        self._last_written = self._written_before = (0, 0)

    def record(self, source: HasStats, *_hook_arguments: object) -> None:
        """Add what the last integration of an optimizer or integrator saw as one step.

        Call it once a step, whatever the number of micro-batches before it, and not where nothing
        was integrated: that would repeat the step before. What else a step hook gets is ignored.
        """
        step = RecordedStep(self._recorded, self.step, self.epoch)
        for block, stats in _stats_of(source).items():
            block, stats = self._in_known_order(block, stats)
            has_stretch, device = stats.stretch is not None, str(stats.gram.device)
            key = HistoryKey(block, stats.objectives, stats.gamma, has_stretch, device)
            self._histories.setdefault(key, BlockHistory(key)).append(step, stats)
        self._recorded += 1
        self.step += 1

    def summary(self) -> Summary:
        """What was recorded in a few numbers a block, and whether integration can pay there.

        Printed it is a table, with the losses that the sum opposes and a verdict for each block.
        """
        return summarize(self._histories.values())

    def rows(self) -> list[Row]:
        """A dict for each step and block, in their order; ``pandas.DataFrame`` takes the list.

        It has ``step``, ``epoch``, ``block``, ``objectives`` (the losses' names joined by ``+``),
        ``conflict``, ``harmful``, ``cosine`` (the smallest), ``min_norm``, ``scale`` (with
        ``rescale="tensor"`` the mean over the tensors); for each loss ``alpha/NAME``,
        ``coefficient/NAME`` and ``norm/NAME``; for each two of them ``cosine/NAME+NAME``. See
        :class:`BlockStats` for what they are. Norms are those of the losses as given, the scale of
        a ``GradScaler`` included.
        """
        return self._rows(ALL_COLUMNS)

    def rows_to_plot(self) -> list[Row]:
        """:meth:`rows` with the columns of a plot only: ``alpha`` takes long for tens of losses."""
        return self._rows(PLOT_COLUMNS)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the table; what a block does not have (another's losses) stays empty."""
        rows = self.rows()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def write_scalars(self, writer: ScalarWriter) -> None:
        """Write what this writer has not got yet as curves, ``BLOCK/COLUMN`` over steps.

        The columns are ``conflict``, ``harmful``, ``cosine``, ``scale``, ``coefficient/NAME`` and
        ``norm/NAME``, with ``-`` for ``+`` and ``_`` for what MLflow does not take. Where
        ``add_scalar`` raises, the next call goes on with the number that it raised at. A new writer
        gets everything; after :meth:`load_state_dict`, what the last call before ``state_dict()``
        had not written.
        """
        records, points = self._written.get(writer, self._written_before)
        try:
            for tag, value, step in islice(self._points(records), points, None):
                writer.add_scalar(tag, value, step)
                points += 1
            records, points = self._recorded, 0
        finally:
            self._written[writer] = self._last_written = (records, points)

    def state_dict(self) -> dict[str, Any]:
        """All that was recorded: plain values and tensors, for ``torch.save``."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "recorded": self._recorded,
            "written": self._last_written,
            "histories": [history.state_dict() for history in self._histories.values()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the recorder that gave ``state_dict`` stopped; what is here is dropped."""
        histories = [BlockHistory(**state) for state in state_dict["histories"]]
        self.step, self.epoch = state_dict["step"], state_dict["epoch"]
        self._recorded = state_dict["recorded"]
        self._histories = {history.key: history for history in histories}
        self._orders = {frozenset(key.objectives): key.objectives for key in self._histories}
        self._written = WeakKeyDictionary()
        self._last_written = self._written_before = state_dict["written"]

    # Copied and pickled as its state: writers, and weak references to them, cannot be.
    __getstate__ = state_dict
    __setstate__ = load_state_dict

    def _in_known_order(self, block: str, stats: BlockStats) -> tuple[str, BlockStats]:
        """The same losses in another order are the same block."""
        given = stats.objectives
        known = self._orders.setdefault(frozenset(given), given)
        if known == given:
            return block, stats
        name = _joined(known) if block == _joined(given) else block
        return name, stats.in_order(known)

    def _points(self, first: int) -> Iterator[tuple[str, float, int]]:
        """Tags, values and steps of the scalars from that record on."""
        blocks = scalar_tags(key.block for key in self._histories)
        losses = scalar_tags(str(name) for key in self._histories for name in key.objectives)
        for row in self._rows(SCALAR_COLUMNS, first):
            step, _, block, _ = (row.pop(name) for name in ("step", "epoch", "block", "objectives"))
            for column, value in row.items():
                title, slash, loss = column.partition("/")
                tag = f"{title}/{losses[loss]}" if slash else title
                yield f"{blocks[block]}/{tag}", float(value), step

    def _rows(self, attributes: Sequence[str], first: int = 0) -> list[Row]:
        """The rows from that record on, with columns for some attributes of the stats."""
        rows: list[tuple[int, Row]] = []
        for key, history in self._histories.items():
            skipped = bisect_left(history.steps, (first,))
            columns = columns_of(history.stats(skipped), attributes)
            numbers = zip(*(values.tolist() for values in columns.values()), strict=True)
            names = {"block": key.block, "objectives": _joined(key.objectives)}
            for (number, step, epoch), values in zip(history.steps[skipped:], numbers, strict=True):
                row = {"step": step, "epoch": epoch, **names}
                rows.append((number, row | dict(zip(columns, values, strict=True))))
        return [row for _, row in sorted(rows, key=itemgetter(0))]


def _joined(objectives: Sequence[str]) -> str:
    """The name of a block that no user named."""
    return "+".join(map(str, objectives))


def _stats_of(source: Any) -> Mapping[str, BlockStats]:
    stats = getattr(source, "stats", None)
    if isinstance(stats, Mapping) and all(isinstance(x, BlockStats) for x in stats.values()):
        return stats
    raise TypeError(
        "source must have the stats of an integration, as an MMParetoOptimizer or a "
        f"GradientIntegrator has, got {type(source).__name__}: record the wrapper, not its base"
    )
