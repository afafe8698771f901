"""The recorded stats of one block, as a table of numbers that grows on the block's device."""

from collections.abc import Iterable
from itertools import compress
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


class BlockHistory:
    """Records of a block that the same losses reach.

    A record is one flat tensor: the Gram matrix, the coefficients and the scale, the mean over the
    tensors where these are stretched one by one.
    """

    def __init__(
        self,
        block: str,
        objectives: Iterable[str],
        steps: Iterable[Any] = (),
        table: Tensor | None = None,
    ) -> None:
        self.block = block
        self.objectives = tuple(objectives)
        self.steps = [RecordedStep(*step) for step in steps]
        self._packed = [] if table is None else [table.detach().clone()]
        self._records: list[Tensor] = []

    @torch.no_grad()
    def append(self, step: RecordedStep, stats: BlockStats) -> None:
        """Add a copy: the stats may be views that keep more alive, or be overwritten."""
        numbers = (stats.gram, stats.coefficients, stats.scale.mean())
        flat = [each.flatten().to(stats.gram, non_blocking=True) for each in numbers]
        self._records.append(torch.cat(flat))
        self.steps.append(step)
        if len(self._records) == PACK_SIZE:
            self._pack()

    def stats(self) -> BlockStats:
        """All records along a leading dimension, on the host, the scale as a stretch."""
        m, table = len(self.objectives), self._table()
        gram, coefficients, scale = table.split([m * m, m, 1], dim=1)
        gram = gram.reshape(-1, m, m)
        return BlockStats(self.objectives, gram, coefficients, stretch=scale[:, 0])

    def norm_ratios(self) -> Tensor:
        """Norm of the longest gradient over that of the shortest not zero, in each step."""
        norms = self.stats().norms
        return norms.amax(-1) / norms.where(norms > 0, torch.inf).amin(-1)

    def part(self, places: slice) -> "BlockHistory":
        """Some of the records."""
        return BlockHistory(self.block, self.objectives, self.steps[places], self._table()[places])

    def meeting(self) -> "BlockHistory":
        """The records with two gradients or more that are not zero."""
        return self._where((self.stats().norms != 0).sum(-1) > 1)

    def finite(self) -> "BlockHistory":
        """The records whose gradients are finite."""
        return self._where(self.stats().gram.isfinite().flatten(-2).all(-1))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and one tensor: the arguments that make the same history."""
        steps = [tuple(step) for step in self.steps]
        table = self._table().clone()
        return {"block": self.block, "objectives": self.objectives, "steps": steps, "table": table}

    def _where(self, mask: Tensor) -> "BlockHistory":
        steps = compress(self.steps, mask.tolist())
        return BlockHistory(self.block, self.objectives, steps, self._table()[mask])

    def _table(self) -> Tensor:
        """All records, one a row, which are on the host from now on."""
        self._pack()
        self._packed = [torch.cat([rows.cpu() for rows in self._packed])]
        return self._packed[0]

    def _pack(self) -> None:
        if self._records:
            device = self._records[0].device  # that of the model, which can be moved
            self._packed.append(torch.stack([record.to(device) for record in self._records]))
            self._records = []
