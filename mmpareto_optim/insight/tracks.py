"""What was recorded of one block, as one table of numbers that grows on the block's device."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.stats import BlockStats, in_conflict, is_harmful

# Small tensors take up to 512 bytes each on a GPU; this many at a time become one.
PACK = 512


class When(NamedTuple):
    """Which record it is."""

    number: int  # counts the calls of record(): the order of the rows
    step: int
    epoch: int | None


class Kind(NamedTuple):
    """What the records of one track have in common.

    Attributes:
        block: its name.
        objectives: as in :class:`BlockStats`, and so is ``gamma``.
        by_tensor: whether there is a mean stretch.
        across: whether there is a Gram matrix across the parts.
        device: where the numbers come from.
    """

    block: str
    objectives: tuple[str, ...]
    gamma: float
    by_tensor: bool
    across: bool
    device: str


def kind_of(block: str, stats: BlockStats) -> Kind:
    """The track that some stats belong to."""
    by_tensor, across = stats.stretch is not None, stats.gram_across is not None
    return Kind(block, stats.objectives, stats.gamma, by_tensor, across, str(stats.gram.device))


class Track:
    """A block's numbers while its objectives and the method's settings stay what they are.

    A record is one flat tensor: the Gram matrix, the coefficients and, where there are such, the
    Gram matrix across the parts and the mean stretch.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.when: list[When] = []
        self._packed: list[Tensor] = []
        self._loose: list[Tensor] = []

    @torch.no_grad()
    def append(self, when: When, stats: BlockStats) -> None:
        """Add a copy: the stats may be views that keep more alive, or are overwritten."""
        parts = [stats.gram.flatten(), stats.coefficients]
        if stats.gram_across is not None:
            parts.append(stats.gram_across.flatten())
        if stats.stretch is not None:
            parts.append(stats.stretch.mean().unsqueeze(0))
        self._loose.append(torch.cat([part.to(stats.gram, non_blocking=True) for part in parts]))
        self.when.append(when)
        if len(self._loose) == PACK:
            self._pack()

    def stats(self, first: int = 0) -> BlockStats:
        """All records from the one at ``first`` on, along a leading dimension, on the host."""
        m = len(self.kind.objectives)
        table = self._read()[first:]
        across = m * m if self.kind.across else 0
        gram, coefficients, between, stretch = table.split(
            [m * m, m, across, int(self.kind.by_tensor)], dim=1
        )
        return BlockStats(
            self.kind.objectives,
            gram.reshape(-1, m, m),
            coefficients,
            self.kind.gamma,
            stretch.squeeze(1) if self.kind.by_tensor else None,
            between.reshape(-1, m, m) if self.kind.across else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values and one tensor."""
        return {
            "kind": self.kind._asdict(),
            "when": [tuple(when) for when in self.when],
            "table": self._read().clone(),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Track":
        """The track that gave a state."""
        kind = Kind(**state["kind"])
        track = cls(kind._replace(objectives=tuple(kind.objectives)))
        track.when = [When(*when) for when in state["when"]]
        track._packed = [state["table"].detach().clone()]
        return track

    def _read(self) -> Tensor:
        """All records, one a row, which are on the host from now on."""
        self._pack()
        self._packed = [torch.cat([chunk.cpu() for chunk in self._packed])]
        return self._packed[0]

    def _pack(self) -> None:
        if self._loose:
            self._packed.append(torch.stack(self._loose))
            self._loose = []


def columns_of(stats: BlockStats) -> dict[str, Tensor]:
    """All columns of the table, each of shape ``(steps,)``."""
    return {
        **_flags(stats),
        "cosine": stats.cosine,
        "min_norm": stats.min_norm,
        "scale": stats.scale,
        **_across(stats),
        **_each("alpha", stats.alpha, stats),
        **_each("coefficient", stats.coefficients, stats),
        **_each("norm", stats.norms, stats),
        **_pairs(stats),
    }


def curves_of(stats: BlockStats) -> dict[str, Tensor]:
    """What one looks at while training."""
    return {
        **_flags(stats),
        "cosine": stats.cosine,
        "scale": stats.scale,
        **_across(stats),
        **_each("coefficient", stats.coefficients, stats),
        **_each("norm", stats.norms, stats),
    }


def plotted_of(stats: BlockStats) -> dict[str, Tensor]:
    """What the picture shows."""
    return {**_flags(stats), **_each("norm", stats.norms, stats), **_pairs(stats)}


def _flags(stats: BlockStats) -> dict[str, Tensor]:
    return {"conflict": stats.conflict, "harmful": stats.harmful}


def _across(stats: BlockStats) -> dict[str, Tensor]:
    gram = stats.gram_across
    if gram is None:
        return {}
    return {"conflict_across": in_conflict(gram), "harmful_across": is_harmful(gram)}


def _each(column: str, values: Tensor, stats: BlockStats) -> dict[str, Tensor]:
    return {f"{column}/{name}": values[:, i] for i, name in enumerate(stats.objectives)}


def _pairs(stats: BlockStats) -> dict[str, Tensor]:
    cosines, names = stats.cosines, stats.objectives
    return {
        f"cosine/{names[i]}+{names[j]}": cosines[:, i, j]
        for i, j in combinations(range(len(names)), 2)
    }
