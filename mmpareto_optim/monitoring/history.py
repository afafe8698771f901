"""The recorded stats of one block, as a table of numbers that grows on the block's device."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.stats import BlockStats

# Small tensors take up to 512 bytes each on a GPU; this many at a time become one.
PACK_SIZE = 512


class RecordedStep(NamedTuple):
    """Which step a record is of."""

    number: int  # counts the calls of record(): the order of the rows
    step: int
    epoch: int | None


class HistoryKey(NamedTuple):
    """What all records of a history have in common."""

    block: str
    objectives: tuple[str, ...]
    gamma: float
    has_stretch: bool
    device: str


class BlockHistory:
    """Records of a block, while the losses that reach it and the settings stay what they are.

    A record is one flat tensor: the Gram matrix, the coefficients and, where tensors are stretched
    one by one, the mean and the largest stretch.
    """

    def __init__(
        self, key: Sequence[Any], steps: Iterable[Any] = (), table: Tensor | None = None
    ) -> None:
        self.key = HistoryKey(*key)
        self.steps = [RecordedStep(*step) for step in steps]
        self._packed = [] if table is None else [table.detach().clone()]
        self._records: list[Tensor] = []

    @torch.no_grad()
    def append(self, step: RecordedStep, stats: BlockStats) -> None:
        """Add a copy: the stats may be views that keep more alive, or be overwritten."""
        parts = [stats.gram.flatten(), stats.coefficients]
        if stats.stretch is not None:
            parts.append(torch.stack([stats.stretch.mean(), stats.stretch.amax()]))
        self._records.append(torch.cat([part.to(stats.gram, non_blocking=True) for part in parts]))
        self.steps.append(step)
        if len(self._records) == PACK_SIZE:
            self._pack()

    def stats(self, first: int = 0) -> BlockStats:
        """All records from the one at ``first`` on, along a leading dimension, on the host."""
        _, objectives, gamma, has_stretch, _ = self.key
        m = len(objectives)
        table = self._table()[first:]
        gram, coefficients = table[:, : m * m].reshape(-1, m, m), table[:, m * m : m * m + m]
        stretch = table[:, -2] if has_stretch else None
        return BlockStats(objectives, gram, coefficients, gamma, stretch)

    def largest_coefficients(self) -> Tensor:
        """What a gradient was multiplied by at most in each step, the stretch included."""
        largest = self.stats().coefficients.amax(-1)
        return largest * self._table()[:, -1] if self.key.has_stretch else largest

    def state_dict(self) -> dict[str, Any]:
        """Plain values and one tensor: the arguments that make the same history."""
        steps = [tuple(step) for step in self.steps]
        return {"key": tuple(self.key), "steps": steps, "table": self._table().clone()}

    def _table(self) -> Tensor:
        """All records, one a row, which are on the host from now on."""
        self._pack()
        self._packed = [torch.cat([rows.cpu() for rows in self._packed])]
        return self._packed[0]

    def _pack(self) -> None:
        if self._records:
            self._packed.append(torch.stack(self._records))
            self._records = []


def columns_of(stats: BlockStats, attributes: Iterable[str]) -> dict[str, Tensor]:
    """Columns of the table, each of shape ``(steps,)``: one for the block, each loss, each pair."""
    columns = {}
    names = list(enumerate(stats.objectives))
    for attribute in attributes:
        values, title = getattr(stats, attribute), attribute.removesuffix("s")
        if values.ndim == 1:
            columns[title] = values
        elif values.ndim == 2:
            columns.update({f"{title}/{name}": values[:, i] for i, name in names})
        else:
            pairs = combinations(names, 2)
            columns.update({f"{title}/{a}+{b}": values[:, i, j] for (i, a), (j, b) in pairs})
    return columns
