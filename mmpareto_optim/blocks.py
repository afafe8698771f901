"""Which losses meet at which parameters: blocks, found or chosen by hand."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmpareto_optim.param_groups import Modalities
from mmpareto_optim.rows import Layout, Span, spans_of

Reached = tuple[tuple[str, ...], ...]
"""For each parameter the names of the losses that reach it, in the order of the losses."""

OUTNUMBERED = 100
"""How many times as large a block must be for a smaller one to join it."""


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters whose gradients are treated as one vector.

    Attributes:
        name: the modality, or the objectives joined by ``+`` for a block found by reach.
        objectives: names of the losses that reach the block.
        positions: where its parameters stand in the list of all parameters.
        summed: whether it is what a choice by hand left out, which is not integrated.
        joined: names of the small blocks that are part of it.
    """

    name: str
    objectives: tuple[str, ...]
    positions: tuple[int, ...]
    summed: bool = False
    joined: tuple[str, ...] = ()

    @property
    def integrated(self) -> bool:
        """Whether a rule decides the coefficients; otherwise gradients are added."""
        return len(self.objectives) > 1 and not self.summed


class Group(NamedTuple):
    """Parameters of one block that the same losses give a gradient.

    Attributes:
        block: the number of the block that is integrated; None where gradients are added.
        rows: which of the rows have one.
        of_losses: for each loss of the block where its row stands in ``rows``, or None.
        share: what part of an inner product of these gradients this process counts.
        spans: the parameters.
    """

    block: int | None
    rows: tuple[int, ...]
    of_losses: tuple[int | None, ...]
    share: float
    spans: tuple[Span, ...]


@lru_cache(maxsize=64)
def blocks_by_reach(reached: Reached, sizes: tuple[int, ...]) -> tuple[Block, ...]:
    """One block for each set of losses, of the parameters that just these losses reach.

    A block that is too small for a direction of its own joins a large one.

    Args:
        reached: by parameter, the losses that reach it.
        sizes: by parameter, how many numbers it has.

    Raises:
        ValueError: ``+`` in the names of losses gives two of the blocks one name.
    """
    blocks = [
        Block("+".join(map(str, names)), names, positions)
        for names, positions in _by_objectives(reached, range(len(reached)))
    ]
    objectives: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        other = objectives.setdefault(block.name, block.objectives)
        if block.integrated and other != block.objectives:
            raise ValueError(
                f"losses {other} reach one block of parameters and losses {block.objectives} "
                f"another, and both blocks would be called {block.name!r}: rename a loss"
            )
    return tuple(_with_small_ones_joined(blocks, sizes))


def _with_small_ones_joined(blocks: list[Block], sizes: Sequence[int]) -> list[Block]:
    """Small blocks as a part of larger ones whose losses include theirs.

    A block of one number has no direction common to two losses in half of the steps, and would
    stand still. The losses that do not reach a small block count as zero there.
    """
    numbers = {block: sum(sizes[i] for i in block.positions) for block in blocks}
    for small in sorted((b for b in blocks if b.integrated), key=lambda b: numbers[b]):
        large = [b for b in blocks if _takes_in(b, small, numbers[b], numbers[small])]
        if not large:
            continue
        old = min(large, key=lambda b: numbers[b])
        new = Block(
            old.name,
            old.objectives,
            tuple(sorted((*old.positions, *small.positions))),
            joined=(*old.joined, small.name, *small.joined),
        )
        numbers[new] = numbers[old] + numbers[small]
        blocks = [new if b is old else b for b in blocks if b is not small]
    return blocks


def _takes_in(large: Block, small: Block, numbers: int, fewer: int) -> bool:
    if large is small or not set(small.objectives) < set(large.objectives):
        return False
    too_few = fewer < len(small.objectives) and numbers >= len(large.objectives)
    return too_few or numbers >= OUTNUMBERED * fewer


def blocks_by_modality(
    reached: Reached, params: Sequence[Tensor], modalities: Modalities, losses: Iterable[str]
) -> tuple[Block, ...]:
    """One block for each modality, over the losses that reach any part of it.

    What the modalities leave out is not integrated: its gradients are added.
    """
    blocks = []
    for modality, members in modalities.items():
        positions = tuple(i for i, param in enumerate(params) if param in members and reached[i])
        reaching = {name for position in positions for name in reached[position]}
        objectives = tuple(name for name in losses if name in reaching)
        if objectives:
            blocks.append(Block(modality, objectives, positions))
    chosen = {position for block in blocks for position in block.positions}
    rest = [position for position in range(len(params)) if position not in chosen]
    blocks += [
        Block("+".join(map(str, names)), names, positions, summed=True)
        for names, positions in _by_objectives(reached, rest)
    ]
    return tuple(blocks)


@lru_cache(maxsize=64)
def groups_of(
    blocks: tuple[Block, ...],
    losses: tuple[str, ...],
    layouts: tuple[Layout, ...],
    shares: tuple[float, ...] | None,
) -> tuple[Group, ...]:
    """All parameters with a gradient, in groups that are handled alike.

    Args:
        blocks: those that are integrated.
        losses: names of the losses of the first rows.
        layouts: of the rows.
        shares: for each parameter as in :class:`Group`; None for 1.
    """
    block_of = {i: number for number, block in enumerate(blocks) for i in block.positions}
    members: dict[_GroupKey, list[int]] = {}
    for position, form in enumerate(layouts[0].forms):
        rows = tuple(i for i, layout in enumerate(layouts) if layout.given[position])
        share = 1.0 if shares is None else shares[position]
        if rows:
            key = _GroupKey(block_of.get(position), rows, share, form.dtype, form.device)
            members.setdefault(key, []).append(position)
    groups = []
    for key, positions in members.items():
        objectives = () if key.block is None else blocks[key.block].objectives
        in_rows = [losses.index(name) for name in objectives]
        of_losses = tuple(key.rows.index(r) if r in key.rows else None for r in in_rows)
        spans = spans_of([layouts[row] for row in key.rows], positions)
        groups.append(Group(key.block, key.rows, of_losses, key.share, tuple(spans)))
    return tuple(groups)


class _GroupKey(NamedTuple):
    block: int | None
    rows: tuple[int, ...]
    share: float
    dtype: torch.dtype
    device: torch.device


def _by_objectives(
    reached: Reached, positions: Iterable[int]
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for position in positions:
        groups.setdefault(reached[position], []).append(position)
    groups.pop((), None)
    return ((names, tuple(members)) for names, members in groups.items())
