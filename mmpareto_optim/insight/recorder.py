"""The stats of every step of a training, kept on the device until somebody reads them."""

import csv
from bisect import bisect_left
from collections.abc import Iterator
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mmpareto_optim.optimizer import MMParetoOptimizer
from mmpareto_optim.stats import BlockStats

Row = dict[str, Any]
"""One block at one step."""

# Small tensors take up to 512 bytes each on a GPU; this many at a time become one.
PACK = 512


class ScalarWriter(Protocol):
    """What scalars are written to, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Add a number to a curve."""


class ConflictRecorder:
    """Collects ``opt.stats`` step by step, for a table, TensorBoard or a picture.

    Either one line after each step or a hook, once for the whole training::

        recorder = ConflictRecorder()
        opt.register_step_post_hook(recorder.record)
        for epoch in range(epochs):
            recorder.epoch = epoch
            ...
        recorder.to_csv("conflict.csv")

    Recording waits for nothing: a step adds one small copy a block on the block's device.
    Everything else is computed when it is read, for all steps together. A block of ``m``
    objectives takes ``8 * (m * m + m)`` bytes a step, on its device until the next reading
    and on the host from then on: 48 MB for two objectives and a million steps.

    Attributes:
        step: number of the next step to be recorded; set it when a training is resumed.
        epoch: what the rows to come have as their epoch.
    """

    def __init__(self) -> None:
        self.step = 0
        self.epoch: int | None = None
        self._recorded = 0
        self._written = 0
        self._tracks: dict[tuple[Any, ...], _Track] = {}

    def record(self, optimizer: MMParetoOptimizer, *_hook_arguments: object) -> None:
        """Add what the last integration of ``optimizer`` saw as one step.

        Call it once a step, whatever the number of micro-batches before it. A step of which
        nothing was integrated anew would repeat what the one before it saw.

        Args:
            optimizer: its ``stats`` are read. What a step hook is handed beside it is ignored.

        Raises:
            TypeError: ``optimizer`` is not an :class:`MMParetoOptimizer`.
        """
        if not isinstance(optimizer, MMParetoOptimizer):
            raise TypeError(
                f"optimizer must be an MMParetoOptimizer, got {type(optimizer).__name__}: record "
                "the wrapper, not its base"
            )
        when = _When(self._recorded, self.step, self.epoch)
        for block, stats in optimizer.stats.items():
            tensorwise = stats.stretch is not None
            key = (block, stats.objectives, stats.gamma, tensorwise, stats.gram.device)
            if key not in self._tracks:
                self._tracks[key] = _Track(block, stats.objectives, stats.gamma)
            self._tracks[key].append(when, stats)
        self._recorded += 1
        self.step += 1

    def rows(self) -> list[Row]:
        """The table, in the order of the steps; ``pandas.DataFrame(recorder.rows())`` takes it.

        Returns:
            For each step and block a dict of ``step``, ``epoch``, ``block``, ``objectives``
            (joined by ``+``), ``conflict``, ``cosine`` (the smallest), ``min_norm``,
            ``scale`` (with ``rescale="tensor"`` the mean over the tensors); for each
            objective ``alpha/NAME``, ``coefficient/NAME`` and ``norm/NAME``; for each two
            of them ``cosine/NAME+NAME``. See :class:`BlockStats` for what they are. Norms
            are those of the losses as given: of losses times the scale of a ``GradScaler``
            they are that much longer.
        """
        return self._rows_since(0)

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

        Args:
            writer: has ``add_scalar``: a ``torch.utils.tensorboard.SummaryWriter``, say.
        """
        for row in self._rows_since(self._written):
            for column, value in row.items():
                if column not in ("step", "epoch", "block", "objectives"):
                    writer.add_scalar(f"{row['block']}/{column}", float(value), row["step"])
        self._written = self._recorded

    def _rows_since(self, first: int) -> list[Row]:
        numbered = [pair for track in self._tracks.values() for pair in track.rows_since(first)]
        numbered.sort(key=lambda pair: pair[0])
        return [row for _, row in numbered]


class _When(NamedTuple):
    number: int  # counts the calls of record(): the order of the rows
    step: int
    epoch: int | None


class _Track:
    """A block's numbers while its objectives and the method's settings stay what they are.

    A record is one flat tensor: the Gram matrix, the coefficients and, with
    ``rescale="tensor"``, the mean stretch.
    """

    def __init__(self, block: str, objectives: tuple[str, ...], gamma: float) -> None:
        self._block = block
        self._objectives = objectives
        self._gamma = gamma
        self._when: list[_When] = []
        self._packed: list[Tensor] = []
        self._loose: list[Tensor] = []

    @torch.no_grad()
    def append(self, when: _When, stats: BlockStats) -> None:
        parts = [stats.gram.flatten(), stats.coefficients]
        if stats.stretch is not None:
            parts.append(stats.stretch.mean().unsqueeze(0))
        # A copy: the stats may be views that keep more alive, or that the next step overwrites.
        self._loose.append(torch.cat([part.to(stats.gram, non_blocking=True) for part in parts]))
        self._when.append(when)
        if len(self._loose) == PACK:
            self._pack()

    def rows_since(self, first: int) -> Iterator[tuple[int, Row]]:
        """Rows of the records from that number on, each with its number."""
        skipped = bisect_left(self._when, (first,))
        columns = self._columns(self._read()[skipped:])
        objectives = "+".join(map(str, self._objectives))
        numbers = zip(*(values.tolist() for values in columns.values()), strict=True)
        for when, values in zip(self._when[skipped:], numbers, strict=True):
            row = {
                "step": when.step,
                "epoch": when.epoch,
                "block": self._block,
                "objectives": objectives,
            }
            yield when.number, row | dict(zip(columns, values, strict=True))

    def _columns(self, table: Tensor) -> dict[str, Tensor]:
        names = self._objectives
        m = len(names)
        gram, coefficients, stretch = table.tensor_split((m * m, m * m + m), dim=1)
        scale = stretch.squeeze(1) if stretch.shape[1] else None
        gram = gram.reshape(-1, m, m)
        stats = BlockStats(names, gram, coefficients, self._gamma, scale)
        columns = {
            "conflict": stats.conflict,
            "cosine": stats.cosine,
            "min_norm": stats.min_norm,
            "scale": stats.scale,
        }
        for column, values in (
            ("alpha", stats.alpha),
            ("coefficient", stats.coefficients),
            ("norm", stats.norms),
        ):
            columns |= {f"{column}/{name}": values[:, i] for i, name in enumerate(names)}
        cosines = stats.cosines
        for i, j in combinations(range(m), 2):
            columns[f"cosine/{names[i]}+{names[j]}"] = cosines[:, i, j]
        return columns

    def _read(self) -> Tensor:
        """All records, one a row, which are on the host from now on."""
        self._pack()
        self._packed = [torch.cat([chunk.cpu() for chunk in self._packed])]
        return self._packed[0]

    def _pack(self) -> None:
        if self._loose:
            self._packed.append(torch.stack(self._loose))
            self._loose = []
